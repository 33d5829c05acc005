"""Interleaved, resumable runs: A B C A B C …, each figure appended to a file as soon as it is there."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Missing(Exception):
    """A contender isn't there; the text names what is missing."""


class Unit(NamedTuple):
    """What a line's figures are in, and which way is good."""

    name: str
    higher_is_better: bool = False


MICROSECONDS, MILLISECONDS, SECONDS = Unit("µs"), Unit("ms"), Unit("s")
OPERATIONS = Unit("op/s", higher_is_better=True)


@dataclass(frozen=True)
class Block:
    """Lines of one contender that are measured together: `run()` gives a figure for each line."""

    contender: str
    lines: dict[str, Unit]
    run: Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Figure:
    """All rounds of one line of one contender. `missing` names why there are none."""

    line: str
    contender: str
    unit: str
    higher_is_better: bool
    values: tuple[float, ...]
    missing: str = ""

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Half the distance between the extremes, as a share of the median."""
        if not self.values or not self.median:
            return 0.0
        return (max(self.values) - min(self.values)) / 2 / self.median


class Progress:
    """One line on the terminal for what runs and what is left; silence elsewhere."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.shown = sys.stderr.isatty()

    def step(self, text: str) -> None:
        """Say what is about to be measured."""
        if self.shown:
            spent = time.monotonic() - self.start
            left = spent / self.done * (self.total - self.done) if self.done else 0
            print(
                f"\r\033[K[{self.done}/{self.total}] {text}  {left:.0f} s left",
                end="",
                file=sys.stderr,
                flush=True,
            )
        self.done += 1

    def close(self) -> None:
        """End the line."""
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr)


def _recorded(path: Path) -> dict[tuple[str, str], list[float]]:
    found: dict[tuple[str, str], list[float]] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # cut off in the middle of a line: measured again
                continue
            found.setdefault((record["line"], record["contender"]), []).append(record["value"])
    return found


def run(blocks: Iterable[Block], rounds: int, journal: Path) -> list[Figure]:
    """Measure every block `rounds` times, interleaved. What `journal` has already isn't run again.

    A block that raises `Missing` is dropped and named; any other error stops the run.
    """
    todo = list(blocks)
    recorded = _recorded(journal)
    journal.parent.mkdir(parents=True, exist_ok=True)
    missing: dict[int, str] = {}
    progress = Progress(rounds * len(todo))
    try:
        with journal.open("a") as file:
            for number in range(rounds):
                for index, block in enumerate(todo):
                    progress.step(f"{block.contender}: {', '.join(block.lines)[:60]}")
                    keys = [(line, block.contender) for line in block.lines]
                    if index in missing or all(len(recorded.get(k, ())) > number for k in keys):
                        continue
                    try:
                        values = block.run()
                    except Missing as error:
                        missing[index] = str(error)
                        continue
                    for key in keys:
                        recorded.setdefault(key, []).append(values[key[0]])
                        record = {"line": key[0], "contender": key[1], "value": values[key[0]]}
                        file.write(json.dumps(record) + "\n")
                    file.flush()
    finally:
        progress.close()
    return [
        Figure(
            line,
            block.contender,
            unit.name,
            unit.higher_is_better,
            tuple(recorded.get((line, block.contender), ())),
            missing.get(index, ""),
        )
        for index, block in enumerate(todo)
        for line, unit in block.lines.items()
    ]
