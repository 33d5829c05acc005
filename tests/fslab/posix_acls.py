"""POSIX checks: ACLs."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

from tests.fslab.fslab_lab import ALICE, BOB, acting_as
from tests.fslab.posix_place import ACCESS, DEFAULT, NO_ID, Place, acl, check, fails, simple_acl


@check
def acl_grants_and_masks(p: Place) -> Iterator[None]:
    p.write("f", mode=0o600)
    os.setxattr(p / "f", ACCESS, simple_acl(ALICE[0], 6))
    p.write("g", mode=0o600)
    os.setxattr(p / "g", ACCESS, simple_acl(ALICE[0], 6, mask=4))
    yield
    with acting_as(ALICE):
        os.close(os.open(p / "f", os.O_RDWR))
        os.close(os.open(p / "g", os.O_RDONLY))
        fails("EACCES", os.open, p / "g", os.O_WRONLY)
    with acting_as(BOB):
        fails("EACCES", os.open, p / "f", os.O_RDONLY)
    assert p.mode("g") == 0o640


@check
def acl_set_changes_mode(p: Place) -> Iterator[None]:
    p.write("f", mode=0o600)
    p.write("g", mode=0o600)
    yield
    os.setxattr(p / "f", ACCESS, simple_acl(ALICE[0], 4, mask=5, own=7))
    assert p.mode("f") == 0o750
    os.setxattr(p / "g", ACCESS, acl((1, 6, NO_ID), (4, 4, NO_ID), (32, 1, NO_ID)))
    assert p.mode("g") == 0o641  # an ACL that a mode says completely is none
    fails("ENODATA", os.getxattr, p / "g", ACCESS)


@check
def acl_chmod_changes_mask(p: Place) -> Iterator[None]:
    p.write("f", mode=0o600)
    os.setxattr(p / "f", ACCESS, simple_acl(ALICE[0], 6))
    yield
    os.chmod(p / "f", 0o640)
    got = os.getxattr(p / "f", ACCESS)
    assert got == simple_acl(ALICE[0], 6, mask=4)
    with acting_as(ALICE):
        fails("EACCES", os.open, p / "f", os.O_WRONLY)


@check
def acl_survives_copy_up(p: Place) -> Iterator[None]:
    p.write("f", mode=0o600)
    os.setxattr(p / "f", ACCESS, simple_acl(ALICE[0], 6))
    p.mkdir("d")
    os.setxattr(p / "d", DEFAULT, simple_acl(ALICE[0], 5))
    yield
    with open(p / "f", "ab") as file:
        file.write(b"!")
    p.write("d/x")
    os.chown(p / "f", 3, 3)
    assert os.getxattr(p / "f", ACCESS) == simple_acl(ALICE[0], 6)
    assert os.getxattr(p / "d", DEFAULT) == simple_acl(ALICE[0], 5)


@check
def acl_default_is_inherited(p: Place) -> Iterator[None]:
    p.mkdir("d")
    os.setxattr(p / "d", DEFAULT, simple_acl(ALICE[0], 6, own=7, other=5))
    yield
    # the umask doesn't count where there is a default ACL
    old = os.umask(0 if "umask" in p.lacks else 0o077)
    try:
        os.close(os.open(p / "d/f", os.O_CREAT | os.O_WRONLY, 0o664))
        os.mkdir(p / "d/e", 0o777)
        os.mkfifo(p / "d/p", 0o666)
        os.symlink("x", p / "d/l")
    finally:
        os.umask(old)
    assert os.getxattr(p / "d/f", ACCESS) == simple_acl(ALICE[0], 6, mask=6, own=6, other=4)
    assert os.getxattr(p / "d/e", ACCESS) == simple_acl(ALICE[0], 6, mask=7, own=7, other=5)
    assert os.getxattr(p / "d/e", DEFAULT) == simple_acl(ALICE[0], 6, own=7, other=5)
    assert p.mode("d/f") == 0o664
    assert p.mode("d/p") == 0o664
    fails("ENODATA", os.getxattr, p / "d/f", DEFAULT)
    assert p.mode("d/l") == 0o777


@check
def acl_removed(p: Place) -> Iterator[None]:
    p.write("f", mode=0o600)
    os.setxattr(p / "f", ACCESS, simple_acl(ALICE[0], 6))
    p.mkdir("d")
    os.setxattr(p / "d", DEFAULT, simple_acl(ALICE[0], 6))
    yield
    os.removexattr(p / "f", ACCESS)
    os.removexattr(p / "d", DEFAULT)
    with acting_as(ALICE):
        fails("EACCES", os.open, p / "f", os.O_RDONLY)
    os.close(os.open(p / "d/f", os.O_CREAT | os.O_WRONLY))
    fails("ENODATA", os.getxattr, p / "d/f", ACCESS)


@check
def acl_errors(p: Place) -> Iterator[None]:
    p.write("f")
    yield
    fails("EACCES", os.setxattr, p / "f", DEFAULT, simple_acl(1, 6))
    fails("EINVAL", os.setxattr, p / "f", ACCESS, struct.pack("<I", 2) + b"abc")
    fails("EINVAL", os.setxattr, p / "f", ACCESS, acl((1, 6, NO_ID)))
    with acting_as(ALICE):
        fails("EPERM", os.setxattr, p / "f", ACCESS, simple_acl(1, 6))
