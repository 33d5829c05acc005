"""Ids, ownership in xattrs, secrets, and which xattrs merged shows."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mount_helpers.namespaces import IdRange
from sdeefs.core.api import Caller
from sdeefs.core.ids import ACL_ACCESS, OVERRIDE_STAT, acl_entries, pack_acl
from tests.core.core_lab import ROOT, USER, Core, finish


def fails(number: int, call: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(OSError) as caught:
        finish(call(*arguments))
    assert caught.value.errno == number, caught.value


def test_id_maps_of_both_layers(core: Core) -> None:
    (core.lower / "low").write_text("low")
    os.chown(core.lower / "low", 0, 0)
    (core.upper / "up").write_text("up")
    os.chown(core.upper / "up", 5000, 5001)
    ranges = (IdRange(0, 5000, 1), IdRange(1, 70_000, 1000))
    core.open(uid_upper=ranges, gid_upper=ranges)
    assert core.stat("low")[3:5] == (0, 0)
    assert core.stat("up")[3:5] == (0, 70_000 - 70_000 + 65534)
    core.write("new", b"", caller=Caller(7, 0, 1))
    assert (core.upper / "new").stat()[4:6] == (70_006, 5000)
    core.change("low", mode=0o600)
    assert (core.upper / "low").stat()[4:6] == (5000, 5000)
    core.change("low", uid=7, gid=8)
    assert (core.upper / "low").stat()[4:6] == (70_006, 70_007)
    assert core.stat("low")[3:5] == (7, 8)
    acl = pack_acl(
        [(1, 6, 0xFFFFFFFF), (2, 4, 7), (4, 4, 0xFFFFFFFF), (0x10, 4, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF)]
    )  # fmt: skip
    core.fs.setxattr(core.node("low"), ACL_ACCESS, acl, 0, ROOT)
    on_disk = acl_entries(os.getxattr(core.upper / "low", ACL_ACCESS))
    assert (2, 4, 70_006) in on_disk
    assert core.fs.getxattr(core.node("low"), ACL_ACCESS, ROOT) == acl


def test_ownership_in_xattrs(core: Core) -> None:
    (core.lower / "low").write_text("low")
    os.chown(core.lower / "low", 3, 4)
    core.open(override_stat=True)
    core.write("f", b"", caller=USER)
    core.mkdir("d", 0o700, USER)
    finish(core.fs.mknod(1, b"null", stat.S_IFCHR | 0o666, os.makedev(1, 3), 0, ROOT))
    core.change("f", uid=8)
    core.change("f", mode=0o4711)
    core.change("low", gid=9)
    for _ in range(2):
        assert core.stat("f")[1] == stat.S_IFREG | 0o4711
        assert core.stat("f")[3:5] == (8, 1235)
        assert core.stat("d")[3:5] == (1234, 1235) and core.stat("d").mode == stat.S_IFDIR | 0o700
        assert core.stat("low")[3:5] == (3, 9)
        assert core.stat("null").mode == stat.S_IFCHR | 0o666
        assert core.stat("null").rdev == os.makedev(1, 3)
        core.open()
    assert {(core.upper / n).stat().st_uid for n in ("f", "d", "low")} == {os.geteuid()}
    assert os.getxattr(core.upper / "f", OVERRIDE_STAT) == b"8:1235:4711"
    assert core.fs.listxattr(core.node("f"), ROOT) == []
    fails(errno.ENODATA, core.fs.getxattr, core.node("f"), OVERRIDE_STAT, ROOT)


def test_overlay_xattrs_stay_hidden(core: Core) -> None:
    (core.lower / "d").mkdir()
    core.mkdir("d/x")
    node = core.node("d")
    fs = core.fs
    assert fs.listxattr(node, ROOT) == []
    fails(errno.ENODATA, fs.getxattr, node, b"trusted.overlay.origin", ROOT)
    fs.setxattr(node, b"trusted.overlay.opaque", b"y", 0, ROOT)
    fs.setxattr(node, b"trusted.t", b"1", os.XATTR_CREATE, ROOT)
    fails(errno.EEXIST, fs.setxattr, node, b"trusted.t", b"1", os.XATTR_CREATE, ROOT)
    assert sorted(fs.listxattr(node, ROOT)) == [b"trusted.overlay.opaque", b"trusted.t"]
    assert fs.listxattr(node, USER) == []
    assert os.getxattr(core.upper / "d", "trusted.overlay.overlay.opaque") == b"y"
    assert core.list("d") == ["x"]
    fs.removexattr(node, b"trusted.t", ROOT)
    fails(errno.ENODATA, fs.removexattr, node, b"trusted.t", ROOT)


def test_userxattr_writes_the_other_namespace(disk: Core) -> None:
    (disk.lower / "d").mkdir()
    (disk.lower / "d/f").write_text("1")
    disk.open(userxattr=True)
    disk.rename("d", "e")
    disk.write("e/f", b"2")
    assert os.getxattr(disk.upper / "e", "user.overlay.redirect") == b"d"
    assert os.getxattr(disk.upper / "e/f", "user.overlay.origin")
    disk.open()
    assert disk.list("e") == ["f"] and disk.read("e/f") == b"2"


@pytest.fixture
def secret(core: Core) -> Core:
    """/shadow and /private are root's alone; the server's user is 4000:4001."""
    for name, mode in (("shadow", 0o640), ("open", 0o644), ("group", 0o640)):
        (core.lower / name).write_text(name)
        (core.lower / name).chmod(mode)
    os.chown(core.lower / "group", 0, 4002)
    (core.lower / "private").mkdir(mode=0o700)
    (core.lower / "private/key").write_text("key")
    (core.lower / "private/key").chmod(0o644)
    core.open(secrets=(4000, 4001, 4002))
    return core


def every_file(path: Path) -> bytes:
    return b"".join(p.read_bytes() for p in path.rglob("*") if p.is_file())


def test_secrets_are_not_read(secret: Core) -> None:
    assert secret.read("open") == b"open" and secret.read("group") == b"group"
    fails(errno.EACCES, secret.read, "shadow")
    assert secret.list("private") == [] and not secret.exists("private/key")


def test_secrets_stay_unreadable_through_every_change(secret: Core) -> None:
    secret.change("shadow", mode=0o644)
    secret.link("shadow", "linked")
    secret.rename("shadow", "moved")
    for _ in range(2):
        for name in ("linked", "moved"):
            fails(errno.EACCES, secret.read, name)
            fails(errno.EACCES, secret.fs.open, secret.node(name), os.O_RDWR, ROOT)
        secret.open()
    assert b"shadow" not in every_file(secret.upper) + every_file(secret.work)
    secret.write("moved", b"new", os.O_TRUNC)
    assert secret.read("moved") == b"new" == secret.read("linked")
    secret.unlink("linked")


def test_secret_directories_are_used_as_empty_ones(secret: Core) -> None:
    secret.write("private/mine", b"mine")
    secret.change("private", mode=0o755)
    for _ in range(2):
        assert secret.list("private") == ["mine"]
        assert not secret.exists("private/key")
        secret.open()
    secret.rename("private", "elsewhere")
    assert secret.list("elsewhere") == ["mine"] and not secret.exists("private")
    secret.open(secrets=None)
    assert secret.list("elsewhere") == ["mine"]


def test_an_empty_looking_secret_directory_can_be_removed(secret: Core) -> None:
    secret.rmdir("private")
    assert not secret.exists("private")
    secret.mkdir("private")
    assert secret.list("private") == []


def test_secrets_of_acls(secret: Core) -> None:
    path = secret.lower / "shadow"
    nobody = 0xFFFFFFFF
    os.setxattr(
        path, ACL_ACCESS,
        pack_acl([(1, 6, nobody), (2, 4, 4000), (4, 0, nobody), (0x10, 4, nobody), (0x20, 0, nobody)]),
    )  # fmt: skip
    secret.open()
    assert secret.read("shadow") == b"shadow"
    os.setxattr(
        path, ACL_ACCESS,
        pack_acl([(1, 6, nobody), (2, 0, 4000), (4, 4, nobody), (0x10, 4, nobody), (0x20, 4, nobody)]),
    )  # fmt: skip
    secret.open()
    fails(errno.EACCES, secret.read, "shadow")
