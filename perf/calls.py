"""Single calls on many files, by one caller and by several at once."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from perf.figures import MICROSECONDS, OPERATIONS, Missing
from perf.filesystems import Contender, mounted, remount
from perf.runner import Block

LINES = (
    "stat, cold",
    "stat, warm",
    "missing name, cold",
    "missing name, warm",
    "open+close",
    "open+read+close",
    "create",
    "rename",
    "chmod",
    "mkdir",
    "copy-up of 2 kB",
    "unlink",
    "rmdir",
)
CALLERS = (1, 2, 4, 8)


def median_line(line: str) -> str:
    """The name of the line that has the median call beside the mean."""
    return f"{line}: the median call"


def callers_line(callers: int) -> str:
    """The name of the line of so many callers."""
    return f"{callers} caller{'s' * (callers > 1)} at once: stat cold, total"


def each(names: Sequence[bytes], call: Callable[[bytes], object]) -> tuple[float, float]:
    """Microseconds that a call takes: mean and median over the names."""
    clock = time.perf_counter_ns
    times = []
    for name in names:
        start = clock()
        call(name)
        times.append(clock() - start)
    return statistics.mean(times) / 1000, statistics.median(times) / 1000


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
    with mounted(contender, lower, scratch) as layers:
        flat = os.fsencode(layers.merged / "flat")
        files = [flat + b"/file%d" % n for n in range(count)]
        absent = [flat + b"/absent%d" % n for n in range(count)]
        made = [flat + b"/new%d" % n for n in range(count)]
        moved = [flat + b"/moved%d" % n for n in range(count)]
        renamed = dict(zip(made, moved, strict=True))
        create = partial(_open, flags=os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        steps: list[tuple[str, list[bytes], Callable[[bytes], object]]] = [
            ("stat, cold", files, os.stat),
            ("stat, warm", files, os.stat),
            ("missing name, cold", absent, _missing),
            ("missing name, warm", absent, _missing),
            ("open+close", files, _open),
            ("open+read+close", files, _read),
            ("create", made, create),
            ("rename", made, lambda name: os.rename(name, renamed[name])),
            ("chmod", moved, lambda name: os.chmod(name, 0o600)),
            ("mkdir", made, os.mkdir),
            ("copy-up of 2 kB", files, partial(_open, flags=os.O_WRONLY | os.O_APPEND)),
            # What removes comes last: see places.spread().
            ("unlink", moved, os.unlink),
            ("rmdir", made, os.rmdir),
        ]
        for line, names, call in steps:
            figures[line], figures[median_line(line)] = each(names, call)
    return figures


def at_once(parts: Sequence[Sequence[bytes]]) -> float:
    """Seconds until a process for each part has called stat on all of its names.

    Raises Missing where one of them fails.
    """
    gate, opened = os.pipe()
    children = []
    for names in parts:
        pid = os.fork()
        if not pid:
            try:
                os.close(opened)
                os.read(gate, 1)  # until all are there
                for name in names:
                    os.stat(name)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    os.close(gate)
    time.sleep(0.02)
    start = time.perf_counter()
    os.close(opened)
    failed = [pid for pid in children if os.waitpid(pid, 0)[1]]
    spent = time.perf_counter() - start
    if failed:
        raise Missing(f"{len(failed)} of {len(children)} callers failed")
    return spent


def _callers(contender: Contender, lower: Path, scratch: Path, count: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    with mounted(contender, lower, scratch) as layers:
        flat = os.fsencode(layers.merged / "flat")
        files = [flat + b"/file%d" % n for n in range(count)]
        for callers in CALLERS:
            if callers != CALLERS[0]:
                remount(contender, layers)
            seconds = at_once([files[first::callers] for first in range(callers)])
            figures[callers_line(callers)] = count / seconds
    return figures


def blocks(one: Contender, lower: Path, scratch: Path, count: int) -> list[Block]:
    """A contender's blocks; `lower` holds `flat` with twice `count` files of 2 kB."""
    lines = {name: MICROSECONDS for line in LINES for name in (line, median_line(line))}
    callers = {callers_line(number): OPERATIONS for number in CALLERS}
    return [
        Block(one.name, lines, partial(_calls, one, lower, scratch, count)),
        Block(one.name, callers, partial(_callers, one, lower, scratch, 2 * count)),
    ]
