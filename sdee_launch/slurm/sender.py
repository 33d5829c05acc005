"""In the daemon of a login node: promised generations are sent to the jobs that wait for them.

A promise is a file below STATE/promises, so that a new daemon keeps those of the old one. It is
dropped when its user has had no job in the queue for a while.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from sdee_launch.deploy.ended import live_jobs
from sdee_launch.protocol import Refused
from sdee_launch.slurm import broadcast

if TYPE_CHECKING:
    from sdee_launch.daemon import Daemon

log = logging.getLogger("sdeed")

#: Seconds between looks just after a submission, and later.
SOON, LATER = 0.3, 3.0
#: Seconds without any job of the user after which a promise is dropped.
IDLE = 120.0
#: Of errors that these are in the cause is that a node's Prolog is late: it has no inbox yet.
LATE = ("Permission denied", "No such file")
#: Any other may pass: so often it is tried, after 1, 2, 4 … seconds.
TRIES = 4
_running: set[int] = set()  # daemons (by id) whose loop runs
_sent: set[broadcast.Wish] = set()
_failed: dict[broadcast.Wish, tuple[int, float]] = {}  # how often; when it is tried again


def _directory(daemon: Daemon) -> Path:
    return Path(daemon.state) / "promises"


def promise(daemon: Daemon, uid: int, identity: str, source: str) -> None:
    """Send generations of this identity, from `source`, to jobs of the user that ask for them."""
    directory = _directory(daemon)
    directory.mkdir(mode=0o700, exist_ok=True)
    path = directory / f"{uid}-{identity}"
    path.with_suffix(".new").write_text(json.dumps({"uid": uid, "source": source}))
    os.replace(path.with_suffix(".new"), path)
    start(daemon)


def start(daemon: Daemon) -> None:
    """Begin to look, if there are promises and nobody does."""
    directory = _directory(daemon)
    if id(daemon) not in _running and directory.is_dir() and any(directory.iterdir()):
        _running.add(id(daemon))
        daemon.nursery.start_soon(_look, daemon)


async def _look(daemon: Daemon) -> None:
    try:
        while promises := list(_directory(daemon).iterdir()):
            newest = max(path.stat().st_mtime for path in promises)
            try:
                wanted = await trio.to_thread.run_sync(broadcast.wishes)
                for wish in wanted:
                    await _try(daemon, wish)
                if time.time() - newest > IDLE:
                    await trio.to_thread.run_sync(_drop, promises)
            except (OSError, subprocess.SubprocessError) as error:
                log.error("jobs that wait can't be listed: %s", error)
            await trio.sleep(SOON if time.time() - newest < 60 else LATER)
    finally:
        _running.discard(id(daemon))


async def _try(daemon: Daemon, wish: broadcast.Wish) -> None:
    tries, when = _failed.get(wish, (0, 0.0))
    if time.monotonic() < when:
        return
    try:
        await _keep(daemon, wish)
    except (Refused, OSError, ValueError) as error:
        log.warning("job %d: %s", wish.job, error)
        if any(word in str(error) for word in LATE):
            return
        _failed[wish] = (tries + 1, time.monotonic() + 2**tries)
        if tries + 1 == TRIES:
            _sent.add(wish)
            await trio.to_thread.run_sync(broadcast.give_up, wish, str(error))


async def _keep(daemon: Daemon, wish: broadcast.Wish) -> None:
    path = _directory(daemon) / f"{wish.uid}-{wish.identity}"
    if wish in _sent or not path.exists():
        return
    source = json.loads(path.read_text())["source"]
    await daemon.call(
        wish.uid, "sdee_launch.slurm.node:send",
        {"uid": wish.uid, "state": source, "wish": [
            wish.job, wish.uid, wish.identity, wish.generation, wish.everything, wish.nodes,
            wish.restarts,
        ]},
    )  # fmt: skip
    _sent.add(wish)


def _drop(promises: list[Path]) -> None:
    for path in promises:
        if live_jobs(path.name.partition("-")[0]) == set():
            path.unlink(missing_ok=True)
