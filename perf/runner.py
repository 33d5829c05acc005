"""Interleaved, resumable runs, each figure appended to a file as soon as it is there."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from perf.failures import failure
from perf.figures import Figure, Missing, Unit


@dataclass(frozen=True)
class Block:
    """Lines of one contender that are measured together: `run()` gives a figure for each line."""

    contender: str
    lines: dict[str, Unit]
    run: Callable[[], dict[str, float]]


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


def order(blocks: Sequence[Block], number: int) -> list[int]:
    """The places of the blocks as round `number` runs them, the same in every run.

    The contenders of the same lines follow one another, so that they meet the machine in the same
    state; shuffled anew each round, so that none always comes after the same other.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, block in enumerate(blocks):
        groups.setdefault(tuple(block.lines), []).append(index)
    shuffle = random.Random(number).shuffle
    for group in groups.values():
        shuffle(group)
    return [index for group in groups.values() for index in group]


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

    A block that raises `Missing`, or whose programs fail, is dropped and named.
    """
    todo = list(blocks)
    recorded = _recorded(journal)
    journal.parent.mkdir(parents=True, exist_ok=True)
    missing: dict[int, str] = {}
    progress = Progress(rounds * len(todo))
    try:
        with journal.open("a") as file:
            for number in range(rounds):
                for index in order(todo, number):
                    block = todo[index]
                    progress.step(f"{block.contender}: {', '.join(block.lines)[:60]}")
                    keys = [(line, block.contender) for line in block.lines]
                    if index in missing or all(len(recorded.get(k, ())) > number for k in keys):
                        continue
                    try:
                        values = block.run()
                    except (Missing, OSError, subprocess.SubprocessError) as error:
                        missing[index] = str(failure(error))
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
