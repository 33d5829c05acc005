"""POSIX checks: attributes."""

from __future__ import annotations

import os
import stat
import struct
import time
from collections.abc import Iterator

from tests.fslab.fslab_lab import ALICE, BOB, acting_as
from tests.fslab.posix_place import _LIBC, OLD, Place, check, fails


@check
def chmod_of_all_kinds(p: Place) -> Iterator[None]:
    p.write("f", b"content")
    p.mkdir("d")
    p.write("d/inner")
    os.mkfifo(p / "p")
    yield
    for name, mode in (("f", 0o4751), ("d", 0o3700), ("p", 0o600)):
        os.chmod(p / name, mode)
        assert p.mode(name) == mode
    assert p.read("f") == b"content"
    assert p.ls("d") == ["inner"]


@check
def chmod_by_handle(p: Place) -> Iterator[None]:
    p.write("f")
    yield
    fd = p.open("f", os.O_RDONLY)
    os.fchmod(fd, 0o604)
    assert stat.S_IMODE(os.fstat(fd).st_mode) == p.mode("f") == 0o604


@check
def chmod_changes_ctime_only(p: Place) -> Iterator[None]:
    p.write("f")
    os.utime(p / "f", ns=(OLD, OLD))
    yield
    before = p.stat("f")
    time.sleep(0.02)
    os.chmod(p / "f", 0o600)
    now = p.stat("f")
    assert now.st_mtime_ns == OLD
    assert now.st_ctime_ns > before.st_ctime_ns


@check
def chmod_permission(p: Place) -> Iterator[None]:
    p.write("mine")
    os.chown(p / "mine", ALICE[0], ALICE[1])
    p.write("other")
    yield
    with acting_as(ALICE):
        os.chmod(p / "mine", 0o600)
        fails("EPERM", os.chmod, p / "other", 0o666)
    assert (p.mode("mine"), p.mode("other")) == (0o600, 0o644)


@check
def chmod_sgid_needs_the_group(p: Place) -> Iterator[None]:
    p.write("f")
    os.chown(p / "f", ALICE[0], 777)
    yield
    with acting_as(ALICE):
        os.chmod(p / "f", 0o2755)
    assert p.mode("f") == 0o755


@check
def chown_ids(p: Place) -> Iterator[None]:
    p.write("f")
    p.mkdir("d")
    yield
    os.chown(p / "f", 123, 456)
    os.chown(p / "d", 70_000, -1)
    now = p.stat("f")
    assert (now.st_uid, now.st_gid) == (123, 456)
    assert (p.stat("d").st_uid, p.stat("d").st_gid) == (70_000, 0)


@check
def chown_permission(p: Place) -> Iterator[None]:
    p.write("f")
    os.chown(p / "f", BOB[0], BOB[1])
    yield
    with acting_as(BOB):
        fails("EPERM", os.chown, p / "f", 0, -1)
        fails("EPERM", os.chown, p / "f", -1, 99)
        os.chown(p / "f", -1, 60003)
    assert p.stat("f").st_gid == 60003
    with acting_as(ALICE):
        fails("EPERM", os.chown, p / "f", ALICE[0], -1)


@check
def chown_clears_suid(p: Place) -> Iterator[None]:
    p.write("f", mode=0o6755)
    p.write("g", mode=0o2745)
    yield
    os.chown(p / "f", 5, 6)
    os.chown(p / "g", 5, 6)
    assert p.mode("f") == 0o755
    assert p.mode("g") == 0o2745  # without group execution the bit means locking and stays


@check
def write_clears_suid(p: Place) -> Iterator[None]:
    for name in ("f", "g"):
        p.write(name, b"0123", 0o6777)
    p.write("h", b"0123", 0o2767)
    yield
    with acting_as(ALICE):
        fd = os.open(p / "f", os.O_WRONLY)
        os.write(fd, b"x")
        os.close(fd)
        os.truncate(p / "g", 2)
        fd = os.open(p / "h", os.O_WRONLY)
        os.write(fd, b"x")
        os.close(fd)
    assert p.mode("f") == 0o777
    assert p.mode("g") == 0o777
    # since Linux 6.2 a write by somebody outside the group takes S_ISGID without S_IXGRP too
    assert p.mode("h") in (0o2767, 0o767)
    assert p.read("f") == b"x123"


@check
def truncating_open_clears_suid(p: Place) -> Iterator[None]:
    p.write("f", b"0123", 0o6777)
    yield
    with acting_as(ALICE):
        os.close(os.open(p / "f", os.O_WRONLY | os.O_TRUNC))
    assert p.mode("f") == 0o777
    assert p.stat("f").st_size == 0


@check
def root_write_keeps_suid(p: Place) -> Iterator[None]:
    p.write("f", b"0123", 0o4755)
    yield
    with open(p / "f", "r+b") as file:
        file.write(b"x")
    assert p.mode("f") == 0o4755


@check
def write_clears_capability(p: Place) -> Iterator[None]:
    value = struct.pack("<IIIII", 0x02000001, 0x400, 0, 0, 0)
    for name in ("f", "g", "h"):
        p.write(name, b"0123", 0o777)
        os.setxattr(p / name, "security.capability", value)
    yield
    assert os.getxattr(p / "f", "security.capability") == value
    with open(p / "f", "r+b") as file:
        file.write(b"x")
    fails("ENODATA", os.getxattr, p / "f", "security.capability")
    os.chown(p / "g", 3, 3)
    fails("ENODATA", os.getxattr, p / "g", "security.capability")
    os.truncate(p / "h", 1)
    fails("ENODATA", os.getxattr, p / "h", "security.capability")


@check
def capability_survives_copy_up(p: Place) -> Iterator[None]:
    value = struct.pack("<IIIII", 0x02000001, 0x400, 0, 0, 0)
    p.write("f", b"0123", 0o755)
    os.setxattr(p / "f", "security.capability", value)
    yield
    os.chmod(p / "f", 0o711)
    os.rename(p / "f", p / "g")
    assert os.getxattr(p / "g", "security.capability") == value


@check
def times_to_the_nanosecond(p: Place) -> Iterator[None]:
    p.write("f", b"content")
    p.mkdir("d")
    os.utime(p / "d", ns=(OLD, OLD + 3))
    yield
    assert p.stat("d").st_mtime_ns == OLD + 3
    os.utime(p / "f", ns=(OLD + 1, OLD + 2))
    now = p.stat("f")
    assert (now.st_atime_ns, now.st_mtime_ns) == (OLD + 1, OLD + 2)
    os.utime(p / "d", ns=(OLD + 7, OLD + 8))
    assert p.stat("d").st_atime_ns == OLD + 7


@check
def times_now_and_omit(p: Place) -> Iterator[None]:
    p.write("f")
    os.utime(p / "f", ns=(OLD, OLD))
    yield
    spec = struct.pack("qqqq", 0, 0x3FFFFFFE, 0, 0x3FFFFFFF)  # atime omitted, mtime now
    assert _LIBC.utimensat(-100, os.fsencode(p / "f"), spec, 0) == 0
    now = p.stat("f")
    assert now.st_atime_ns == OLD
    assert abs(now.st_mtime_ns - time.time_ns()) < 100 * 10**9


@check
def times_permission(p: Place) -> Iterator[None]:
    p.write("f", mode=0o666)
    p.write("g", mode=0o644)
    yield
    with acting_as(ALICE):
        os.utime(p / "f")
        fails("EPERM", os.utime, p / "f", ns=(OLD, OLD))
        fails("EACCES", os.utime, p / "g")


@check
def times_survive_copy_up(p: Place) -> Iterator[None]:
    p.write("f", b"x")
    os.utime(p / "f", ns=(OLD + 1, OLD + 2))
    yield
    os.chmod(p / "f", 0o600)
    now = p.stat("f")
    assert now.st_mtime_ns == OLD + 2


@check
def times_change_on_write(p: Place) -> Iterator[None]:
    p.write("f", b"x")
    os.utime(p / "f", ns=(OLD, OLD))
    yield
    fd = p.open("f", os.O_WRONLY)
    assert p.stat("f").st_mtime_ns == OLD
    os.write(fd, b"yy")
    assert p.stat("f").st_mtime_ns > OLD
    assert os.fstat(fd).st_ctime_ns > OLD


@check
def times_set_while_open_for_writing(p: Place) -> Iterator[None]:
    p.write("f", b"x")
    yield
    fd = p.open("f", os.O_WRONLY)
    os.write(fd, b"yy")
    os.utime(fd, ns=(OLD, OLD + 5))
    os.close(fd)
    p.fds.clear()
    assert p.stat("f").st_mtime_ns == OLD + 5


@check
def times_before_1970_and_after_2038(p: Place) -> Iterator[None]:
    p.write("f")
    yield
    for seconds in (-1000, 2**32 + 5):
        os.utime(p / "f", ns=(seconds * 10**9 + 1, seconds * 10**9 + 2))
        assert p.stat("f").st_mtime_ns == seconds * 10**9 + 2


