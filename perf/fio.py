"""fio's six modes (the paper's Fig. 10) on files in upper, new and existing, and still in lower."""

from __future__ import annotations

import json
import os
import subprocess
from functools import partial
from pathlib import Path

from perf.failures import failure
from perf.figures import OPERATIONS
from perf.filesystems import Contender, mounted
from perf.runner import Block

MODES = ("read", "write", "rw", "randread", "randwrite", "randrw")
#: Kind of file -> the modes that it is measured in.
KINDS = {
    "lower's file": ("read", "randread"),
    "existing file": MODES,
    "new file": MODES,
}


def _operations(target: Path, mode: str, size: int, milliseconds: int | None) -> float:
    """Operations of 4 KiB per second: one pass over `size` bytes, or passes for so long."""
    words = ["fio", "--name=x", f"--filename={target}", f"--rw={mode}", "--bs=4k"]
    words += [f"--size={size}", "--ioengine=psync", "--output-format=json"]
    words += ["--fallocate=none", "--randrepeat=1", "--invalidate=0"]
    if milliseconds:
        words += ["--time_based", f"--runtime={milliseconds}ms"]
    try:
        done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=600)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise failure(error) from None
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(job["read"]["iops"] + job["write"]["iops"])


def _written(path: Path, size: int) -> None:
    """A file of `size` bytes, in the page cache: fio's own laying out would leave it cold for some."""
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(block)


def _fio(
    contender: Contender, lower: Path, scratch: Path, kind: str, size: int, milliseconds: int
) -> dict[str, float]:
    figures = {}
    with mounted(contender, lower, scratch) as layers:
        target = layers.merged / "data"
        if kind == "existing file":  # so that no mode measures the copy-up
            with target.open("r+b") as file:
                file.write(b"\0")
        for mode in KINDS[kind]:
            line = f"{mode}, {kind}"
            if kind == "new file":
                target = layers.merged / mode
                if mode not in ("write", "randwrite"):  # what is read was written just before
                    _written(target, 4 * size)
                # One pass: in the second it wouldn't be new.
                figures[line] = _operations(target, mode, 4 * size, None)
                target.unlink()
            else:
                figures[line] = _operations(target, mode, size, milliseconds)
    return figures


def blocks(one: Contender, data: Path, scratch: Path, size: int, milliseconds: int) -> list[Block]:
    """A contender's blocks; `data` is the lower, with a file `data` of `size` bytes."""
    todo = []
    for kind, modes in KINDS.items():
        lines = {f"{mode}, {kind}": OPERATIONS for mode in modes}
        run = partial(_fio, one, data, scratch, kind, size, milliseconds)
        todo.append(Block(one.name, lines, run))
    return todo
