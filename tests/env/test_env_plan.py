"""What an instance is made of, planned from mountinfo alone."""

from __future__ import annotations

import pytest

from mount_helpers.mountinfo import Mount, parse_line
from sdee_launch.accounts import Account
from sdee_launch.config import Settings
from sdee_launch.plan import Bind, Plan, PlanProblem, Private, make_plan, parse_bind, visible

ALICE = Account("alice", 1000, 1000, "/home/alice", "/bin/bash", (1000,))
BASE = """\
20 1 8:1 / / rw - ext4 /dev/sda1 rw
21 20 0:5 / /proc rw - proc proc rw
22 20 0:6 / /sys rw - sysfs sysfs rw
23 20 0:7 / /dev rw - devtmpfs dev rw
24 23 0:8 / /dev/shm rw - tmpfs shm rw
25 20 0:9 / /run rw - tmpfs run rw
"""


def _mounts(text: str) -> list[Mount]:
    return [parse_line(line.encode()) for line in (BASE + text).splitlines()]


def _plan(text: str = "", settings: Settings | None = None, account: Account = ALICE) -> Plan:
    return make_plan(_mounts(text), frozenset(), account, settings or Settings())


def _targets(plan: Plan, kind: type) -> list[bytes]:
    return [step.target for step in plan.steps if isinstance(step, kind)]


def test_a_plain_host() -> None:
    plan = _plan()
    assert plan.overlays == (b"/",)
    assert b"/home/alice" in _targets(plan, Bind)
    assert _targets(plan, Private) == [b"/root", b"/home"]


def test_system_filesystems_are_overlaid_parents_first() -> None:
    plan = _plan(
        "30 20 8:2 / /var rw - xfs /dev/sda2 rw\n31 30 8:3 / /var/lib rw - ext4 /dev/sda3 rw\n"
        "32 20 8:4 / /usr ro - squashfs /dev/sda4 ro\n33 20 8:5 / /boot rw - ext4 /dev/sda5 rw\n"
        "34 20 0:40 / /mnt/usb rw - ext4 /dev/sdb rw\n35 20 0:41 / /opt rw - tmpfs t rw\n"
    )
    assert plan.overlays == (b"/", b"/usr", b"/var", b"/var/lib")


def test_shared_filesystems_are_bound_whole() -> None:
    plan = _plan(
        "30 20 0:30 / /scratch rw - lustre server rw\n31 30 0:31 / /scratch/deep rw - nfs4 s rw\n"
        "32 20 0:32 / /software ro - nfs server ro\n33 20 8:9 / /local rw - ext4 /dev/sdc rw\n",
        Settings(shared=("/local", "/plain")),
    )
    bound = _targets(plan, Bind)
    assert {b"/scratch", b"/software", b"/local", b"/plain"} <= set(bound)
    assert b"/scratch/deep" not in bound
    assert plan.overlays == (b"/",)


def test_homes_on_a_filesystem_of_their_own() -> None:
    text = "30 20 0:30 / /home rw - nfs4 server rw\n31 30 0:31 / /home/alice rw - nfs4 server rw\n"
    plan = _plan(text)
    assert plan.overlays == (b"/",)
    assert _targets(plan, Bind).count(b"/home/alice") == 1
    assert b"/home" not in _targets(plan, Bind)
    steps = [s.target for s in plan.steps]
    assert steps.index(b"/home") < steps.index(b"/home/alice")


def test_a_home_elsewhere_hides_its_neighbours() -> None:
    far = Account("far", 1001, 1001, "/users/group/far", "/bin/sh")
    assert b"/users/group" in _targets(_plan(account=far), Private)
    # An account that lives in a part of the system hides nothing of it.
    odd = Account("odd", 1002, 1002, "/var/lib/odd", "/bin/sh")
    assert _targets(_plan(account=odd), Private) == [b"/root", b"/home"]
    none = Account("none", 1003, 1003, "/", "/bin/sh")
    assert b"/" not in _targets(_plan(account=none), Bind)


def test_what_is_covered_is_not_seen() -> None:
    found = visible(
        _mounts(
            "30 20 8:2 / /var rw - xfs a rw\n31 30 8:3 / /var/lib rw - ext4 b rw\n"
            "32 30 8:4 / /var rw - ext4 over rw\n33 20 8:6 / /a/b rw - ext4 c rw\n"
            "34 20 8:7 / /a rw - ext4 d rw\n"
        )
    )
    points = [(m.point, m.source) for m in found]
    assert (b"/var", b"over") in points and (b"/a", b"d") in points
    assert all(source not in (b"a", b"b", b"c") for _, source in points)


@pytest.mark.parametrize(
    ("text", "bind"),
    [
        ("/a", Bind(b"/a", b"/a", False, False)),
        ("/a:/b", Bind(b"/a", b"/b", False, False)),
        ("/a:ro", Bind(b"/a", b"/a", True, False)),
        ("/a:/b:ro", Bind(b"/a", b"/b", True, False)),
        ("/a//c/:/b", Bind(b"/a/c", b"/b", False, False)),
    ],
)
def test_binds(text: str, bind: Bind) -> None:
    assert parse_bind(text) == bind


@pytest.mark.parametrize(
    "text", ["", "a", "/a:b", "/a:/b:/c", "/a:/..", "/a:/", "/a:/proc/x", "/a:/dev", ":/a", "/a\0b"]
)
def test_binds_that_cannot_be(text: str) -> None:
    with pytest.raises(PlanProblem):
        parse_bind(text)
