"""Why a program failed, in the words of its own that say it best."""

from __future__ import annotations

import subprocess

from perf.figures import Missing

#: A last line that only points to a manual.
_HINTS = ("--help", "for more information", "for help", "usage:")


def reason(said: str | bytes | None, otherwise: object) -> str:
    """The last line of `said` that isn't a hint, or `otherwise` where nothing was said."""
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else said or ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if not any(hint in line.lower() for hint in _HINTS)]
    return (telling or lines or [str(otherwise)])[-1]


def failure(error: Missing | OSError | subprocess.SubprocessError) -> Missing:
    """What to raise for a peer that is there and fails."""
    if isinstance(error, Missing):
        return error
    said = getattr(error, "stderr", None)
    return Missing(f"doesn't run here: {reason(said, error)}")
