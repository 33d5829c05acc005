"""A daemon of the tests' own, and what clients say to it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sdee_launch import protocol

PATIENCE = 60.0
#: A daemon that outlives one test, as its fixture does, and is no left-over of that test.
_START = "import importlib, sys; sys.exit(importlib.import_module('sdee_launch.daemon').main())"


def wait_for(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.02)


class Daemon:
    """`sdeed` with its own state and socket, or with those of the node."""

    def __init__(
        self,
        directory: Path,
        state: str | None = None,
        path: str | None = None,
        environ: dict[str, str] | None = None,
    ) -> None:
        self.environ = {**os.environ, **(environ or {})}
        self.state = state or str(directory / "state")
        self.socket = path or str(directory / "sdeed.sock")
        self.log = directory / "sdeed.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, "--verbose", "--state", self.state,
                 "--socket", self.socket],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env=self.environ,
            )  # fmt: skip
        wait_for(self.answers, "the daemon answers")

    def process_id(self) -> int:
        """Its number."""
        assert self.process is not None
        return self.process.pid

    def answers(self) -> bool:
        """Whether it is there. Fails if it ended."""
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"sdeed ended: {self.log.read_text()}")
        try:
            reply, _ = protocol.request("status", path=self.socket)
        except protocol.Unavailable:
            return False
        return reply["pid"] == self.process.pid

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it; instances stay."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(PATIENCE)
            self.process = None

    def request(self, op: str, **fields: object) -> dict[str, object]:
        """Ask as root, without descriptors."""
        reply, fds = protocol.request(op, path=self.socket, **fields)
        for fd in fds:
            os.close(fd)
        return reply

    def instances(self) -> list[dict[str, object]]:
        """All that live."""
        found = self.request("node")["instances"]
        assert isinstance(found, list)
        return found

    def end_instances(self) -> None:
        """Kill what lives and wait until it is gone."""
        for item in self.instances():
            with contextlib.suppress(protocol.Refused):
                fields = {"job": item["job"]} if item["job"] else {"env": item["env"]}
                self.request("kill", uid=item["uid"], **fields)

    def close(self) -> None:
        """End its instances and itself; after a test that broke it, by force."""
        if self.process is None:
            return
        try:
            if self.process.poll() is None:
                self.end_instances()
        finally:
            self.stop()
            # Where there is a socket, clients believe in a daemon that is just restarting.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.socket)
            subprocess.run(
                ["umount", "-i", "-l", f"{self.state}/masks"],
                check=False, capture_output=True, timeout=20,
            )  # fmt: skip


@contextlib.contextmanager
def running_daemon(
    directory: Path,
    state: str | None = None,
    path: str | None = None,
    environ: dict[str, str] | None = None,
) -> Iterator[Daemon]:
    """A daemon for the length of a block."""
    daemon = Daemon(directory, state, path, environ)
    daemon.start()
    try:
        yield daemon
    finally:
        daemon.close()


def connect(path: str, seconds: float = PATIENCE) -> socket.socket:
    """A bare connection to a daemon."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(seconds)
    sock.connect(path)
    return sock


def as_user(uid: int, gid: int, work: Callable[[], object]) -> str:
    """Run `work` in a child that has become this user; its result or exception as text."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        text = "?"
        try:
            os.close(read_end)
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            text = repr(work())
        except BaseException as error:
            text = f"{type(error).__name__}: {error} {getattr(error, 'kind', '')}"
        finally:
            with contextlib.suppress(OSError):
                os.write(write_end, text.encode())
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(pid, 0)
    return text
