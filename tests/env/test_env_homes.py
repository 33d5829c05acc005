"""Homes that the host's root isn't let into: over NFS with root_squash, and of FUSE."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mount_helpers.mountinfo import mount_at
from tests.conftest import User, _user
from tests.env.daemon_lab import wait_for
from tests.env.instance_lab import Lab, laboratory
from tests.env.login_lab import login_node

WORK = "cd; echo hello > f; mkdir d; mv f d/g; cat d/g; rm -r d; echo x > /etc/of-a-home; id -u"


@pytest.fixture(scope="module")
def carol() -> Iterator[User]:
    yield from _user("sdee-carol", 2103, 21210000)


@contextlib.contextmanager
def mounted_home(kind: str, user: User) -> Iterator[None]:
    """The user's home as a mount. `nfs`: root is nobody there. `fuse`: root isn't let in at all."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        disk = Path(name, "disk")
        os.chmod(name, 0o755)
        disk.mkdir(mode=0o700)
        os.chown(disk, user.uid, user.gid)
        if kind == "nfs":
            served = Path(__file__).with_name("squashed_fs.py")
            words, ids = [sys.executable, str(served), str(disk), str(user.home)], {}
        else:
            words = ["unionfs", "-f", "-o", "nonempty", f"{disk}=RW", str(user.home)]
            ids = {"user": user.uid, "group": user.gid, "extra_groups": []}
        server = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", **ids)  # type: ignore[call-overload]  # fmt: skip
        try:
            wait_for(lambda: mount_at(str(user.home)) or server.poll() is not None, "home")
            with pytest.raises(PermissionError):
                os.listdir(user.home)
            yield
        finally:
            subprocess.run(["umount", "-l", str(user.home)], check=False, timeout=20)
            server.wait(60)


def _daemons(lab: Lab) -> int:
    """How many instances the daemon knows of."""
    assert lab.daemon is not None
    return len(lab.daemon.instances())


@pytest.mark.parametrize("engine", ["kernel", "fuse"])
def test_nfs_with_the_store_on_a_local_disk(engine: str, carol: User) -> None:
    with mounted_home("nfs", carol), tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        os.chmod(place, 0o755)
        with laboratory(f"site-{engine}", carol, f'store = "{place}/{{user}}"\n') as lab:
            assert lab.say(WORK).split() == ["hello", "0"]
            with lab.member():
                assert _daemons(lab) == 1
            assert (Path(place) / carol.name / "lab/upper/etc/of-a-home").exists()


@pytest.mark.parametrize("kind", ["nfs", "fuse"])
def test_the_store_in_such_a_home(kind: str, carol: User) -> None:
    """Only the user's own rights reach it: the instance is made without the daemon."""
    with mounted_home(kind, carol), laboratory("site-auto", carol) as lab:
        assert lab.say(WORK).split() == ["hello", "0"]
        with lab.member():
            assert _daemons(lab) == 0
            assert lab.say("cat /etc/of-a-home; ls /proc/1/comm") == "x\n/proc/1/comm"
            assert [one["env"] for one in lab.instances()] == ["lab"]
        said = lab.sdee("run", "--engine", "kernel", "--", "true")
        assert said.returncode == 1 and str(carol.home) in said.stderr, said
        assert lab.sdee("env", "rm", "lab").stderr == ""
        left = subprocess.run(
            ["ls", "-A", lab.store()], user=carol.uid, group=carol.gid, extra_groups=[],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        assert left.stdout == "default\n"


def test_a_login_to_a_home_on_nfs(carol: User) -> None:
    with login_node("auto", carol) as node, mounted_home("nfs", carol):
        assert node.say(carol, WORK).split() == ["hello", "0"]
        assert node.say(carol, "pwd; cat /etc/of-a-home").split() == [str(carol.home), "x"]
