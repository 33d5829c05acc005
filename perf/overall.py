"""UnixBench's lines (the paper's Tables 1 and 2), by drivers of our own: perf/unixlike.c says how."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import partial

from perf.figures import Unit
from perf.places import Place
from perf.programs import compiled
from perf.runner import Block
from perf.sandboxes import Sandbox
from perf.sessions import Sessions

PER_SECOND, KIB_PER_SECOND = Unit("1/s", True), Unit("KiB/s", True)
#: Line of the report -> the driver's word for it.
LINES = {
    "integers and strings (as Dhrystone)": "integers",
    "floating point (as Whetstone)": "floats",
    "execl": "execl",
    "file copy, 256 bytes": "copy256",
    "file copy, 1024 bytes": "copy1024",
    "file copy, 4096 bytes": "copy4096",
    "pipe throughput": "pipe",
    "context switching": "switch",
    "process creation": "process",
    "shell scripts": "script",
}


def _slice(
    sessions: Sessions, sandbox: Sandbox, place: Place, line: str, seconds: float, copies: int
) -> dict[str, float]:
    """A short run of one line: what so many copies at once reach together."""
    program = compiled("unixlike", place.programs)
    # One for each: sdeefs watches the directories of lower that it has looked into.
    directory = str(place.work / re.sub(r"\W+", "-", sandbox.name))
    if LINES[line].startswith("copy"):
        sessions.ask(sandbox, "mkdir", "-p", directory)
    words = (str(program), LINES[line], str(seconds), str(copies), directory)
    return {named(line, copies): float(sessions.ask(sandbox, *words))}


def named(line: str, copies: int) -> str:
    """The line's name in the report."""
    return line if copies == 1 else f"{line}, {copies} copies"


def blocks(quick: bool, found: Sequence[Sandbox], place: Place, sessions: Sessions) -> list[Block]:
    """All blocks of the suite: one for each line and sandbox, the drivers in `place`."""
    seconds = 0.025 if quick else 0.05
    todo = []
    for copies in dict.fromkeys((1, os.cpu_count() or 1)):
        for line, word in LINES.items():
            unit = KIB_PER_SECOND if word.startswith("copy") else PER_SECOND
            for sandbox in found:
                run = partial(_slice, sessions, sandbox, place, line, seconds, copies)
                todo.append(Block(sandbox.name, {named(line, copies): unit}, run))
    return todo
