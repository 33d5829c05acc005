"""fio's six modes of the paper (Fig. 10) and metadata work on every file system."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from perf import trees
from perf.filesystems import Contender, contenders, mounted, remounted
from perf.runner import MICROSECONDS, OPERATIONS, SECONDS, Block

MODES = ("read", "write", "rw", "randread", "randwrite", "randrw")
TREE_LINES = (
    "find, cold",
    "find, warm",
    "find -size, cold",
    "find -size, warm",
    "tar c, cold",
    "tar c, warm",
    "tar x",
    "cp -a lower to upper",
    "rm -r upper",
    "rm -r lower",
    "git status, cold",
    "git status, warm",
    "python import, cold",
)
CALL_LINES = (
    "stat, cold",
    "stat, warm",
    "missing name, cold",
    "missing name, warm",
    "open+close",
    "open+read+close",
    "create",
    "rename",
    "chmod",
    "unlink",
    "mkdir",
    "rmdir",
    "copy-up of 2 kB",
)


def _fio(
    contender: Contender, lower: Path, scratch: Path, size: int, new: bool
) -> dict[str, float]:
    figures = {}
    with mounted(contender, lower, scratch) as layers:
        target = layers.merged / ("new" if new else "data")
        kind = "new file" if new else "existing file"
        if new:
            target.write_bytes(b"")
        else:  # so that no mode measures the copy-up
            with target.open("r+b") as file:
                file.write(b"\0")
        for mode in MODES:
            words = ["fio", "--name=x", f"--filename={target}", f"--rw={mode}", "--bs=4k"]
            words += [f"--size={size}", "--ioengine=psync", "--output-format=json"]
            words += ["--fallocate=none", "--randrepeat=1", "--invalidate=0"]
            done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=600)
            text = done.stdout[done.stdout.index("{") :]
            job = json.loads(text)["jobs"][0]
            figures[f"{mode}, {kind}"] = job["read"]["iops"] + job["write"]["iops"]
    return figures


def _timed(*words: str | Path, cwd: Path | None = None) -> float:
    start = time.perf_counter()
    subprocess.run(
        [str(w) for w in words], check=True, cwd=cwd, stdout=subprocess.DEVNULL, timeout=900
    )
    return time.perf_counter() - start


def _tree(contender: Contender, lower: Path, scratch: Path, tar: Path) -> dict[str, float]:
    figures: dict[str, float] = {}
    with mounted(contender, lower, scratch) as layers:
        merged = layers.merged

        def cold(line: str, *words: str | Path, cwd: Path | None = None) -> None:
            with remounted(contender, layers):
                figures[line] = _timed(*words, cwd=cwd)

        tree, again, git = merged / "tree", merged / "again", merged / "git"
        cold("find, cold", "find", tree)
        figures["find, warm"] = _timed("find", tree)
        cold("find -size, cold", "find", tree, "-size", "+1M")
        figures["find -size, warm"] = _timed("find", tree, "-size", "+1M")
        cold("tar c, cold", "sh", "-c", f"tar -C {tree} -cf - . | cat")
        figures["tar c, warm"] = _timed("sh", "-c", f"tar -C {tree} -cf - . | cat")
        cold("git status, cold", "git", "-c", "safe.directory=*", "status", "--short", cwd=git)
        figures["git status, warm"] = _timed(
            "git", "-c", "safe.directory=*", "status", "--short", cwd=git
        )
        cold("python import, cold", sys.executable, "-I", "-S", merged / "import.py")
        again.mkdir()
        figures["tar x"] = _timed("tar", "-C", again, "-xf", tar)
        figures["rm -r upper"] = _timed("rm", "-r", again)
        figures["cp -a lower to upper"] = _timed("cp", "-a", tree, again)
        figures["rm -r lower"] = _timed("rm", "-r", tree)
    return figures


def _each(names: list[bytes], call: Callable[[bytes], object]) -> float:
    """Microseconds that a call takes, mean over the names."""
    start = time.perf_counter()
    for name in names:
        call(name)
    return (time.perf_counter() - start) / len(names) * 1e6


def _missing(name: bytes) -> None:
    try:
        os.stat(name)
    except FileNotFoundError:
        pass


def _open(name: bytes, flags: int = os.O_RDONLY) -> None:
    os.close(os.open(name, flags, 0o644))


def _read(name: bytes) -> None:
    fd = os.open(name, os.O_RDONLY)
    os.read(fd, 4096)
    os.close(fd)


def _calls(contender: Contender, lower: Path, scratch: Path, count: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    with mounted(contender, lower, scratch) as layers, remounted(contender, layers):
        flat = os.fsencode(layers.merged / "flat")
        files = [flat + b"/file%d" % n for n in range(count)]
        absent = [flat + b"/absent%d" % n for n in range(count)]
        made = [flat + b"/new%d" % n for n in range(count)]
        moved = [flat + b"/moved%d" % n for n in range(count)]
        figures["stat, cold"] = _each(files, os.stat)
        figures["stat, warm"] = _each(files, os.stat)
        figures["missing name, cold"] = _each(absent, _missing)
        figures["missing name, warm"] = _each(absent, _missing)
        figures["open+close"] = _each(files, _open)
        figures["open+read+close"] = _each(files, _read)
        figures["create"] = _each(made, partial(_open, flags=os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        pairs = dict(zip(made, moved, strict=True))
        figures["rename"] = _each(made, lambda name: os.rename(name, pairs[name]))
        figures["chmod"] = _each(moved, lambda name: os.chmod(name, 0o600))
        figures["unlink"] = _each(moved, os.unlink)
        figures["mkdir"] = _each(made, os.mkdir)
        figures["rmdir"] = _each(made, os.rmdir)
        figures["copy-up of 2 kB"] = _each(files, partial(_open, flags=os.O_WRONLY | os.O_APPEND))
    return figures


def _lower(scratch: Path, files: int) -> tuple[Path, Path]:
    """The lower of the metadata lines, and a tar of its tree."""
    lower = scratch / "lower"
    lower.mkdir(exist_ok=True)
    tree = trees.tree(lower / "tree", files)
    tar = trees.archive(scratch / "tree.tar", tree)
    trees.repository(lower / "git", trees.tree(scratch / "sources", max(1000, files // 10), seed=3))
    flat = lower / "flat"
    if not flat.exists():
        flat.mkdir()
        for number in range(2000):
            (flat / f"file{number}").write_bytes(b"x" * 2048)
    modules = lower / "modules"
    if not modules.exists():
        modules.mkdir()
        for number in range(300):
            (modules / f"m{number}.py").write_text(f"value = {number}\n")
        names = "\n".join(f"import m{n}" for n in range(300))
        (lower / "import.py").write_text(
            "import sys\nsys.dont_write_bytecode = True\n"
            f"sys.path.insert(0, __file__.rpartition('/')[0] + '/modules')\n{names}\n"
        )
    return lower, tar


def blocks(scratch: Path, quick: bool) -> list[Block]:
    """All blocks of the suite over layers in `scratch`."""
    size = (16 if quick else 256) << 20
    files, calls = (3000, 500) if quick else (20000, 2000)
    data = scratch / "data"
    data.mkdir(exist_ok=True)
    trees.data_file(data / "data", size)
    lower, tar = _lower(scratch, files)
    found = []
    for one in contenders():
        for new in (False, True):
            kind = "new file" if new else "existing file"
            lines = {f"{mode}, {kind}": OPERATIONS for mode in MODES}
            found.append(Block(one.name, lines, partial(_fio, one, data, scratch, size, new)))
    for one in contenders():
        lines = dict.fromkeys(TREE_LINES, SECONDS)
        found.append(Block(one.name, lines, partial(_tree, one, lower, scratch, tar)))
        lines = dict.fromkeys(CALL_LINES, MICROSECONDS)
        found.append(Block(one.name, lines, partial(_calls, one, lower, scratch, calls)))
    return found
