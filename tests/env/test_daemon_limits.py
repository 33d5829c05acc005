"""What one user may have of the daemon, and what its instances survive."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sdee_launch import protocol
from tests.conftest import User
from tests.env.daemon_lab import Daemon, as_user, running_daemon, wait_for


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        (directory / "sdee.toml").write_text("[daemon]\ninstances = 2\n")
        environ = {
            "SDEE_CONFIG": f"{directory}/sdee.toml",
            "SDEED_SOCKET": f"{directory}/sdeed.sock",
        }
        with running_daemon(directory, environ=environ) as started:
            yield started


def _joining(daemon: Daemon, names: list[str]) -> Callable[[], object]:
    """Join these environments and stay in them; what the daemon said of each."""

    def join() -> object:
        said = []
        for name in names:
            try:
                protocol.request("join", env=name, path=daemon.socket)
                said.append("joined")
            except protocol.Refused as error:
                said.append(f"{error.kind}: {error}")
        return said

    return join


def test_the_most_instances_of_one_user(daemon: Daemon, alice: User, bob: User) -> None:
    names = ["limit-a", "limit-b", "limit-c", "limit-a"]
    said = as_user(alice.uid, alice.gid, _joining(daemon, names))
    assert said.count("joined") == 3, said
    assert "busy: 2 instances are alive" in said
    assert as_user(bob.uid, bob.gid, _joining(daemon, ["limit-a"])) == "['joined']"
    wait_for(lambda: daemon.instances() == [], "they end when nobody is in them")
    said = as_user(alice.uid, alice.gid, _joining(daemon, ["limit-c"]))
    assert said == "['joined']"


def test_a_keeper_killed(daemon: Daemon, alice: User) -> None:
    """The process that makes a user's instances dies: the next request starts another."""
    assert as_user(alice.uid, alice.gid, _joining(daemon, ["keeper"])) == "['joined']"
    keepers = [
        int(entry)
        for entry in os.listdir("/proc")
        if entry.isdigit()
        and _title(entry) == f"sdee-keeper of uid {alice.uid}"
        and _daemon_of(entry) == daemon.process_id()
    ]
    assert len(keepers) == 1
    os.kill(keepers[0], 9)
    wait_for(lambda: not _running(keepers[0]), "it is dead")
    assert as_user(alice.uid, alice.gid, _joining(daemon, ["keeper"])) == "['joined']"


def _title(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode(errors="replace")
    except OSError:
        return ""


def _parent(pid: str) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]


def _daemon_of(pid: str) -> int:
    """A keeper's parent is the template, whose parent is the daemon."""
    try:
        return int(_parent(_parent(pid)))
    except OSError:
        return 0


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
