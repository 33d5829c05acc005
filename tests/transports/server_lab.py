"""Starting and ending the mirror's server in tests, each wait with a deadline."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mount_helpers import syscalls

DEADLINE = 60.0
SCRIPT = Path(__file__).with_name("mirror_server.py")


def wait_for(condition: Any, what: str, seconds: float = DEADLINE) -> None:
    """Poll until it is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"still not after {seconds} s: {what}"
        time.sleep(0.01)


def is_mounted(point: Path) -> bool:
    """By the table of mounts: a dead mount must not be touched."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(point) for line in lines)


def held_elsewhere(point: Path) -> bool:
    """Whether a mount namespace that was made meanwhile has a copy of the mount."""
    for table in Path("/proc").glob("[0-9]*/mountinfo"):
        try:
            if f" {point} " in table.read_text(errors="replace"):
                return True
        except OSError:
            continue
    return False


class Server:
    """A running mirror. `root` is the mount, `source` what it shows."""

    def __init__(self, process: subprocess.Popen[str], source: Path, root: Path) -> None:
        self.process = process
        self.source = source
        self.root = root
        self.name, self.data_path = "", ""
        self._rest = ""

    def line(self, seconds: float = DEADLINE) -> Any:
        """The next line of its output."""
        out = self.process.stdout
        assert out is not None
        end = time.monotonic() + seconds
        while "\n" not in self._rest:
            ready, _, _ = select.select([out], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the server says nothing"
            more = os.read(out.fileno(), 65536).decode()
            assert more, f"the server ended: {self.errors()}"
            self._rest += more
        line, _, self._rest = self._rest.partition("\n")
        return json.loads(line)

    def ask(self, word: str, *arguments: Any) -> Any:
        """Have it call a method of its transport."""
        self._tell(word, *arguments)
        return self.line()

    def stop(self) -> None:
        """Have it stop; `ended()` is next."""
        self._tell("stop")

    def _tell(self, word: str, *arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([word, *arguments]) + "\n")
        self.process.stdin.flush()

    def errors(self) -> str:
        """What it wrote to standard error; to be read once, when it has ended."""
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def counters(self) -> dict[str, int]:
        answer: dict[str, int] = self.ask("counters")
        return answer

    def unmount(self) -> None:
        """umount, and the server ends with success and no complaint."""
        end = time.monotonic() + DEADLINE
        while True:
            try:
                syscalls.umount2(bytes(self.root))
                break
            except OSError:  # busy while a file's release is on its way
                assert time.monotonic() < end
                time.sleep(0.02)
        self.ends()

    def ends(self) -> None:
        """It ends, now that nothing holds the mount."""
        if held_elsewhere(self.root):
            self.stop()
        self.ended()

    def ended(self) -> dict[str, int]:
        word, counters = self.line()
        assert word == "end"
        assert self.process.wait(DEADLINE) == 0
        errors = self.errors()
        assert errors == "", errors
        return dict(counters)


@contextmanager
def mirror(
    source: Path, root: Path, transport: str, *, command: tuple[str, ...] = (), **options: Any
) -> Iterator[Server]:
    """A server process and its mount; taken away at the end whatever happened."""
    process = subprocess.Popen(
        [*command, sys.executable, str(SCRIPT), str(source), str(root), transport, json.dumps(options)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    server = Server(process, source, root)
    try:
        word, server.name, server.data_path = server.line()
        assert word == "live"
        yield server
        if process.poll() is None and is_mounted(root):
            server.unmount()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        if is_mounted(root):
            try:
                syscalls.umount2(bytes(root), syscalls.MNT_FORCE | syscalls.MNT_DETACH)
            except OSError:
                pass
        process.wait(DEADLINE)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass
