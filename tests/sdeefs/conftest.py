"""Mounts for the tests of the commands: made by the commands themselves, always taken away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sdeefs.control import records


def wait_until(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    """Poll a condition; the test fails with `what` when it doesn't come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


def mounted(point: Path) -> bool:
    """Whether something is mounted at a path, without touching it."""
    return f" {point} " in Path("/proc/self/mountinfo").read_text()


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie doesn't)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@dataclass
class Lab:
    """A place with a lower, an upper and a mount point, and the command."""

    place: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def lower(self) -> Path:
        return self.place / "lower"

    @property
    def upper(self) -> Path:
        return self.place / "upper"

    @property
    def work(self) -> Path:
        return self.place / "upper.work"

    @property
    def merged(self) -> Path:
        return self.place / "merged"

    def sdeefs(
        self, *words: str | Path, status: int = 0, module: str = "sdeefs"
    ) -> subprocess.CompletedProcess[str]:
        """Run the command; its exit status must be as expected."""
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, words)],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
            env={**os.environ, **self.environment},
        )
        assert done.returncode == status, (words, done.returncode, done.stdout, done.stderr)
        return done

    def mount(self, *words: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
        """`sdeefs mount` of the three directories."""
        return self.sdeefs("mount", *words, self.upper, self.lower, self.merged, status=status)

    def umount(self) -> None:
        """`sdeefs umount`; the server must have ended then."""
        pid = self.pid()
        self.sdeefs("umount", self.merged)
        assert not mounted(self.merged)
        assert not alive(pid)

    def status(self) -> dict[str, object]:
        """`sdeefs status --json` of the mount."""
        (found,) = json.loads(self.sdeefs("status", "--json", self.merged).stdout)
        return dict(found)

    def pid(self) -> int:
        """The server's, by its record: the command would take longer."""
        found = [r["pid"] for r in records() if r.get("merged") == str(self.merged)]
        (pid,) = filter(alive, found)
        return int(pid)

    def ended(self, pid: int) -> None:
        """Wait until the server has ended."""
        wait_until(lambda: not alive(pid), f"the end of server {pid}")

    def take_away(self) -> None:
        """Whatever is still mounted, by force."""
        while mounted(self.merged):
            subprocess.run(
                ["umount", "-i", "-l", str(self.merged)],
                timeout=20,
                check=True,
                capture_output=True,
            )


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A lower with a few things in it, an empty upper."""
    made = Lab(tmp_path)
    for directory in (made.lower, made.upper, made.merged, made.lower / "dir"):
        directory.mkdir()
    (made.lower / "file").write_text("of lower\n")
    (made.lower / "dir" / "inner").write_text("inner of lower\n")
    try:
        yield made
    finally:
        made.take_away()
