"""What a keeper has ready for the next instance of its user: an init to be, a server to be."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import User
from tests.env.daemon_lab import as_user, wait_for
from tests.env.instance_lab import Lab, laboratory


@pytest.fixture(scope="module")
def lab(alice: User) -> Iterator[Lab]:
    with laboratory("site-fuse", alice) as made:
        yield made


def _children(pid: int) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(stat[1]) == pid and stat[0] != "Z":
                found.append(int(entry))
    return found


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode()
    except OSError:
        return ""


def _keeper(lab: Lab) -> int:
    assert lab.daemon is not None
    found = [
        keeper
        for template in _children(lab.daemon.process_id())
        for keeper in _children(template)
        if _title(keeper) == f"sdee-keeper of uid {lab.user.uid}"
    ]
    assert len(found) == 1
    return found[0]


def _spares(lab: Lab) -> dict[str, int]:
    return {
        _title(pid): pid for pid in _children(_keeper(lab)) if _title(pid).startswith("sdee-spare")
    }


def _ready(lab: Lab) -> dict[str, int]:
    assert lab.say("cat /proc/1/comm") == "sdee-init"
    wait_for(lambda: len(_spares(lab)) == 2, "both stand ready")
    return _spares(lab)


def test_they_become_the_next_instance(lab: Lab) -> None:
    spares = _ready(lab)
    with lab.member():
        one = lab.instances()[0]
        assert one["init"] == spares["sdee-spare init"]
        assert one["servers"] == [spares["sdee-spare server"]]
    lab.wait_gone()


def test_they_hold_nothing_of_their_maker(lab: Lab) -> None:
    spares = _ready(lab)
    for pid in spares.values():
        assert sorted(map(int, os.listdir(f"/proc/{pid}/fd"))) == [0, 1, 2, 3]
    # The init has no privilege over the host any more, and its owner can't look into it.
    init = spares["sdee-spare init"]
    for look in (
        lambda: os.listdir(f"/proc/{init}/fd"),
        lambda: os.readlink(f"/proc/{init}/ns/user"),
        lambda: Path(f"/proc/{init}/mem").read_bytes(),
        lambda: os.listdir(f"/proc/{init}/root/"),
    ):
        assert "PermissionError" in as_user(lab.user.uid, lab.user.gid, look)
    assert os.readlink(f"/proc/{init}/ns/user") != os.readlink("/proc/self/ns/user")
    done = lab.run("true")
    assert done.returncode == 0, done.stderr


def test_one_that_was_killed_is_replaced(lab: Lab) -> None:
    for name in ("sdee-spare init", "sdee-spare server"):
        os.kill(_ready(lab)[name], signal.SIGKILL)
        assert lab.say("echo on") == "on"


def test_other_ids_get_another_init(lab: Lab) -> None:
    spare = _ready(lab)["sdee-spare init"]
    lines = Path("/etc/subuid").read_text()
    first = next(
        line.split(":")[1] for line in lines.splitlines() if line.startswith(f"{lab.user.name}:")
    )
    try:
        Path("/etc/subuid").write_text(
            lines.replace(f"{lab.user.name}:{first}:65536", f"{lab.user.name}:{first}:1000")
        )
        with lab.member():
            assert lab.init() != spare
            assert lab.say("tail -n 1 /proc/self/uid_map").split()[2] == "1000"
        lab.wait_gone()
    finally:
        Path("/etc/subuid").write_text(lines)


def test_they_end_with_their_keeper(lab: Lab) -> None:
    spares = _ready(lab)
    os.kill(_keeper(lab), signal.SIGKILL)
    wait_for(lambda: not any(_title(pid) for pid in spares.values()), "they are gone")
    assert lab.say("echo on") == "on"
