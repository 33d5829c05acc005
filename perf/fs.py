"""All that is measured of every file system (the paper's Fig. 10, and metadata), over one lower."""

from __future__ import annotations

from pathlib import Path

from perf import calls, fio, floor, metadata, server, trees
from perf.filesystems import contenders
from perf.places import spread
from perf.runner import Block


def _lower(scratch: Path, files: int, flat_files: int) -> tuple[Path, Path]:
    """The lower of the metadata lines, and a tar of its tree."""
    lower = scratch / "lower"
    lower.mkdir(exist_ok=True)
    tree = trees.tree(lower / "tree", files)
    tar = trees.archive(scratch / "tree.tar", tree)
    trees.repository(lower / "git", trees.tree(scratch / "sources", max(1000, files // 10), seed=3))
    trees.flat(lower / "flat", flat_files)
    trees.modules(lower, 300)
    trees.wheel(scratch, 500)
    return lower, tar


def left_out(quick: bool, only: str | None) -> list[str]:
    """The contenders that a quick run leaves out unless --only names them."""
    if not quick or only:
        return []
    return [one.name for one in contenders() if one.extra]


def blocks(scratch: Path, quick: bool, only: str | None = None) -> list[Block]:
    """All blocks of the suite over layers in `scratch`; `only`: what --only says."""
    size, milliseconds = ((16 << 20), 250) if quick else ((64 << 20), 2000)
    files, count = (3000, 2000) if quick else (20000, 5000)
    data = scratch / "data"
    data.mkdir(exist_ok=True)
    spread(scratch)
    trees.data_file(data / "data", size)
    lower, tar = _lower(scratch, files, 2 * count)
    out = left_out(quick, only)
    everyone = [one for one in contenders() if one.name not in out]
    words = only.split(",") if only else [""]
    asked = [one for one in everyone if one.served and any(word in one.name for word in words)]
    idle = server.Idle(asked, lower, scratch)
    todo = []
    for one in everyone:
        todo += fio.blocks(one, data, scratch, size, milliseconds)
    for one in everyone:
        todo += metadata.blocks(one, lower, scratch, tar)
        todo += calls.blocks(one, lower, scratch, count)
        todo += server.blocks(one, lower, scratch, idle)
    return todo + floor.blocks(everyone, lower, scratch, tar)
