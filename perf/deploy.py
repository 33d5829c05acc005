"""Deployment of uppers of growing size and number of files (the paper's Fig. 11)."""

from __future__ import annotations

from pathlib import Path

from perf.runner import Block


def blocks(scratch: Path, quick: bool) -> list[Block]:
    """All blocks of the suite."""
    del scratch, quick
    return []
