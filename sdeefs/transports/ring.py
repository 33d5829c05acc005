"""Whether FUSE over io_uring can be used here, and what its queues look like."""

from __future__ import annotations


def why_not() -> str | None:
    """None: it works. Else the reason, in words for the user."""
    return "not built"
