"""Deployment of uppers of growing size and number of files (the paper's Fig. 11).

What is measured is sdee's own way on one machine: a generation made of the upper and its package
written, and a cache that has an older generation or none brought up to it. Beside it what a user
would do by hand: copies of the whole tree.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from perf.figures import SECONDS, Missing, Unit
from perf.places import spread, written_back
from perf.runner import Block
from perf.timing import seconds_of
from sdee_launch.accounts import Account, account_of
from sdee_launch.deploy import api

SDEE = "sdee: pack and apply"
BYTES = Unit("bytes")
COPIES = {
    "cp -a": "cp -a {source} {target}",
    "rsync -aHAX": "rsync -aHAX {source}/ {target}",
    "tar | tar": "mkdir {target} && tar -C {source} -cf - . | tar -C {target} -xf -",
}


_numbers = itertools.count()


def _upper(scratch: Path, name: str, files: int, size: int) -> Path:
    """An upper of `files` files that together have `size` bytes and don't compress."""
    path = scratch / "uppers" / name.replace(" ", "").replace(",", "")
    if path.exists():
        return path
    path.mkdir(parents=True)
    data = os.urandom(min(size // files, 16 << 20) + files)
    for number in range(files):
        directory = path / f"d{number // 500}"
        if number % 500 == 0:
            directory.mkdir()
        left = size // files
        with (directory / f"f{number}").open("wb") as file:
            while left > 0:
                part = data[number : number + min(left, 16 << 20)]
                file.write(part)
                left -= len(part)
    return path


def _fresh(scratch: Path) -> Path:
    for old in scratch.glob("deploying*"):
        shutil.rmtree(old, ignore_errors=True)
    place = scratch / f"deploying{next(_numbers)}"  # never the same name twice: see spread()
    place.mkdir()
    written_back(place)
    return place


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _deploy(account: Account, upper: Path, place: Path) -> api.Ensured:
    done = api.submit(account, str(upper), str(place / "state"), level=1)
    number = done.generation.number
    return api.ensure(
        account, str(place / "cache"), str(place / "state"), done.identity, number, "perf"
    )


def _whole(scratch: Path, line: str, files: int, size: int) -> dict[str, float]:
    upper = _upper(scratch, line, files, size)
    place = _fresh(scratch)
    account = account_of(os.getuid())
    return {line: _timed(lambda: _deploy(account, upper, place))}


def _copy(scratch: Path, command: str, line: str, files: int, size: int) -> dict[str, float]:
    if not shutil.which(command.split()[0]):
        raise Missing(f"{command.split()[0]} isn't installed")
    upper = _upper(scratch, line, files, size)
    words = command.format(source=upper, target=_fresh(scratch) / "copy")
    return {line: seconds_of(["sh", "-c", words], timeout=900)}


def _again(scratch: Path, files: int) -> dict[str, float]:
    """Resubmissions: seconds, and the bytes that a node reads."""
    line = f"{files:,} files"
    upper = _upper(scratch, line, files, files * 2000)
    place = _fresh(scratch)
    account = account_of(os.getuid())
    _deploy(account, upper, place)
    figures = {f"{line}, resubmitted unchanged": _timed(lambda: _deploy(account, upper, place))}
    for label, count in (("1 file changed", 1), ("1 % changed", files // 100)):
        for number in range(count):
            path = upper / f"d{number // 500}" / f"f{number}"
            path.write_bytes(os.urandom(2000))
        start = time.perf_counter()
        done = _deploy(account, upper, place)
        figures[f"{line}, {label}"] = time.perf_counter() - start
        figures[f"{line}, {label}: read by a node"] = done.bytes_read
    return figures


def _nodes(scratch: Path, count: int) -> dict[str, float]:
    """So many caches at once on this machine, from one package."""
    line = f"64 MB to {count} nodes"
    upper = _upper(scratch, "64 MB", 64, 64 << 20)
    place = _fresh(scratch)
    account = account_of(os.getuid())
    start = time.perf_counter()
    done = api.submit(account, str(upper), str(place / "state"), level=1)
    children = []
    for node in range(count):
        pid = os.fork()
        if not pid:
            try:
                cache = str(place / f"cache{node}")
                api.ensure(account, cache, str(place / "state"), done.identity, 1, "perf")
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    failed = [pid for pid in children if os.waitpid(pid, 0)[1]]
    if failed:
        raise Missing(f"{len(failed)} of {count} caches failed")
    return {line: time.perf_counter() - start}


def blocks(scratch: Path, quick: bool) -> list[Block]:
    """All blocks of the suite, in `scratch`."""
    spread(scratch)
    sizes = {"1 MB": 1 << 20, "64 MB": 64 << 20} if quick else {
        "1 MB": 1 << 20, "64 MB": 64 << 20, "512 MB": 512 << 20, "2 GB": 2 << 30,
    }  # fmt: skip
    numbers = (10, 1000) if quick else (10, 1000, 20_000, 100_000)
    lines = [(name, max(1, size >> 20), size) for name, size in sizes.items()]
    lines += [(f"{count:,} files", count, count * 2000) for count in numbers]
    found = []
    for name, files, size in lines:
        run = partial(_whole, scratch, name, files, size)
        found.append(Block(SDEE, {name: SECONDS}, run))
        for contender, command in COPIES.items():
            copy = partial(_copy, scratch, command, name, files, size)
            found.append(Block(contender, {name: SECONDS}, copy))
    files = 1000 if quick else 20_000
    again = {f"{files:,} files, resubmitted unchanged": SECONDS}
    for label in ("1 file changed", "1 % changed"):
        again[f"{files:,} files, {label}"] = SECONDS
        again[f"{files:,} files, {label}: read by a node"] = BYTES
    found.append(Block(SDEE, again, partial(_again, scratch, files)))
    for count in (1, 4) if quick else (1, 2, 4, 8, 16):
        line = f"64 MB to {count} nodes"
        found.append(Block(SDEE, {line: SECONDS}, partial(_nodes, scratch, count)))
    return found
