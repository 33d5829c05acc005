"""POSIX checks: extended attributes."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator

from tests.fslab.fslab_lab import ALICE, acting_as, error_of
from tests.fslab.posix_place import _LIBC, Place, check, fails


@check
def xattr_all_calls(p: Place) -> Iterator[None]:
    p.write("f")
    os.setxattr(p / "f", "user.old", b"1")
    yield
    os.setxattr(p / "f", "user.a", b"value\0x")
    os.setxattr(p / "f", "user.empty", b"")
    assert os.getxattr(p / "f", "user.a") == b"value\0x"
    assert os.getxattr(p / "f", "user.empty") == b""
    assert sorted(os.listxattr(p / "f")) == ["user.a", "user.empty", "user.old"]
    os.removexattr(p / "f", "user.old")
    fails("ENODATA", os.getxattr, p / "f", "user.old")
    fails("ENODATA", os.removexattr, p / "f", "user.old")
    fails("EEXIST", os.setxattr, p / "f", "user.a", b"", os.XATTR_CREATE)
    fails("ENODATA", os.setxattr, p / "f", "user.b", b"", os.XATTR_REPLACE)
    os.setxattr(p / "f", "user.a", b"2", os.XATTR_REPLACE)
    assert os.getxattr(p / "f", "user.a") == b"2"


@check
def xattr_namespaces(p: Place) -> Iterator[None]:
    p.write("f")
    os.setxattr(p / "f", "trusted.t", b"1")
    os.setxattr(p / "f", "security.s", b"2")
    yield
    os.setxattr(p / "f", "trusted.u", b"3")
    assert sorted(os.listxattr(p / "f")) == ["security.s", "trusted.t", "trusted.u"]
    with acting_as(ALICE):
        assert os.listxattr(p / "f") in (["security.s"], [])
        assert error_of(os.getxattr, p / "f", "trusted.t") in ("ENODATA", "EPERM")
        fails("EPERM", os.setxattr, p / "f", "trusted.t", b"9")
    fails("EOPNOTSUPP", os.setxattr, p / "f", "nonsense.x", b"1")
    fails("EOPNOTSUPP", os.getxattr, p / "f", "nonsense.x")


@check
def xattr_permission(p: Place) -> Iterator[None]:
    p.write("f", mode=0o644)
    p.write("g", mode=0o600)
    os.setxattr(p / "f", "user.a", b"1")
    os.setxattr(p / "g", "user.a", b"1")
    yield
    with acting_as(ALICE):
        assert os.getxattr(p / "f", "user.a") == b"1"
        fails("EACCES", os.setxattr, p / "f", "user.a", b"2")
        fails("EACCES", os.getxattr, p / "g", "user.a")


@check
def xattr_only_on_files_and_directories(p: Place) -> Iterator[None]:
    os.mkfifo(p / "p")
    os.symlink("x", p / "l")
    p.mkdir("d")
    yield
    fails("EPERM", os.setxattr, p / "p", "user.a", b"1")
    fails("EPERM", os.setxattr, p / "l", "user.a", b"1", follow_symlinks=False)
    os.setxattr(p / "l", "trusted.a", b"1", follow_symlinks=False)
    assert os.getxattr(p / "l", "trusted.a", follow_symlinks=False) == b"1"
    os.setxattr(p / "d", "user.a", b"1")
    os.setxattr(p / "p", "trusted.a", b"2")
    assert os.getxattr(p / "p", "trusted.a") == b"2"


@check
def xattr_sizes(p: Place) -> Iterator[None]:
    p.write("f")
    yield
    fails("E2BIG", os.setxattr, p / "f", "user.big", b"x" * 65_537)
    fails("ERANGE", os.setxattr, p / "f", "user." + "n" * 251, b"")
    os.setxattr(p / "f", "user." + "n" * 250, b"ok")
    os.setxattr(p / "f", "user.v", b"x" * 2000)
    assert len(os.getxattr(p / "f", "user.v")) == 2000
    value = ctypes.create_string_buffer(10)
    assert _LIBC.getxattr(os.fsencode(p / "f"), b"user.v", value, 10) == -1
    assert ctypes.get_errno() == errno.ERANGE
    assert _LIBC.getxattr(os.fsencode(p / "f"), b"user.v", None, 0) == 2000
    assert _LIBC.listxattr(os.fsencode(p / "f"), value, 10) == -1
    assert ctypes.get_errno() == errno.ERANGE


@check
def xattr_survive_copy_up_and_rename(p: Place) -> Iterator[None]:
    p.write("f")
    p.mkdir("d")
    for name in ("f", "d"):
        os.setxattr(p / name, "user.a", b"1")
        os.setxattr(p / name, "trusted.b", b"2")
    yield
    os.chmod(p / "f", 0o600)
    os.rename(p / "f", p / "g")
    p.write("d/x")
    for name in ("g", "d"):
        assert sorted(os.listxattr(p / name)) == ["trusted.b", "user.a"]


@check
def xattr_by_handle(p: Place) -> Iterator[None]:
    p.write("f")
    yield
    fd = p.open("f", os.O_RDONLY)
    os.setxattr(fd, "user.h", b"1")
    assert os.listxattr(fd) == ["user.h"]
    assert os.getxattr(p / "f", "user.h") == b"1"
    os.removexattr(fd, "user.h")
    assert os.listxattr(p / "f") == []


@check
def xattr_of_overlay_are_ours(p: Place) -> Iterator[None]:
    p.mkdir("d")
    p.write("d/f")
    yield
    os.chmod(p / "d/f", 0o600)
    os.chmod(p / "d", 0o700)
    for name in (".", "d", "d/f"):
        assert not [x for x in os.listxattr(p / name) if "overlay." in x]
