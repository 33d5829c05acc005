"""What no FUSE server goes below on the lines of trees: computed from three measurements of one round.

Somebody waits for each request that the kernel sends, one after the other. So a line takes at least
what it takes the plain filesystem, whose work the server has to do as well, and the way of so many
requests to the barest server and back.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mount_helpers.mountinfo import mount_at
from perf import metadata, server
from perf.figures import MICROSECONDS, SECONDS, Missing, Unit
from perf.filesystems import Contender, Layers, unmount
from perf.programs import compiled
from perf.runner import Block
from perf.sandboxes import installed

NAME = "floor, computed"
#: Not the removal of lower's files: what a union does then (whiteouts) isn't what a plain filesystem does.
LINES = tuple(line for line in metadata.LINES if line != "rm -r lower")
_REQUESTS = Unit("requests")
#: Nobody waits for the answer to these, or there is none.
_UNAWAITED = ("forget", "batch_forget", "interrupt", "release", "releasedir", "init", "destroy")


def requests_line(line: str) -> str:
    """The name of the line that has the requests of a line of trees."""
    return f"{line}: waited for"


class _Counter(metadata.Observer):
    """The requests of one mount of sdeefs that somebody waited for, by its own count."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self._before = 0

    def _awaited(self, merged: Path) -> int:
        time.sleep(0.05)  # what nobody waits for is still under way
        words = [installed("sdeefs"), "status", "--json", str(merged)]
        done = subprocess.run(words, capture_output=True, check=True, timeout=60)
        (mount,) = json.loads(done.stdout)
        return sum(n for name, n in mount["requests"].items() if name not in _UNAWAITED)

    def start(self, layers: Layers) -> None:
        self._before = self._awaited(layers.merged)

    def end(self, layers: Layers, line: str) -> None:
        self.found[line] = self._awaited(layers.merged) - self._before


@contextmanager
def _bare(program: Path, merged: Path) -> Iterator[None]:
    """The barest server at a directory. Raises Missing where it doesn't start."""
    merged.mkdir(exist_ok=True)
    with subprocess.Popen([program, merged], stderr=subprocess.PIPE, text=True) as process:
        try:
            while mount_at(os.fsencode(merged)) is None:
                if process.poll() is not None:
                    assert process.stderr is not None
                    raise Missing(process.stderr.read().strip())
                time.sleep(0.01)
            time.sleep(0.5)  # the rings register after that
            yield
        finally:
            unmount(merged)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _floor(
    program: Path, ring: Contender, plain: Contender, lower: Path, scratch: Path, tar: Path
) -> dict[str, float]:
    with _bare(program, scratch / "bare"):
        place = [os.fsencode(scratch / "bare")]
        server.getattrs(place, 1000)
        trip = server.getattrs(place, server.GETATTRS)
    counter = _Counter()
    metadata.tree(ring, lower, scratch, tar, counter)
    own = metadata.tree(plain, lower, scratch, tar)
    figures = {server.TRIP_LINE: trip * 1e6}
    for line in LINES:
        figures[requests_line(line)] = counter.found[line]
        figures[line] = own[line] + counter.found[line] * trip
    return figures


def blocks(everyone: Sequence[Contender], lower: Path, scratch: Path, tar: Path) -> list[Block]:
    """The floor's block; see `metadata.blocks`. It counts with sdeefs over rings."""
    ring, plain = (one for name in ("sdeefs ring", "plain") for one in everyone if one.name == name)
    lines: dict[str, Unit] = {server.TRIP_LINE: MICROSECONDS}
    for line in LINES:
        lines |= {requests_line(line): _REQUESTS, line: SECONDS}

    def run() -> dict[str, float]:
        return _floor(compiled("bare", scratch / "programs"), ring, plain, lower, scratch, tar)

    return [Block(NAME, lines, run)]