@check
def truncate_longer_and_shorter(p: Place) -> Iterator[None]:
    p.write("f", b"abcdef")
    yield
    os.truncate(p / "f", 3)
    assert p.read("f") == b"abc"
    os.truncate(p / "f", 6)
    assert p.read("f") == b"abc\0\0\0"
    os.truncate(p / "f", 1 << 40)
    assert p.stat("f").st_size == 1 << 40
    os.truncate(p / "f", 0)
    assert p.stat("f").st_size == 0


@check
def truncate_by_handle(p: Place) -> Iterator[None]:
    p.write("f", b"abcdef")
    yield
    fd = p.open("f", os.O_RDWR)
    os.ftruncate(fd, 2)
    assert os.fstat(fd).st_size == 2
    assert os.pread(fd, 10, 0) == b"ab"
    os.ftruncate(fd, 4)
    assert os.pread(fd, 10, 0) == b"ab\0\0"
    reader = p.open("f", os.O_RDONLY)
    fails("EINVAL", os.ftruncate, reader, 0)


@check
def truncate_errors(p: Place) -> Iterator[None]:
    p.write("f")
    p.mkdir("d")
    yield
    fails("EISDIR", os.truncate, p / "d", 0)
    fails("ENOENT", os.truncate, p / "x", 0)
    fails("EINVAL", os.truncate, p / "f", -1)
    with acting_as(ALICE):
        fails("EACCES", os.truncate, p / "f", 0)
    assert p.read("f") == b"data"


@check
def truncate_same_size_keeps_content(p: Place) -> Iterator[None]:
    p.write("f", b"abcdef")
    os.utime(p / "f", ns=(OLD, OLD))
    yield
    os.truncate(p / "f", 6)
    assert p.read("f") == b"abcdef"


@check
def truncated_tail_reads_zeros_again(p: Place) -> Iterator[None]:
    p.write("f", b"#" * 10_000)
    yield
    fd = p.open("f", os.O_RDWR)
    os.pread(fd, 10_000, 0)
    os.ftruncate(fd, 5000)
    os.ftruncate(fd, 10_000)
    assert os.pread(fd, 10_000, 0) == b"#" * 5000 + b"\0" * 5000


@check
def stat_fields(p: Place) -> Iterator[None]:
    p.write("f", b"x" * 5000)
    yield
    now = p.stat("f")
    assert (now.st_nlink, now.st_size, now.st_uid, now.st_gid) == (1, 5000, 0, 0)
    assert now.st_blksize >= 512
    assert now.st_dev == p.stat(".").st_dev
    assert os.stat(p / "f").st_ino == now.st_ino


@check
def stat_blocks_of_sparse_file(p: Place) -> Iterator[None]:
    with open(p / "f", "wb") as file:
        file.truncate(10 << 20)
        file.seek(5 << 20)
        file.write(b"x" * 4096)
    yield
    os.chmod(p / "f", 0o600)
    assert p.stat("f").st_size == 10 << 20
    assert p.stat("f").st_blocks * 512 < 2 << 20  # the holes are still holes


@check
def inode_is_stable_over_copy_up(p: Place) -> Iterator[None]:
    p.write("f")
    p.mkdir("d")
    os.symlink("x", p / "l")
    yield
    before = [p.stat(name).st_ino for name in ("f", "d", "l")]
    os.chmod(p / "f", 0o600)
    os.chmod(p / "d", 0o700)
    os.chown(p / "l", 1, 1, follow_symlinks=False)
    assert [p.stat(name).st_ino for name in ("f", "d", "l")] == before
    with os.scandir(p / ".") as entries:
        assert {e.name: e.inode() for e in entries} == dict(
            zip(("f", "d", "l"), before, strict=True)
        )


@check
def inodes_are_unique(p: Place) -> Iterator[None]:
    for number in range(30):
        p.write(f"a{number}")
    yield
    for number in range(30):
        p.write(f"b{number}")
    inodes = {p.stat(name).st_ino for name in p.ls()}
    assert len(inodes) == 60
    assert len({p.stat(name).st_dev for name in p.ls()}) == 1


@check
def statfs_numbers(p: Place) -> Iterator[None]:
    yield
    now = os.statvfs(p / ".")
    assert now.f_namemax == 255
    assert now.f_blocks >= now.f_bfree >= 0
    assert now.f_bsize >= 512
