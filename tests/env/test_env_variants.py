"""Instances as a site may want them otherwise: more namespaces, less privilege, other places."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import User
from tests.env.instance_lab import Lab, laboratory

KINDS = ("site-kernel", "rootless-fuse")


@pytest.mark.parametrize("kind", KINDS)
def test_private_uts_and_ipc(kind: str, alice: User) -> None:
    with laboratory(kind, alice, '[instance]\nnamespaces = ["uts", "ipc"]\n') as lab:
        with lab.member():
            first = lab.say("readlink /proc/self/ns/uts /proc/self/ns/ipc").split()
            second = lab.say("readlink /proc/self/ns/uts /proc/self/ns/ipc").split()
        assert first == second
        for name, link in zip(("uts", "ipc"), first, strict=True):
            assert link != os.readlink(f"/proc/self/ns/{name}")
            assert link.startswith(f"{name}:")


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_capabilities_and_no_new_privs(kind: str, alice: User) -> None:
    settings = '[privileges]\ncapabilities = ["chown", "fowner", "setuid", "setgid"]\nno_new_privs = true\n'
    with laboratory(kind, alice, settings) as lab:
        status = dict(
            line.split(":", 1)
            for line in lab.say("cat /proc/self/status").splitlines()
            if ":" in line
        )
        assert int(status["CapBnd"], 16) == int(status["CapEff"], 16) == 1 | 8 | 64 | 128
        assert status["NoNewPrivs"].strip() == "1"
        said = lab.say(
            "cp /usr/bin/id /usr/local/bin/i; chmod 4755 /usr/local/bin/i;"
            " setpriv --reuid 65534 --clear-groups /usr/local/bin/i -u"
        )
        assert said == "65534"


@pytest.mark.parametrize("kind", KINDS)
def test_shared_directories_and_tmp_size(kind: str, alice: User) -> None:
    shared = Path("/var/tmp/sdee-shared-of-the-site")
    shared.mkdir(exist_ok=True)
    shared.chmod(0o1777)
    try:
        settings = f'[instance]\nshared = ["{shared}"]\ntmp_size = "8M"\n'
        with laboratory(kind, alice, settings) as lab:
            lab.say(f"echo x > {shared}/from-inside")
            assert (shared / "from-inside").stat().st_uid == alice.uid
            assert int(lab.say("stat -f -c '%b %S' /tmp | awk '{print $1*$2}'")) == 8 << 20
    finally:
        shutil.rmtree(shared)


def test_a_store_that_is_roots(alice: User) -> None:
    place = Path("/var/tmp/sdee-store-of-the-site")
    place.mkdir(mode=0o755, exist_ok=True)
    try:
        settings = f'store = "{place}/{{user}}"\n'
        with laboratory("site-kernel", alice, settings) as lab:
            lab.say("echo x > /etc/of-store")
            own = place / alice.name
            assert own.stat().st_uid == alice.uid and own.stat().st_mode & 0o777 == 0o700
            assert (own / "lab/upper/etc/of-store").read_text() == "x\n"
            assert lab.sdee("env", "rm", "lab").returncode == 0
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize("kind", (*KINDS, "site-fuse"))
def test_volatile_twice(kind: str, alice: User) -> None:
    with laboratory(kind, alice, "volatile = true\n") as lab:
        lab.say("echo one > /etc/of-volatile")
        lab.sdee("kill", "lab")
        assert lab.say("cat /etc/of-volatile; echo two > /etc/of-volatile") == "one"
        assert lab.say("cat /etc/of-volatile") == "two"


def test_a_wrong_setting_of_the_users_is_told(alice: User) -> None:
    file = alice.home / ".config/sdee/sdee.toml"
    with laboratory("rootless-fuse", alice) as lab:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            file.write_text("[environments]\ndefault = 'of-the-user'\n")
            assert _environment(lab) == "of-the-user"
            file.write_text("[environments]\ncolour = 'red'\n")
            done = lab.sdee("run", "true")
            assert done.returncode == 1 and "environments.colour is no setting" in done.stderr
            done = lab.sdee("env", "list")
            assert done.returncode == 1 and "environments.colour is no setting" in done.stderr
        finally:
            shutil.rmtree(alice.home / ".config")


def _environment(lab: Lab) -> str:
    return lab.sdee("run", "sh", "-c", "echo $SDEE_ENVIRONMENT").stdout.strip()
