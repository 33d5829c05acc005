"""What people do with trees of files: find, tar, cp, rm, git, imports, pip."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path

from perf import trees
from perf.figures import SECONDS
from perf.filesystems import Contender, Layers, mounted, remount
from perf.runner import Block
from perf.timing import seconds_of

_HAS_PIP = importlib.util.find_spec("pip") is not None
LINES = (
    "find, cold",
    "find, warm",
    "find -size, cold",
    "find -size, warm",
    "tar c, cold",
    "tar c, warm",
    "git status, cold",
    "git status, warm",
    "python import, cold",
    "git clone",
    *(("pip install",) if _HAS_PIP else ()),
    "tar x",
    "cp -a lower to upper",
    "rm -r upper",
    "rm -r lower",
)


class Observer:
    """Told before and after each line; this one does nothing."""

    def start(self, layers: Layers) -> None:
        """A line is about to run."""

    def end(self, layers: Layers, line: str) -> None:
        """It ran."""


def tree(
    contender: Contender, lower: Path, scratch: Path, tar: Path, observer: Observer | None = None
) -> dict[str, float]:
    """Seconds of each line; see `blocks`. Raises Missing."""
    observer = observer or Observer()
    figures: dict[str, float] = {}
    with mounted(contender, lower, scratch) as layers:
        merged = layers.merged

        def timed(line: str, *words: str | Path, cwd: Path | None = None) -> None:
            observer.start(layers)
            figures[line] = seconds_of([str(w) for w in words], timeout=900, cwd=cwd or "/")
            observer.end(layers, line)

        def cold(line: str, *words: str | Path, cwd: Path | None = None) -> None:
            remount(contender, layers)
            timed(f"{line}, cold", *words, cwd=cwd)

        def cold_and_warm(line: str, *words: str | Path, cwd: Path | None = None) -> None:
            cold(line, *words, cwd=cwd)
            timed(f"{line}, warm", *words, cwd=cwd)

        files, git, again, copied = (merged / n for n in ("tree", "git", "again", "copied"))
        any_owner = ("git", "-c", "safe.directory=*")
        cold_and_warm("find", "find", files)
        cold_and_warm("find -size", "find", files, "-size", "+1M")
        cold_and_warm("tar c", "sh", "-c", f"tar -C {files} -cf - . | cat")
        cold_and_warm("git status", *any_owner, "status", "--short", cwd=git)
        cold("python import", sys.executable, "-I", "-S", merged / "import.py")
        timed("git clone", *any_owner, "clone", "--quiet", "--no-hardlinks", git, merged / "cloned")
        if _HAS_PIP:
            pip = ("-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", "install")
            what = (
                "--no-index",
                "--no-deps",
                "--root-user-action=ignore",
                tar.parent / trees.WHEEL,
            )
            timed("pip install", sys.executable, "-I", *pip, "--target", merged / "site", *what)
        again.mkdir()
        # What removes comes last: see places.spread().
        steps: list[tuple[str, list[str | Path]]] = [
            ("tar x", ["tar", "-C", again, "-xf", tar]),
            ("cp -a lower to upper", ["cp", "-a", files, copied]),
            ("rm -r upper", ["rm", "-r", again]),
            ("rm -r lower", ["rm", "-r", files]),
        ]
        for line, words in steps:
            timed(line, *words)
    return figures


def blocks(one: Contender, lower: Path, scratch: Path, tar: Path) -> list[Block]:
    """A contender's blocks; `lower` holds tree, git and import.py, `tar` is an archive of the tree
    and beside it is the wheel."""
    run = partial(tree, one, lower, scratch, tar)
    return [Block(one.name, dict.fromkeys(LINES, SECONDS), run)]
