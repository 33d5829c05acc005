"""UnixBench's lines (the paper's Tables 1 and 2), by drivers of our own: perf/unixlike.c says how."""

from __future__ import annotations

import os
import subprocess
from functools import partial
from pathlib import Path

from perf.programs import compiled
from perf.runner import Block, Missing, Unit
from perf.sandboxes import Sandbox, sandboxes

PER_SECOND = Unit("1/s", higher_is_better=True)
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


def _copies(sandbox: Sandbox, place: Path, seconds: float, copies: int) -> dict[str, float]:
    """Each line with so many copies at once: the sum of what they reach."""
    program = compiled("unixlike", place)
    figures = {}
    for line, word in LINES.items():
        running = []
        for number in range(copies):
            file = f"/var/tmp/unixlike-{os.getpid()}-{number}"
            words = [str(program), word, str(seconds), *([file] if "copy" in word else [])]
            running.append(
                subprocess.Popen(
                    sandbox.command(*words),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        total = 0.0
        for process in running:
            out, said = process.communicate(timeout=300)
            if process.returncode:
                lines = said.strip().splitlines()
                raise Missing(f"doesn't run here: {lines[-1] if lines else process.returncode}")
            total += float(out)
        figures[_name(line, copies)] = total
    return figures


def _name(line: str, copies: int) -> str:
    return line if copies == 1 else f"{line}, {copies} copies"


def blocks(quick: bool, user: str | None, place: Path) -> list[Block]:
    """All blocks of the suite; the driver is compiled into `place`."""
    seconds = 0.3 if quick else 5.0
    found = []
    for copies in dict.fromkeys((1, os.cpu_count() or 1)):
        lines = {_name(line, copies): PER_SECOND for line in LINES}
        for sandbox in sandboxes(user):
            run = partial(_copies, sandbox, place, seconds, copies)
            found.append(Block(sandbox.name, lines, run))
    return found
