"""POSIX as ext4 has it: small checks that run in any directory.

A check is a generator over a `Place`. What it does before its first `yield` prepares objects: on a
union that happens in the lower layer, so that what follows the `yield` has to copy up; in a second
run it happens in merged itself. What a transport has no word for stands in `place.lacks`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.fslab.fslab_lab import ALICE, BOB, acting_as, child_result, error_of, in_child

_LIBC = ctypes.CDLL(None, use_errno=True)
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE = 1, 2, 8, 16
OLD = 1_000_000_000_123_456_789  # a time long ago, with nanoseconds


@dataclass
class Place:
    """The directory that a check works in."""

    root: Path
    lacks: frozenset[str] = frozenset()
    union: bool = False  # merged of a union (of either engine)
    fds: list[int] = field(default_factory=list)

    def __truediv__(self, name: str) -> str:
        return f"{self.root}/{name}"

    def write(self, name: str, data: bytes = b"data", mode: int = 0o644) -> str:
        path = self / name
        fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode)
        os.write(fd, data)
        os.fchmod(fd, mode)
        os.close(fd)
        return path

    def read(self, name: str) -> bytes:
        with open(self / name, "rb") as file:
            return file.read()

    def mkdir(self, name: str, mode: int = 0o755) -> str:
        os.mkdir(self / name)
        os.chmod(self / name, mode)
        return self / name

    def open(self, name: str, flags: int, mode: int = 0o644) -> int:
        fd = os.open(self / name, flags, mode)
        self.fds.append(fd)
        return fd

    def close_all(self) -> None:
        for fd in self.fds:
            try:
                os.close(fd)
            except OSError:
                pass
        self.fds.clear()

    def stat(self, name: str) -> os.stat_result:
        return os.lstat(self / name)

    def mode(self, name: str) -> int:
        return stat.S_IMODE(self.stat(name).st_mode)

    def ls(self, name: str = ".") -> list[str]:
        return sorted(os.listdir(self / name))


Check = Callable[[Place], Iterator[None]]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Register a check under its function's name."""
    assert function.__name__ not in CHECKS
    CHECKS[function.__name__] = function
    return function


def fails(name: str, function: Callable[..., object], *arguments: object, **kw: object) -> None:
    """The call fails with this errno."""
    got = error_of(function, *arguments, **kw)
    assert got == name, f"{getattr(function, '__name__', function)}{arguments}: {got}, not {name}"


def rename2(old: str, new: str, flags: int) -> None:
    if _LIBC.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), old, None, new)


def link_handle(fd: int, new: str) -> None:
    """linkat(2) of /proc/self/fd/N, followed: os.link doesn't follow."""
    if _LIBC.linkat(-100, b"/proc/self/fd/%d" % fd, -100, os.fsencode(new), 0x400):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), new)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _LIBC.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def acl(*entries: tuple[int, int, int]) -> bytes:
    """The xattr of an ACL from (tag, permissions, id): tags 1 user-obj, 2 user, 4 group-obj,
    8 group, 16 mask, 32 other."""
    rows = sorted(entries, key=lambda e: (e[0], e[2]))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *row) for row in rows)


NO_ID = 0xFFFFFFFF
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


def simple_acl(user: int, permissions: int, mask: int = 7, own: int = 6, other: int = 0) -> bytes:
    return acl(
        (1, own, NO_ID), (2, permissions, user), (4, 4, NO_ID), (16, mask, NO_ID), (32, other, NO_ID)
    )  # fmt: skip


# -- open and create ------------------------------------------------------------------------------


@check
def create_read_back(p: Place) -> Iterator[None]:
    yield
    p.write("f", b"hello")
    assert p.read("f") == b"hello"
    assert p.stat("f").st_size == 5


@check
def create_exclusive(p: Place) -> Iterator[None]:
    p.write("f")
    yield
    fails("EEXIST", os.open, p / "f", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    p.open("new", os.O_CREAT | os.O_EXCL | os.O_WRONLY)


@check
def create_exclusive_on_symlink(p: Place) -> Iterator[None]:
    os.symlink("nowhere", p / "l")
    yield
    fails("EEXIST", os.open, p / "l", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    fails("ENOENT", os.stat, p / "l")


@check
def create_through_dangling_symlink(p: Place) -> Iterator[None]:
    os.symlink("target", p / "l")
    yield
    os.close(os.open(p / "l", os.O_CREAT | os.O_WRONLY))
    assert p.ls() == ["l", "target"]


@check
def open_missing(p: Place) -> Iterator[None]:
    yield
    fails("ENOENT", os.open, p / "f", os.O_RDONLY)
    fails("ENOENT", os.open, p / "f", os.O_RDWR)
    fails("ENOENT", os.open, p / "d/f", os.O_CREAT | os.O_RDWR)


@check
def open_truncates(p: Place) -> Iterator[None]:
    p.write("f", b"long content")
    yield
    os.close(os.open(p / "f", os.O_WRONLY | os.O_TRUNC))
    assert p.stat("f").st_size == 0
    assert p.read("f") == b""


@check
def open_truncates_read_only_handle(p: Place) -> Iterator[None]:
    p.write("f", b"long content")
    yield
    os.close(os.open(p / "f", os.O_RDONLY | os.O_TRUNC))
    assert p.stat("f").st_size == 0


@check
def open_truncate_sets_times(p: Place) -> Iterator[None]:
    os.utime(p.write("f", b"x"), ns=(OLD, OLD))
    yield
    os.close(os.open(p / "f", os.O_WRONLY | os.O_TRUNC))
    assert p.stat("f").st_mtime_ns > OLD


@check
def open_directory_flags(p: Place) -> Iterator[None]:
    p.mkdir("d")
    p.write("f")
    yield
    fails("EISDIR", os.open, p / "d", os.O_WRONLY)
    fails("EISDIR", os.open, p / "d", os.O_RDWR)
    fails("ENOTDIR", os.open, p / "f", os.O_RDONLY | os.O_DIRECTORY)
    fails("ENOTDIR", os.open, p / "f/x", os.O_RDONLY)
    p.open("d", os.O_RDONLY | os.O_DIRECTORY)


@check
def open_create_on_directory(p: Place) -> Iterator[None]:
    p.mkdir("d")
    yield
    fails("EISDIR", os.open, p / "d", os.O_CREAT | os.O_WRONLY)
    fails("EEXIST", os.open, p / "d", os.O_CREAT | os.O_EXCL | os.O_WRONLY)


@check
def open_nofollow(p: Place) -> Iterator[None]:
    p.write("f")
    os.symlink("f", p / "l")
    yield
    fails("ELOOP", os.open, p / "l", os.O_RDONLY | os.O_NOFOLLOW)
    fd = p.open("l", os.O_PATH | os.O_NOFOLLOW)
    assert stat.S_ISLNK(os.fstat(fd).st_mode)
    assert os.readlink("", dir_fd=fd) == "f"


@check
def open_path_handle(p: Place) -> Iterator[None]:
    p.write("f")
    yield
    fd = p.open("f", os.O_PATH)
    fails("EBADF", os.read, fd, 1)
    assert os.fstat(fd).st_size == 4
    os.chmod(p / "f", 0o600)
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600


@check
def read_only_handle_refuses_write(p: Place) -> Iterator[None]:
    p.write("f")
    yield
    fd = p.open("f", os.O_RDONLY)
    fails("EBADF", os.write, fd, b"x")
    fd = p.open("f", os.O_WRONLY)
    fails("EBADF", os.read, fd, 1)


@check
def append_goes_to_the_end(p: Place) -> Iterator[None]:
    p.write("f", b"12345")
    yield
    fd = p.open("f", os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"6")
    os.lseek(fd, 0, os.SEEK_SET)
    os.write(fd, b"7")
    assert p.read("f") == b"1234567"


@check
def append_of_two_handles(p: Place) -> Iterator[None]:
    p.write("f", b"")
    yield
    one, two = (p.open("f", os.O_WRONLY | os.O_APPEND) for _ in range(2))
    for number in range(50):
        os.write(one if number % 2 else two, b"%02d" % number)
    assert p.read("f") == b"".join(b"%02d" % n for n in range(50))


@check
def append_read_write_handle(p: Place) -> Iterator[None]:
    p.write("f", b"abc")
    yield
    fd = p.open("f", os.O_RDWR | os.O_APPEND)
    os.write(fd, b"def")
    assert os.pread(fd, 10, 0) == b"abcdef"


@check
def append_after_truncate(p: Place) -> Iterator[None]:
    p.write("f", b"abcdefgh")
    yield
    fd = p.open("f", os.O_WRONLY | os.O_APPEND)
    os.truncate(p / "f", 2)
    os.write(fd, b"X")
    assert p.read("f") == b"abX"


@check
def write_then_read_same_handle(p: Place) -> Iterator[None]:
    p.write("f", b"0123456789")
    yield
    fd = p.open("f", os.O_RDWR)
    assert os.read(fd, 3) == b"012"
    os.write(fd, b"ABC")
    assert os.read(fd, 10) == b"6789"
    assert os.pread(fd, 20, 0) == b"012ABC6789"


@check
def reader_before_copy_up_sees_writer(p: Place) -> Iterator[None]:
    p.write("f", b"old old old")
    yield
    reader = p.open("f", os.O_RDONLY)
    assert os.pread(reader, 3, 0) == b"old"
    writer = p.open("f", os.O_WRONLY)
    os.pwrite(writer, b"new", 0)
    later = p.open("f", os.O_RDONLY)
    assert os.pread(later, 11, 0) == b"new old old"
    # overlayfs leaves the first reader on the lower file; POSIX wants "new". Never anything else.
    assert os.pread(reader, 11, 0) in (b"new old old", b"old old old")


@check
def sparse_write_reads_zeros(p: Place) -> Iterator[None]:
    p.write("f", b"a")
    yield
    fd = p.open("f", os.O_RDWR)
    os.pwrite(fd, b"z", 100_000)
    assert os.pread(fd, 3, 50_000) == b"\0\0\0"
    assert os.fstat(fd).st_size == 100_001


@check
def large_write_and_read(p: Place) -> Iterator[None]:
    yield
    data = os.urandom(3_000_001)
    p.write("f", data)
    assert p.read("f") == data


@check
def unaligned_overwrites(p: Place) -> Iterator[None]:
    p.write("f", bytes(range(256)) * 100)
    yield
    expected = bytearray(bytes(range(256)) * 100)
    fd = p.open("f", os.O_RDWR)
    for offset, length in ((1, 5000), (4095, 2), (8191, 4097), (20_000, 9000), (25_599, 3)):
        os.pwrite(fd, b"#" * length, offset)
        expected[offset : offset + length] = b"#" * length
    assert os.pread(fd, 100_000, 0) == bytes(expected)
    assert p.read("f") == bytes(expected)


@check
def vectored_io(p: Place) -> Iterator[None]:
    yield
    fd = p.open("f", os.O_RDWR | os.O_CREAT)
    assert os.writev(fd, [b"ab", b"", b"cde"]) == 5
    buffers = [bytearray(1), bytearray(10)]
    assert os.preadv(fd, buffers, 0) == 5
    assert bytes(buffers[0]) + bytes(buffers[1][:4]) == b"abcde"


@check
def direct_io(p: Place) -> Iterator[None]:
    p.write("f", b"A" * 8192)
    yield
    import mmap

    buffer = mmap.mmap(-1, 4096)
    buffer.write(b"B" * 4096)
    fd = p.open("f", os.O_RDWR | os.O_DIRECT)
    assert os.pwritev(fd, [buffer], 4096) == 4096
    target = mmap.mmap(-1, 8192)
    assert os.preadv(fd, [target], 0) == 8192
    assert target[:] == b"A" * 4096 + b"B" * 4096
    assert p.read("f") == b"A" * 4096 + b"B" * 4096


@check
def direct_and_buffered_agree(p: Place) -> Iterator[None]:
    yield
    import mmap

    buffered = p.open("f", os.O_RDWR | os.O_CREAT)
    os.write(buffered, b"1" * 4096)
    direct = p.open("f", os.O_RDWR | os.O_DIRECT)
    buffer = mmap.mmap(-1, 4096)
    assert os.preadv(direct, [buffer], 0) == 4096
    assert buffer[:] == b"1" * 4096
    buffer[:] = b"2" * 4096
    os.pwritev(direct, [buffer], 0)
    assert os.pread(buffered, 4096, 0) == b"2" * 4096


@check
def synchronous_writes(p: Place) -> Iterator[None]:
    p.write("f")
    yield
    for flag in (os.O_SYNC, os.O_DSYNC):
        fd = p.open("f", os.O_WRONLY | flag)
        os.write(fd, b"sync")
        os.fsync(fd)
        os.fdatasync(fd)
    assert p.read("f") == b"sync"


@check
def fsync_of_a_directory(p: Place) -> Iterator[None]:
    p.mkdir("d")
    yield
    fd = p.open("d", os.O_RDONLY)
    os.fsync(fd)
    p.write("d/f")
    os.fsync(fd)
    _LIBC.syncfs(fd)


@check
def tmpfile_lives_and_links(p: Place) -> Iterator[None]:
    p.mkdir("d")
    yield
    if "tmpfile" in p.lacks:
        assert error_of(os.open, p / "d", os.O_TMPFILE | os.O_RDWR) in ("EOPNOTSUPP", "EISDIR")
        return
    fd = p.open("d", os.O_TMPFILE | os.O_RDWR, 0o640)
    os.write(fd, b"hidden")
    assert p.ls("d") == []
    assert os.fstat(fd).st_nlink == 0
    link_handle(fd, p / "d/shown")
    assert p.read("d/shown") == b"hidden"
    assert os.fstat(fd).st_nlink == 1
    assert p.stat("d/shown").st_ino == os.fstat(fd).st_ino


@check
def tmpfile_exclusive_cannot_be_linked(p: Place) -> Iterator[None]:
    yield
    if "tmpfile" in p.lacks:
        return
    fd = p.open(".", os.O_TMPFILE | os.O_RDWR | os.O_EXCL)
    fails("ENOENT", link_handle, fd, p / "x")


@check
def tmpfile_changes(p: Place) -> Iterator[None]:
    yield
    if "tmpfile" in p.lacks:
        return
    fd = p.open(".", os.O_TMPFILE | os.O_RDWR, 0o600)
    os.fchmod(fd, 0o641)
    os.fchown(fd, 7, 8)
    os.ftruncate(fd, 100)
    os.utime(fd, ns=(OLD, OLD + 1))
    os.setxattr(fd, "user.a", b"b")
    now = os.fstat(fd)
    assert (now.st_mode & 0o7777, now.st_uid, now.st_gid, now.st_size) == (0o641, 7, 8, 100)
    assert now.st_mtime_ns == OLD + 1
    assert os.getxattr(fd, "user.a") == b"b"


# -- names -----------------------------------------------------------------------------------------


@check
def names_too_long(p: Place) -> Iterator[None]:
    yield
    p.write("n" * 255)
    long = "n" * 256
    fails("ENAMETOOLONG", os.open, p / long, os.O_CREAT | os.O_WRONLY)
    fails("ENAMETOOLONG", os.mkdir, p / long)
    fails("ENAMETOOLONG", os.stat, p / long)
    fails("ENAMETOOLONG", os.unlink, p / long)
    fails("ENAMETOOLONG", os.symlink, "x", p / long)
    fails("ENAMETOOLONG", os.rename, p / ("n" * 255), p / long)
    fails("ENAMETOOLONG", os.link, p / ("n" * 255), p / long)


@check
def names_of_any_bytes(p: Place) -> Iterator[None]:
    names = [b" ", b"\n", b"\xff\xfe", b"a:b,c=d", "ü€".encode(), b"-rf", b"*", b"\\x", b"..."]
    root = os.fsencode(p.root)
    for name in names[:5]:
        os.close(os.open(root + b"/" + name, os.O_CREAT | os.O_WRONLY))
    yield
    root = os.fsencode(p.root)
    for name in names[5:]:
        os.close(os.open(root + b"/" + name, os.O_CREAT | os.O_WRONLY))
    assert sorted(os.listdir(root)) == sorted(names)
    for name in names:
        os.unlink(root + b"/" + name)
    assert os.listdir(root) == []


@check
def names_like_overlay_prefixes(p: Place) -> Iterator[None]:
    p.write(".wh.x")
    p.write("x")
    yield
    p.write(".wh.y")
    assert p.ls() == [".wh.x", ".wh.y", "x"]
    os.unlink(p / "x")
    assert p.ls() == [".wh.x", ".wh.y"]
    os.unlink(p / ".wh.x")
    assert p.ls() == [".wh.y"]


@check
def longest_names_are_copied_up_and_removed(p: Place) -> Iterator[None]:
    for letter in "abc":
        p.write(letter * 255)
    p.mkdir("d" * 255)
    yield
    with open(p / ("a" * 255), "ab") as file:
        file.write(b"!")
    os.rename(p / ("a" * 255), p / ("e" * 255))
    os.unlink(p / ("b" * 255))
    os.chmod(p / ("d" * 255), 0o700)
    assert p.ls() == ["c" * 255, "d" * 255, "e" * 255]
    assert p.read("e" * 255) == b"data!"


@check
def symlink_loops(p: Place) -> Iterator[None]:
    os.symlink("b", p / "a")
    os.symlink("a", p / "b")
    yield
    fails("ELOOP", os.stat, p / "a")
    fails("ELOOP", os.open, p / "a", os.O_RDONLY)
    fails("ELOOP", os.listdir, p / "a/x")
    fails("ELOOP", os.truncate, p / "a", 0)
    fails("ELOOP", os.chmod, p / "b", 0o600)


@check
def symlink_chain(p: Place) -> Iterator[None]:
    p.write("target", b"end")
    last = "target"
    for number in range(39):
        os.symlink(last, p / f"l{number}")
        last = f"l{number}"
    yield
    assert p.read("l38") == b"end"


@check
def symlink_text(p: Place) -> Iterator[None]:
    os.symlink("a" * 4095, p / "long")
    os.symlink("../x//y/", p / "odd")
    yield
    assert os.readlink(p / "long") == "a" * 4095
    assert os.readlink(p / "odd") == "../x//y/"
    assert p.stat("odd").st_size == 8
    assert p.mode("odd") == 0o777
    fails("ENAMETOOLONG", os.symlink, "a" * 4096, p / "longer")
    fails("ENOENT", os.symlink, "", p / "empty")
    fails("EEXIST", os.symlink, "x", p / "odd")
    fails("EINVAL", os.readlink, p / ".")


@check
def symlink_owner_and_times(p: Place) -> Iterator[None]:
    os.symlink("x", p / "l")
    os.symlink("x", p / "m")
    yield
    os.chown(p / "l", 11, 12, follow_symlinks=False)
    os.utime(p / "m", ns=(OLD, OLD + 5), follow_symlinks=False)
    now = p.stat("l")
    assert (now.st_uid, now.st_gid, os.readlink(p / "l")) == (11, 12, "x")
    assert p.stat("m").st_mtime_ns == OLD + 5
    assert os.readlink(p / "m") == "x"


@check
def symlink_rename_and_link(p: Place) -> Iterator[None]:
    os.symlink("x", p / "l")
    yield
    os.link(p / "l", p / "m", follow_symlinks=False)
    assert p.stat("m").st_ino == p.stat("l").st_ino
    assert p.stat("l").st_nlink == 2
    os.rename(p / "l", p / "n")
    assert os.readlink(p / "n") == os.readlink(p / "m") == "x"


@check
def symlink_absolute_is_not_followed_by_the_server(p: Place) -> Iterator[None]:
    yield
    os.symlink(p / "target", p / "l")
    p.write("target", b"t")
    assert p.read("l") == b"t"
    os.chown(p / "l", 5, 6, follow_symlinks=False)
    assert p.stat("target").st_uid == 0
    fails("EPERM", os.setxattr, p / "l", "user.x", b"1", follow_symlinks=False)


@check
def dot_and_dotdot(p: Place) -> Iterator[None]:
    p.mkdir("d")
    yield
    assert p.stat("d/..").st_ino == p.stat(".").st_ino
    assert p.stat("d/.").st_ino == p.stat("d").st_ino
    fails("EEXIST", os.mkdir, p / "d/.")
    fails("EINVAL", os.rmdir, p / "d/.")
    fails("ENOTEMPTY", os.rmdir, p / "d/..")
    fails("EBUSY", os.rename, p / "d/.", p / "e")


# -- directories -------------------------------------------------------------------------------------


@check
def mkdir_and_rmdir(p: Place) -> Iterator[None]:
    p.mkdir("d")
    p.write("d/f")
    p.write("f")
    yield
    fails("EEXIST", os.mkdir, p / "d")
    fails("EEXIST", os.mkdir, p / "f")
    fails("ENOENT", os.mkdir, p / "x/y")
    fails("ENOTDIR", os.mkdir, p / "f/y")
    fails("ENOTEMPTY", os.rmdir, p / "d")
    fails("ENOTDIR", os.rmdir, p / "f")
    fails("ENOENT", os.rmdir, p / "x")
    fails("EISDIR", os.unlink, p / "d")
    os.unlink(p / "d/f")
    os.rmdir(p / "d")
    fails("ENOENT", os.stat, p / "d")


@check
def mkdir_after_rmdir_is_empty(p: Place) -> Iterator[None]:
    p.mkdir("d")
    p.write("d/f")
    p.mkdir("d/e")
    yield
    os.unlink(p / "d/f")
    os.rmdir(p / "d/e")
    os.rmdir(p / "d")
    os.mkdir(p / "d")
    assert p.ls("d") == []
    p.write("d/f", b"new")
    assert p.read("d/f") == b"new"


@check
def directory_in_place_of_file(p: Place) -> Iterator[None]:
    p.write("x")
    p.mkdir("y")
    yield
    os.unlink(p / "x")
    os.mkdir(p / "x")
    p.write("x/inner")
    os.rmdir(p / "y")
    p.write("y", b"file")
    assert p.ls("x") == ["inner"]
    assert p.read("y") == b"file"


@check
def directory_counts_links(p: Place) -> Iterator[None]:
    yield
    p.mkdir("d")
    p.mkdir("d/a")
    p.mkdir("d/b")
    assert p.stat("d").st_nlink in (1, 4)  # 1: "not counted", as overlayfs and btrfs say


@check
def directory_times_change(p: Place) -> Iterator[None]:
    p.mkdir("d")
    p.write("d/f")
    os.utime(p / "d", ns=(OLD, OLD))
    yield
    assert p.stat("d").st_mtime_ns == OLD
    os.unlink(p / "d/f")
    first = p.stat("d").st_mtime_ns
    assert first > OLD
    os.utime(p / "d", ns=(OLD, OLD))
    p.write("d/g")
    assert p.stat("d").st_mtime_ns > OLD


@check
def directory_times_survive_other_changes(p: Place) -> Iterator[None]:
    p.mkdir("d")
    p.write("d/f")
    os.utime(p / "d", ns=(OLD, OLD))
    yield
    with open(p / "d/f", "ab") as file:
        file.write(b"more")
    os.chmod(p / "d/f", 0o600)
    assert p.stat("d").st_mtime_ns == OLD  # a copy-up below is no change of the directory


@check
def removed_directory_by_handle(p: Place) -> Iterator[None]:
    p.mkdir("d")
    yield
    fd = p.open("d", os.O_RDONLY)
    os.rmdir(p / "d")
    assert os.listdir(fd) == []
    fails("ENOENT", os.open, "x", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
    fails("ENOENT", os.mkdir, "x", dir_fd=fd)
    assert stat.S_ISDIR(os.fstat(fd).st_mode)


@check
def deep_paths(p: Place) -> Iterator[None]:
    path = ""
    for number in range(40):
        path += f"d{number}/"
        p.mkdir(path)
    p.write(path + "f", b"deep")
    yield
    with open(p / (path + "f"), "ab") as file:
        file.write(b"er")
    assert p.read(path + "f") == b"deeper"
    p.write(path + "g")
    assert p.ls(path) == ["f", "g"]


@check
def listing_has_types_and_inodes(p: Place) -> Iterator[None]:
    p.write("f")
    p.mkdir("d")
    os.symlink("x", p / "l")
    os.mkfifo(p / "p")
    os.mknod(p / "c", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    yield
    p.write("g")
    with os.scandir(p / ".") as entries:
        for entry in entries:
            assert entry.inode() == entry.stat(follow_symlinks=False).st_ino, entry.name
            kinds = (entry.is_dir(follow_symlinks=False), entry.is_symlink())
            assert kinds == (entry.name == "d", entry.name == "l"), entry.name


def _raw_listing(path: str) -> list[tuple[int, int, int, bytes]]:
    """(ino, offset, type, name) of each entry by getdents64, one page after the other."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return _getdents(fd, 1 << 15, whole=True)
    finally:
        os.close(fd)


def _getdents(fd: int, size: int, whole: bool = False) -> list[tuple[int, int, int, bytes]]:
    number = {"x86_64": 217, "aarch64": 61}[os.uname().machine]
    buffer = ctypes.create_string_buffer(size)
    found = []
    while True:
        got = _LIBC.syscall(number, fd, buffer, size)
        if got < 0:
            raise OSError(ctypes.get_errno(), "getdents64")
        position = 0
        while position < got:
            ino, offset, length, kind = struct.unpack_from("<QqHB", buffer.raw, position)
            name = buffer.raw[position + 19 : position + length].split(b"\0", 1)[0]
            found.append((ino, offset, kind, name))
            position += length
        if not whole or got == 0:
            return found


@check
def listing_dot_entries(p: Place) -> Iterator[None]:
    p.mkdir("d")
    yield
    inodes = {name: ino for ino, _, _, name in _raw_listing(p / "d")}
    assert set(inodes) == {b".", b".."}
    assert inodes[b"."] == p.stat("d").st_ino
    assert inodes[b".."] == p.stat(".").st_ino


@check
def listing_seekdir(p: Place) -> Iterator[None]:
    for number in range(60):
        p.write(f"lower{number}", b"")
    yield
    for number in range(60):
        p.write(f"upper{number}", b"")
    entries = _raw_listing(p / ".")
    assert len({name for *_, name in entries}) == len(entries) == 122
    fd = p.open(".", os.O_RDONLY | os.O_DIRECTORY)
    for index in (100, 3, 60, 0, 120):
        os.lseek(fd, entries[index][1], os.SEEK_SET)
        following = _getdents(fd, 1 << 15, whole=True)
        assert [e[3] for e in following] == [e[3] for e in entries[index + 1 :]], index
    os.lseek(fd, 0, os.SEEK_SET)
    assert [e[3] for e in _getdents(fd, 1 << 15, whole=True)] == [e[3] for e in entries]


@check
def listing_while_it_shrinks(p: Place) -> Iterator[None]:
    for number in range(400):
        p.write(f"f{number:03}", b"")
    yield
    fd = p.open(".", os.O_RDONLY | os.O_DIRECTORY)
    seen: list[bytes] = []
    while page := _getdents(fd, 2048):
        for *_, name in page:
            seen.append(name)
            if name not in (b".", b".."):
                os.unlink(os.fsencode(p.root) + b"/" + name)
    assert sorted(seen) == sorted([b".", b"..", *(b"f%03d" % n for n in range(400))])
    assert p.ls() == []


@check
def listing_while_it_grows(p: Place) -> Iterator[None]:
    for number in range(200):
        p.write(f"f{number:03}", b"")
    yield
    fd = p.open(".", os.O_RDONLY | os.O_DIRECTORY)
    seen: list[bytes] = []
    number = 0
    while page := _getdents(fd, 1024):
        seen += [name for *_, name in page]
        if number < 50:
            p.write(f"g{number}", b"")
            number += 1
    old = [name for name in seen if name.startswith(b"f")]
    assert sorted(old) == [b"f%03d" % n for n in range(200)]
    assert len(seen) == len(set(seen))


@check
def listing_rewound_sees_changes(p: Place) -> Iterator[None]:
    p.write("a")
    yield
    fd = p.open(".", os.O_RDONLY | os.O_DIRECTORY)
    assert {e[3] for e in _getdents(fd, 4096, whole=True)} == {b".", b"..", b"a"}
    p.write("b")
    os.unlink(p / "a")
    os.lseek(fd, 0, os.SEEK_SET)
    assert {e[3] for e in _getdents(fd, 4096, whole=True)} == {b".", b"..", b"b"}


@check
def listing_needs_read_permission(p: Place) -> Iterator[None]:
    p.mkdir("d", 0o711)
    p.write("d/f")
    yield
    with acting_as(ALICE):
        fails("EACCES", os.listdir, p / "d")
        assert p.stat("d/f").st_size == 4
    os.chmod(p / "d", 0o744)
    with acting_as(ALICE):
        assert os.listdir(p / "d") == ["f"]
        fails("EACCES", os.stat, p / "d/f")


# -- unlink, link ------------------------------------------------------------------------------------


@check
def unlink_and_create_again(p: Place) -> Iterator[None]:
    p.write("f", b"old", 0o600)
    yield
    os.unlink(p / "f")
    fails("ENOENT", os.stat, p / "f")
    fails("ENOENT", os.unlink, p / "f")
    assert p.ls() == []
    p.write("f", b"new", 0o644)
    assert p.read("f") == b"new"
    assert p.mode("f") == 0o644


@check
def unlinked_but_open(p: Place) -> Iterator[None]:
    p.write("f", b"alive")
    yield
    fd = p.open("f", os.O_RDWR)
    os.unlink(p / "f")
    assert os.pread(fd, 10, 0) == b"alive"
    os.pwrite(fd, b"A", 0)
    os.ftruncate(fd, 3)
    os.fchmod(fd, 0o600)
    os.utime(fd, ns=(OLD, OLD))
    now = os.fstat(fd)
    assert (now.st_size, now.st_nlink, now.st_mtime_ns, now.st_mode & 0o777) == (3, 0, OLD, 0o600)
    assert os.pread(fd, 10, 0) == b"Ali"
    p.write("f", b"other")
    assert os.pread(fd, 10, 0) == b"Ali"
    assert p.read("f") == b"other"


@check
def unlinked_but_open_for_reading(p: Place) -> Iterator[None]:
    p.write("f", b"alive")
    yield
    fd = p.open("f", os.O_RDONLY)
    os.unlink(p / "f")
    assert os.pread(fd, 10, 0) == b"alive"
    assert os.fstat(fd).st_nlink in (0, 1)  # overlayfs: the lower file's own
    os.fchmod(fd, 0o600)
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600


@check
def replaced_but_open(p: Place) -> Iterator[None]:
    p.write("old", b"old")
    p.write("new", b"new")
    yield
    fd = p.open("old", os.O_RDWR)
    os.rename(p / "new", p / "old")
    os.pwrite(fd, b"X", 0)
    assert os.pread(fd, 10, 0) == b"Xld"
    assert p.read("old") == b"new"
    assert p.ls() == ["old"]


@check
def renamed_but_open(p: Place) -> Iterator[None]:
    p.write("a", b"data")
    yield
    reader, writer = p.open("a", os.O_RDONLY), p.open("a", os.O_RDWR)
    os.rename(p / "a", p / "b")
    os.pwrite(writer, b"D", 0)
    os.fchmod(reader, 0o600)
    assert p.read("b") == b"Data"
    assert p.mode("b") == 0o600


@check
def hard_links_share(p: Place) -> Iterator[None]:
    p.write("a", b"one")
    os.link(p / "a", p / "b")
    yield
    assert p.stat("a").st_ino == p.stat("b").st_ino
    assert p.stat("a").st_nlink == 2
    with open(p / "a", "ab") as file:
        file.write(b"two")
    os.chmod(p / "b", 0o600)
    assert p.read("b") == p.read("a") == b"onetwo"
    assert p.mode("a") == 0o600
    assert p.stat("a").st_ino == p.stat("b").st_ino
    os.unlink(p / "a")
    assert p.stat("b").st_nlink == 1
    assert p.read("b") == b"onetwo"


@check
def hard_link_new(p: Place) -> Iterator[None]:
    p.write("a", b"one")
    p.mkdir("d")
    yield
    os.link(p / "a", p / "d/b")
    assert p.stat("a").st_nlink == p.stat("d/b").st_nlink == 2
    assert p.stat("a").st_ino == p.stat("d/b").st_ino
    with open(p / "d/b", "wb") as file:
        file.write(b"x")
    assert p.read("a") == b"x"


@check
def hard_link_errors(p: Place) -> Iterator[None]:
    p.write("a")
    p.mkdir("d")
    yield
    fails("EEXIST", os.link, p / "a", p / "d")
    fails("EEXIST", os.link, p / "a", p / "a")
    fails("EPERM", os.link, p / "d", p / "e")
    fails("ENOENT", os.link, p / "x", p / "y")
    fails("ENOENT", os.link, p / "a", p / "x/y")
    fails("ENOTDIR", os.link, p / "a", p / "a/y")


@check
def hard_links_and_rename(p: Place) -> Iterator[None]:
    p.write("a", b"1")
    os.link(p / "a", p / "b")
    yield
    os.rename(p / "a", p / "b")  # the same object: nothing happens
    assert p.ls() == ["a", "b"]
    os.rename(p / "a", p / "c")
    assert p.ls() == ["b", "c"]
    assert p.stat("b").st_ino == p.stat("c").st_ino
    assert p.stat("b").st_nlink == 2


@check
def hard_links_of_many(p: Place) -> Iterator[None]:
    p.write("f0", b"x")
    for number in range(1, 20):
        os.link(p / "f0", p / f"f{number}")
    yield
    os.unlink(p / "f3")
    os.truncate(p / "f7", 0)
    os.link(p / "f9", p / "new")
    assert {p.stat(name).st_nlink for name in p.ls()} == {20}
    assert len({p.stat(name).st_ino for name in p.ls()}) == 1
    assert {p.stat(name).st_size for name in p.ls()} == {0}


@check
def link_of_special_files(p: Place) -> Iterator[None]:
    os.mkfifo(p / "p")
    yield
    os.link(p / "p", p / "q")
    assert p.stat("p").st_ino == p.stat("q").st_ino
    assert stat.S_ISFIFO(p.stat("q").st_mode)


# -- rename ------------------------------------------------------------------------------------------


@check
def rename_file(p: Place) -> Iterator[None]:
    p.write("a", b"A", 0o640)
    os.utime(p / "a", ns=(OLD, OLD))
    yield
    inode = p.stat("a").st_ino
    os.rename(p / "a", p / "b")
    assert p.ls() == ["b"]
    assert p.read("b") == b"A"
    assert (p.mode("b"), p.stat("b").st_mtime_ns) == (0o640, OLD)
    assert p.stat("b").st_ino == inode
    fails("ENOENT", os.rename, p / "a", p / "c")


@check
def rename_over_file(p: Place) -> Iterator[None]:
    p.write("a", b"A")
    p.write("b", b"B")
    yield
    os.rename(p / "a", p / "b")
    assert p.ls() == ["b"]
    assert p.read("b") == b"A"


@check
def rename_between_directories(p: Place) -> Iterator[None]:
    p.mkdir("one")
    p.mkdir("two")
    p.write("one/f", b"F")
    yield
    os.rename(p / "one/f", p / "two/g")
    assert (p.ls("one"), p.ls("two")) == ([], ["g"])
    os.rename(p / "two/g", p / "one/f")
    assert p.read("one/f") == b"F"


@check
def rename_type_mismatch(p: Place) -> Iterator[None]:
    p.write("f")
    p.mkdir("d")
    p.mkdir("full")
    p.write("full/x")
    p.mkdir("e")
    yield
    fails("EISDIR", os.rename, p / "f", p / "d")
    fails("ENOTDIR", os.rename, p / "d", p / "f")
    fails("ENOTEMPTY", os.rename, p / "d", p / "full")
    os.rename(p / "d", p / "e")
    assert p.ls() == ["e", "f", "full"]


@check
def rename_into_itself(p: Place) -> Iterator[None]:
    p.mkdir("d")
    p.mkdir("d/e")
    yield
    fails("EINVAL", os.rename, p / "d", p / "d/x")
    fails("EINVAL", os.rename, p / "d", p / "d/e/x")
    fails("ENOTEMPTY", os.rename, p / "d/e", p / "d")
    os.rename(p / "d", p / "d")
    assert p.ls() == ["d"]


@check
def rename_directory_with_content(p: Place) -> Iterator[None]:
    p.mkdir("d")
    p.write("d/f", b"F")
    p.mkdir("d/sub")
    p.write("d/sub/g", b"G")
    yield
    inode = p.stat("d/sub/g").st_ino
    os.rename(p / "d", p / "e")
    assert p.ls() == ["e"]
    assert p.ls("e") == ["f", "sub"]
    assert p.read("e/sub/g") == b"G"
    assert p.stat("e/sub/g").st_ino == inode
    p.write("e/sub/h")
    os.unlink(p / "e/f")
    os.mkdir(p / "d")
    assert p.ls("d") == []
    assert p.ls("e") == ["sub"]
    assert p.ls("e/sub") == ["g", "h"]


@check
def rename_directory_deeper_and_back(p: Place) -> Iterator[None]:
    for name in ("a", "a/b", "a/b/c", "x"):
        p.mkdir(name)
    p.write("a/b/c/f", b"F")
    yield
    os.rename(p / "a/b/c", p / "x/c")
    os.rename(p / "x/c", p / "x/d")
    os.rename(p / "a", p / "x/a")
    os.rename(p / "x", p / "y")
    assert p.read("y/d/f") == b"F"
    assert p.ls("y/a/b") == []
    os.rename(p / "y/d", p / "y/a/b/c")
    os.rename(p / "y/a", p / "a")
    assert p.read("a/b/c/f") == b"F"


@check
def rename_noreplace(p: Place) -> Iterator[None]:
    p.write("a", b"A")
    p.write("b", b"B")
    p.mkdir("d")
    yield
    fails("EEXIST", rename2, p / "a", p / "b", 1)
    fails("EEXIST", rename2, p / "a", p / "d", 1)
    rename2(p / "a", p / "c", 1)
    assert p.ls() == ["b", "c", "d"]
    os.unlink(p / "b")
    rename2(p / "c", p / "b", 1)
    assert p.read("b") == b"A"


@check
def rename_exchange(p: Place) -> Iterator[None]:
    p.write("a", b"A")
    p.write("b", b"B")
    p.mkdir("d")
    p.write("d/x", b"X")
    yield
    rename2(p / "a", p / "b", 2)
    assert (p.read("a"), p.read("b")) == (b"B", b"A")
    rename2(p / "a", p / "d", 2)
    assert p.read("d") == b"B"
    assert p.read("a/x") == b"X"
    fails("ENOENT", rename2, p / "a", p / "zzz", 2)
    assert p.ls() == ["a", "b", "d"]


@check
def rename_exchange_directories(p: Place) -> Iterator[None]:
    p.mkdir("d")
    p.write("d/x")
    p.mkdir("e")
    p.write("e/y")
    p.mkdir("e/z")
    yield
    rename2(p / "d", p / "e", 2)
    assert (p.ls("d"), p.ls("e")) == (["y", "z"], ["x"])
    fails("EINVAL", rename2, p / "d", p / "d/z", 2)
    fails("EINVAL", rename2, p / "d", p / "e", 3)


@check
def rename_special_files(p: Place) -> Iterator[None]:
    os.mkfifo(p / "p")
    os.mknod(p / "c", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.symlink("t", p / "l")
    yield
    for name in ("p", "c", "l"):
        os.rename(p / name, p / f"{name}2")
    assert p.ls() == ["c2", "l2", "p2"]
    assert p.stat("c2").st_rdev == os.makedev(1, 3)
    assert stat.S_ISFIFO(p.stat("p2").st_mode)
    assert os.readlink(p / "l2") == "t"


@check
def rename_keeps_handle_of_directory(p: Place) -> Iterator[None]:
    p.mkdir("d")
    p.write("d/f", b"F")
    yield
    fd = p.open("d", os.O_RDONLY)
    os.rename(p / "d", p / "e")
    inner = os.open("f", os.O_RDONLY, dir_fd=fd)
    assert os.read(inner, 9) == b"F"
    os.close(inner)
    os.close(os.open("g", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    assert p.ls("e") == ["f", "g"]


@check
def rename_over_open_directory(p: Place) -> Iterator[None]:
    p.mkdir("d")
    p.write("d/f")
    p.mkdir("e")
    yield
    fd = p.open("e", os.O_RDONLY)
    os.rename(p / "d", p / "e")
    assert os.listdir(fd) == []
    assert p.ls("e") == ["f"]


@check
def rename_changes_parents_times(p: Place) -> Iterator[None]:
    p.mkdir("a")
    p.mkdir("b")
    p.write("a/f")
    for name in ("a", "b"):
        os.utime(p / name, ns=(OLD, OLD))
    yield
    os.rename(p / "a/f", p / "b/f")
    assert p.stat("a").st_mtime_ns > OLD
    assert p.stat("b").st_mtime_ns > OLD


# -- attributes -----------------------------------------------------------------------------------------


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


# -- permissions --------------------------------------------------------------------------------------


@check
def permission_bits(p: Place) -> Iterator[None]:
    p.write("owner", mode=0o600)
    os.chown(p / "owner", ALICE[0], ALICE[1])
    p.write("group", mode=0o060)
    os.chown(p / "group", 0, ALICE[1])
    p.write("others", mode=0o006)
    p.write("none", mode=0o000)
    yield
    with acting_as(ALICE):
        for name in ("owner", "group", "others"):
            os.close(os.open(p / name, os.O_RDWR))
        fails("EACCES", os.open, p / "none", os.O_RDONLY)
        fails("EACCES", os.open, p / "none", os.O_WRONLY)
        assert os.access(p / "owner", os.W_OK, effective_ids=True)
        assert not os.access(p / "none", os.R_OK, effective_ids=True)
    with acting_as(BOB):
        fails("EACCES", os.open, p / "owner", os.O_RDONLY)
        fails("EACCES", os.open, p / "group", os.O_RDONLY)


@check
def permission_of_owner_comes_first(p: Place) -> Iterator[None]:
    p.write("f", mode=0o077)
    os.chown(p / "f", ALICE[0], ALICE[1])
    yield
    with acting_as(ALICE):
        fails("EACCES", os.open, p / "f", os.O_RDONLY)
    with acting_as(BOB):
        os.close(os.open(p / "f", os.O_RDONLY))


@check
def permission_of_supplementary_group(p: Place) -> Iterator[None]:
    p.write("f", mode=0o060)
    os.chown(p / "f", 0, 60003)
    p.mkdir("d", 0o770)
    os.chown(p / "d", 0, 60003)
    yield
    with acting_as(BOB):
        fd = os.open(p / "f", os.O_RDWR)
        os.write(fd, b"bob")
        os.close(fd)
        p.write("d/new")
    with acting_as(ALICE):
        fails("EACCES", os.open, p / "f", os.O_RDONLY)
        fails("EACCES", os.listdir, p / "d")


@check
def permission_to_create_and_remove(p: Place) -> Iterator[None]:
    p.mkdir("d", 0o755)
    p.write("d/f")
    yield
    with acting_as(ALICE):
        fails("EACCES", os.open, p / "d/new", os.O_CREAT | os.O_WRONLY)
        fails("EACCES", os.mkdir, p / "d/new")
        fails("EACCES", os.symlink, "x", p / "d/new")
        fails("EACCES", os.mkfifo, p / "d/new")
        fails("EACCES", os.unlink, p / "d/f")
        fails("EACCES", os.rename, p / "d/f", p / "d/g")
        assert error_of(os.link, p / "d/f", p / "d/g") in ("EACCES", "EPERM")
    assert p.ls("d") == ["f"]


@check
def permission_to_search(p: Place) -> Iterator[None]:
    p.mkdir("d", 0o700)
    p.mkdir("d/e", 0o777)
    p.write("d/e/f", mode=0o666)
    yield
    with acting_as(ALICE):
        fails("EACCES", os.stat, p / "d/e/f")
        fails("EACCES", os.open, p / "d/e/f", os.O_RDONLY)
        fails("EACCES", os.listdir, p / "d/e")
    os.chmod(p / "d", 0o711)
    with acting_as(ALICE):
        os.close(os.open(p / "d/e/f", os.O_RDWR))


@check
def new_files_belong_to_the_caller(p: Place) -> Iterator[None]:
    p.mkdir("d", 0o777)
    yield
    with acting_as(ALICE, umask=0o027):
        os.close(os.open(p / "d/f", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(p / "d/e", 0o777)
        os.symlink("x", p / "d/l")
        os.mkfifo(p / "d/p", 0o666)
    for name, mode in (("f", 0o640), ("e", 0o750), ("l", 0o777), ("p", 0o640)):
        now = p.stat(f"d/{name}")
        assert (now.st_uid, now.st_gid) == ALICE[:2], name
        assert stat.S_IMODE(now.st_mode) == mode, name


@check
def umask_of_root(p: Place) -> Iterator[None]:
    yield
    old = os.umask(0o077)
    try:
        os.close(os.open(p / "f", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(p / "d", 0o777)
        os.umask(0)
        os.close(os.open(p / "g", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(p / "e", 0o1777)
    finally:
        os.umask(old)
    assert [p.mode(n) for n in ("f", "d", "g", "e")] == [0o600, 0o700, 0o666, 0o1777]


@check
def setgid_directory_is_inherited(p: Place) -> Iterator[None]:
    p.mkdir("d")
    os.chown(p / "d", 0, 60003)
    os.chmod(p / "d", 0o2777)
    yield
    with acting_as(ALICE, umask=0o022):
        os.close(os.open(p / "d/f", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(p / "d/e")
        os.mkfifo(p / "d/p")
        os.symlink("x", p / "d/l")
    for name in ("f", "e", "p", "l"):
        assert (p.stat(f"d/{name}").st_uid, p.stat(f"d/{name}").st_gid) == (60001, 60003), name
    assert p.mode("d/e") == 0o2755
    assert p.mode("d/f") == 0o644


@check
def setgid_directory_strips_sgid_of_files(p: Place) -> Iterator[None]:
    p.mkdir("d")
    os.chown(p / "d", 0, 60003)
    os.chmod(p / "d", 0o2777)
    yield
    with acting_as(ALICE, umask=0):
        os.close(os.open(p / "d/f", os.O_CREAT | os.O_WRONLY, 0o2775))
    with acting_as(BOB, umask=0):  # who is in the group
        os.close(os.open(p / "d/g", os.O_CREAT | os.O_WRONLY, 0o2775))
    assert p.mode("d/f") == 0o775
    assert p.mode("d/g") == 0o2775


@check
def setgid_directory_with_copy_up(p: Place) -> Iterator[None]:
    p.mkdir("d", 0o2755)
    os.chown(p / "d", 0, 60003)
    os.chmod(p / "d", 0o2755)
    p.write("d/f")
    p.mkdir("d/e")
    yield
    os.chmod(p / "d/f", 0o600)
    p.write("d/e/new")
    assert p.mode("d") == 0o2755
    assert p.stat("d/f").st_gid == p.stat("d/f").st_gid


@check
def sticky_directory(p: Place) -> Iterator[None]:
    p.mkdir("d", 0o1777)
    for name, who in (("a", ALICE), ("b", BOB)):
        p.write(f"d/{name}", mode=0o666)
        os.chown(p / f"d/{name}", who[0], who[1])
    yield
    with acting_as(ALICE):
        fails("EPERM", os.unlink, p / "d/b")
        fails("EPERM", os.rename, p / "d/b", p / "d/c")
        fails("EPERM", os.rename, p / "d/a", p / "d/b")
        os.rename(p / "d/a", p / "d/a2")
        os.unlink(p / "d/a2")
    assert p.ls("d") == ["b"]


@check
def sticky_directory_of_the_owner(p: Place) -> Iterator[None]:
    p.mkdir("d", 0o1777)
    os.chown(p / "d", ALICE[0], ALICE[1])
    os.chmod(p / "d", 0o1777)
    p.write("d/b")
    yield
    with acting_as(ALICE):
        os.unlink(p / "d/b")
    assert p.ls("d") == []


@check
def rename_of_foreign_directory_in_sticky(p: Place) -> Iterator[None]:
    p.mkdir("d", 0o777)
    p.mkdir("d/sub", 0o755)
    p.mkdir("d/other", 0o777)
    yield
    with acting_as(ALICE):
        # moving a directory to another parent writes its "..", which needs write permission
        fails("EACCES", os.rename, p / "d/sub", p / "d/other/sub")
        os.rename(p / "d/sub", p / "d/sub2")
    assert p.ls("d") == ["other", "sub2"]


@check
def root_reads_everything(p: Place) -> Iterator[None]:
    p.write("f", b"secret", 0o000)
    os.chown(p / "f", 7, 7)
    p.mkdir("d", 0o000)
    yield
    assert p.read("f") == b"secret"
    p.write("d/x")
    assert p.ls("d") == ["x"]
    assert p.mode("f") == 0


@check
def execution_permission(p: Place) -> Iterator[None]:
    p.write("run", b"#!/bin/sh\nexit 42\n", 0o755)
    p.write("not", b"#!/bin/sh\nexit 42\n", 0o644)
    yield

    def execute(name: str) -> Callable[[], object]:
        return lambda: os.execv(p / name, [name])

    assert child_result(in_child(execute("run"))) == 42
    assert child_result(in_child(execute("not"))) == errno.EACCES


@check
def written_program_is_busy(p: Place) -> Iterator[None]:
    with open("/bin/sleep", "rb") as file:
        p.write("sleep", file.read(), 0o755)
    yield
    fd = p.open("sleep", os.O_WRONLY)
    got = child_result(in_child(lambda: os.execv(p / "sleep", ["sleep", "0"])))
    assert got == errno.ETXTBSY
    os.close(fd)
    assert child_result(in_child(lambda: os.execv(p / "sleep", ["sleep", "0"]))) == 0


@check
def suid_program_runs_as_its_owner(p: Place) -> Iterator[None]:
    with open("/usr/bin/id", "rb") as file:
        p.write("id", file.read())
    os.chown(p / "id", BOB[0], BOB[1])
    os.chmod(p / "id", 0o4755)
    p.write("out", b"", 0o666)
    yield

    def run_it() -> None:
        fd = os.open(p / "out", os.O_WRONLY)
        os.dup2(fd, 1)
        os.execv(p / "id", ["id", "-u"])

    assert child_result(in_child(run_it, ALICE)) == 0
    assert p.read("out") == b"%d\n" % (ALICE[0] if _nosuid(p) else BOB[0])


def _nosuid(p: Place) -> bool:
    return bool(os.statvfs(p.root).f_flag & os.ST_NOSUID)


# -- ACLs -----------------------------------------------------------------------------------------------


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


# -- extended attributes ------------------------------------------------------------------------------------


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


# -- space -----------------------------------------------------------------------------------------------------


@check
def fallocate_modes(p: Place) -> Iterator[None]:
    p.write("f", b"#" * 10_000)
    yield
    fd = p.open("f", os.O_RDWR)
    if "fallocate" in p.lacks:
        fails("EOPNOTSUPP", fallocate, fd, 0, 0, 20_000)
        return
    fallocate(fd, 0, 0, 20_000)
    assert os.fstat(fd).st_size == 20_000
    fallocate(fd, KEEP_SIZE, 20_000, 100_000)
    assert os.fstat(fd).st_size == 20_000
    fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 4096, 4096)
    assert os.pread(fd, 10_000, 0) == b"#" * 4096 + b"\0" * 4096 + b"#" * 1808
    fallocate(fd, ZERO_RANGE, 0, 100)
    assert os.pread(fd, 101, 0) == b"\0" * 100 + b"#"
    assert p.stat("f").st_blocks > 0


@check
def fallocate_errors(p: Place) -> Iterator[None]:
    p.write("f")
    yield
    fd = p.open("f", os.O_RDONLY)
    fails("EBADF", fallocate, fd, 0, 0, 10)
    if "fallocate" in p.lacks:
        return
    fd = p.open("f", os.O_RDWR)
    fails("EINVAL", fallocate, fd, 0, 0, 0)
    fails("EINVAL", fallocate, fd, 0, -1, 10)
    fails("EOPNOTSUPP", fallocate, fd, 0x4000, 0, 10)


@check
def posix_fallocate_extends(p: Place) -> Iterator[None]:
    yield
    fd = p.open("f", os.O_RDWR | os.O_CREAT)
    if "fallocate" in p.lacks:
        return
    os.posix_fallocate(fd, 0, 5000)
    assert p.stat("f").st_size == 5000
    assert p.read("f") == b"\0" * 5000


@check
def seek_hole_and_data(p: Place) -> Iterator[None]:
    with open(p / "f", "wb") as file:
        file.seek(1 << 20)
        file.write(b"x" * 4096)
        file.truncate(2 << 20)
    yield
    fd = p.open("f", os.O_RDWR)
    if "seek" in p.lacks:
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 2 << 20
        return
    assert os.lseek(fd, 0, os.SEEK_DATA) == 1 << 20
    assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
    assert os.lseek(fd, 1 << 20, os.SEEK_HOLE) == (1 << 20) + 4096
    fails("ENXIO", os.lseek, fd, (1 << 20) + 8192, os.SEEK_DATA)
    fails("ENXIO", os.lseek, fd, 3 << 20, os.SEEK_DATA)


@check
def seek_plain(p: Place) -> Iterator[None]:
    p.write("f", b"0123456789")
    yield
    fd = p.open("f", os.O_RDONLY)
    assert os.lseek(fd, -3, os.SEEK_END) == 7
    assert os.read(fd, 5) == b"789"
    assert os.lseek(fd, 2, os.SEEK_SET) == 2
    assert os.lseek(fd, 3, os.SEEK_CUR) == 5
    fails("EINVAL", os.lseek, fd, -1, os.SEEK_SET)
    assert os.lseek(fd, 100, os.SEEK_SET) == 100
    assert os.read(fd, 5) == b""


@check
def copy_file_range_copies(p: Place) -> Iterator[None]:
    p.write("a", b"0123456789" * 1000)
    p.write("b", b"#" * 10)
    yield
    source, target = p.open("a", os.O_RDONLY), p.open("b", os.O_RDWR)
    copied = 0
    while copied < 5000:
        got = os.copy_file_range(source, target, 5000 - copied, 5 + copied, 10 + copied)
        assert got > 0
        copied += got
    assert p.read("b") == b"#" * 10 + (b"0123456789" * 1000)[5:5005]
    assert os.copy_file_range(source, target, 10, 20_000, 0) == 0


@check
def sendfile_and_splice(p: Place) -> Iterator[None]:
    p.write("a", b"0123456789" * 1000)
    yield
    source = p.open("a", os.O_RDONLY)
    target = p.open("b", os.O_RDWR | os.O_CREAT)
    left = 10_000
    while left:
        got = os.sendfile(target, source, None, left)
        assert got
        left -= got
    assert p.read("b") == p.read("a")


@check
def file_size_limit(p: Place) -> Iterator[None]:
    p.write("f", b"12345")
    yield

    def limited() -> None:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        fd = os.open(p / "f", os.O_WRONLY)
        os.pwrite(fd, b"x", 99)
        os.pwrite(fd, b"x", 100)

    assert child_result(in_child(limited)) == errno.EFBIG
    assert p.stat("f").st_size == 100


# -- memory maps ---------------------------------------------------------------------------------------------


@check
def mmap_shared_is_written(p: Place) -> Iterator[None]:
    p.write("f", b"#" * 8192)
    yield
    import mmap

    fd = p.open("f", os.O_RDWR)
    with mmap.mmap(fd, 8192) as area:
        area[5000:5005] = b"HELLO"
        area.flush()
        assert os.pread(fd, 5, 5000) == b"HELLO"
    assert p.read("f")[5000:5005] == b"HELLO"


@check
def mmap_sees_writes(p: Place) -> Iterator[None]:
    p.write("f", b"#" * 8192)
    yield
    import mmap

    fd = p.open("f", os.O_RDWR)
    with mmap.mmap(fd, 8192, mmap.MAP_SHARED, mmap.PROT_READ) as area:
        assert area[0:1] == b"#"
        os.pwrite(fd, b"NEW", 0)
        assert area[0:3] == b"NEW"


@check
def mmap_private_is_not_written(p: Place) -> Iterator[None]:
    p.write("f", b"#" * 4096)
    yield
    import mmap

    fd = p.open("f", os.O_RDONLY)
    with mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as area:
        area[0:3] = b"abc"
        assert p.read("f")[:3] == b"###"
    fails("EACCES", mmap.mmap, fd, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE)


@check
def mmap_outlives_close_and_unlink(p: Place) -> Iterator[None]:
    p.write("f", b"#" * 4096)
    yield
    import mmap

    fd = os.open(p / "f", os.O_RDWR)
    with mmap.mmap(fd, 4096) as area:
        os.close(fd)
        os.unlink(p / "f")
        area[0:3] = b"abc"
        assert area[0:4] == b"abc#"


@check
def mmap_before_copy_up(p: Place) -> Iterator[None]:
    p.write("f", b"#" * 4096)
    yield
    import mmap

    reader = p.open("f", os.O_RDONLY)
    with mmap.mmap(reader, 4096, mmap.MAP_SHARED, mmap.PROT_READ) as area:
        assert area[0:1] == b"#"
        writer = p.open("f", os.O_RDWR)
        os.pwrite(writer, b"NEW", 0)
        assert os.pread(writer, 3, 0) == b"NEW"
        assert area[0:3] in (b"###", b"NEW")  # overlayfs: the lower file's page
    assert p.read("f")[:3] == b"NEW"


@check
def mmap_writes_through_two_handles(p: Place) -> Iterator[None]:
    p.write("f", b"#" * 4096)
    yield
    import mmap

    one, two = p.open("f", os.O_RDWR), p.open("f", os.O_RDWR)
    with mmap.mmap(one, 4096) as first, mmap.mmap(two, 4096) as second:
        first[0:3] = b"one"
        assert second[0:3] == b"one"
        second[3:6] = b"two"
        assert first[0:6] == b"onetwo"
    assert p.read("f")[:6] == b"onetwo"


# -- locks -----------------------------------------------------------------------------------------------------


@check
def flock_excludes(p: Place) -> Iterator[None]:
    p.write("f")
    yield
    import fcntl

    one, two = p.open("f", os.O_RDWR), p.open("f", os.O_RDONLY)
    fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fails("EAGAIN", fcntl.flock, two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(one, fcntl.LOCK_SH | fcntl.LOCK_NB)
    fcntl.flock(two, fcntl.LOCK_SH | fcntl.LOCK_NB)
    fcntl.flock(two, fcntl.LOCK_UN)
    fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)


@check
def fcntl_locks_exclude_processes(p: Place) -> Iterator[None]:
    p.write("f", b"0123456789")
    yield
    import fcntl

    fd = p.open("f", os.O_RDWR)
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 0)

    def other(start: int) -> Callable[[], object]:
        def attempt() -> None:
            mine = os.open(p / "f", os.O_RDWR)
            fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, start)

        return attempt

    assert child_result(in_child(other(0))) in (errno.EAGAIN, errno.EACCES)
    assert child_result(in_child(other(5))) == 0
    fcntl.lockf(fd, fcntl.LOCK_UN, 5, 0)
    assert child_result(in_child(other(0))) == 0


@check
def lock_taken_before_copy_up_holds(p: Place) -> Iterator[None]:
    p.write("f")
    yield
    import fcntl

    reader = p.open("f", os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_EX | fcntl.LOCK_NB)
    writer = p.open("f", os.O_RDWR)
    fails("EAGAIN", fcntl.flock, writer, fcntl.LOCK_EX | fcntl.LOCK_NB)


# -- special files -------------------------------------------------------------------------------------------


@check
def special_files(p: Place) -> Iterator[None]:
    os.mknod(p / "lc", stat.S_IFCHR | 0o644, os.makedev(1, 5))
    os.mkfifo(p / "lp", 0o600)
    yield
    os.mknod(p / "c", stat.S_IFCHR | 0o600, os.makedev(10, 300))
    os.mknod(p / "b", stat.S_IFBLK | 0o660, os.makedev(7, 3))
    os.mknod(p / "s", stat.S_IFSOCK | 0o666)
    os.mknod(p / "r", stat.S_IFREG | 0o604)
    os.mkfifo(p / "p", 0o622)
    assert p.stat("c").st_rdev == os.makedev(10, 300)
    assert stat.S_ISBLK(p.stat("b").st_mode)
    assert p.stat("b").st_rdev == os.makedev(7, 3)
    assert stat.S_ISSOCK(p.stat("s").st_mode)
    assert stat.S_ISREG(p.stat("r").st_mode)
    assert stat.S_ISFIFO(p.stat("p").st_mode)
    os.chmod(p / "lc", 0o600)
    assert p.stat("lc").st_rdev == os.makedev(1, 5)
    os.chown(p / "lp", 4, 4)
    assert stat.S_ISFIFO(p.stat("lp").st_mode)


@check
def device_nodes_work(p: Place) -> Iterator[None]:
    os.mknod(p / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(p / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    yield
    if os.statvfs(p.root).f_flag & os.ST_NODEV:
        return
    with open(p / "zero", "rb", 0) as file:
        assert file.read(4) == b"\0\0\0\0"
    fd = p.open("null", os.O_WRONLY)
    assert os.write(fd, b"gone") == 4


@check
def device_nodes_need_privilege(p: Place) -> Iterator[None]:
    p.mkdir("d", 0o777)
    yield
    with acting_as(ALICE):
        fails("EPERM", os.mknod, p / "d/c", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        os.mknod(p / "d/s", stat.S_IFSOCK | 0o600)
    assert p.ls("d") == ["s"]


@check
def fifo_carries_data(p: Place) -> Iterator[None]:
    os.mkfifo(p / "p")
    yield
    reader = p.open("p", os.O_RDONLY | os.O_NONBLOCK)
    writer = p.open("p", os.O_WRONLY | os.O_NONBLOCK)
    os.write(writer, b"through")
    assert os.read(reader, 20) == b"through"
    other = os.stat(p / "p")
    assert stat.S_ISFIFO(other.st_mode)


@check
def unix_socket(p: Place) -> Iterator[None]:
    yield
    import socket

    old = os.getcwd()
    os.chdir(p.root)
    try:
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            server.bind("sock")
            server.listen()
            client.connect("sock")
            peer, _ = server.accept()
            client.sendall(b"hi")
            assert peer.recv(10) == b"hi"
            peer.close()
        with socket.socket(socket.AF_UNIX) as client:
            fails("ECONNREFUSED", client.connect, "sock")
    finally:
        os.chdir(old)
    os.unlink(p / "sock")


@check
def open_of_unconnected_special_files(p: Place) -> Iterator[None]:
    os.mknod(p / "s", stat.S_IFSOCK | 0o666)
    yield
    fails("ENXIO", os.open, p / "s", os.O_RDONLY)
    os.mkfifo(p / "p")
    fails("ENXIO", os.open, p / "p", os.O_WRONLY | os.O_NONBLOCK)


# -- the rest ----------------------------------------------------------------------------------------------------


@check
def file_handles_by_name_to_handle(p: Place) -> Iterator[None]:
    p.write("f")
    yield
    fd = p.open(".", os.O_RDONLY)
    os.chdir(fd)  # as programs that hold a directory do
    try:
        assert os.stat("f").st_size == 4
        assert os.path.realpath(".") == str(p.root)
        os.rename("f", "g")
        assert os.listdir(".") == ["g"]
    finally:
        os.chdir("/")


@check
def statx_says_the_same(p: Place) -> Iterator[None]:
    p.write("f", b"12345")
    yield
    buffer = ctypes.create_string_buffer(256)
    assert _LIBC.statx(-100, os.fsencode(p / "f"), 0x100, 0x7FF, buffer) == 0
    mask, _blksize, _attributes, nlink, _uid, _gid, mode = struct.unpack_from("<IIQIIIH", buffer, 0)
    ino, size = struct.unpack_from("<QQ", buffer, 32)
    assert mask & 0x7FF >= 0x7FF & ~0x800 & ~0x400 or mask & 0x3FF
    assert (nlink, mode, ino, size) == (1, p.stat("f").st_mode, p.stat("f").st_ino, 5)


@check
def dup_and_fork_share_offset(p: Place) -> Iterator[None]:
    p.write("f", b"0123456789")
    yield
    fd = p.open("f", os.O_RDWR)

    def child() -> None:
        os.read(fd, 3)

    assert child_result(in_child(child)) == 0
    assert os.read(fd, 2) == b"34"
    other = os.dup(fd)
    assert os.read(other, 1) == b"5"
    os.close(other)


@check
def reopen_through_proc(p: Place) -> Iterator[None]:
    p.write("f", b"abc")
    yield
    fd = p.open("f", os.O_RDONLY)
    os.unlink(p / "f")
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    assert os.read(again, 5) == b"abc"
    os.close(again)


@check
def many_open_files(p: Place) -> Iterator[None]:
    for number in range(100):
        p.write(f"f{number}", b"%d" % number)
    yield
    fds = [p.open(f"f{n}", os.O_RDWR) for n in range(100)]
    for number, fd in enumerate(fds):
        assert os.read(fd, 5) == b"%d" % number
        os.write(fd, b"!")
    for number in range(100):
        assert p.read(f"f{number}") == b"%d!" % number


@check
def temporary_file_patterns(p: Place) -> Iterator[None]:
    p.write("config", b"old")
    yield
    # as editors and package managers save: write beside, sync, rename over
    for round_ in range(20):
        fd = os.open(p / ".config.new", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        os.write(fd, b"%d" % round_)
        os.fsync(fd)
        os.fchmod(fd, 0o644)
        os.close(fd)
        os.link(p / "config", p / "config.bak")
        os.rename(p / ".config.new", p / "config")
        os.unlink(p / "config.bak")
    assert p.ls() == ["config"]
    assert p.read("config") == b"19"


@check
def create_remove_storm(p: Place) -> Iterator[None]:
    for number in range(30):
        p.write(f"f{number}", b"old")
    yield
    for _ in range(3):
        for number in range(30):
            os.unlink(p / f"f{number}")
        assert p.ls() == []
        for number in range(30):
            os.mkdir(p / f"f{number}")
        for number in range(30):
            os.rmdir(p / f"f{number}")
            p.write(f"f{number}", b"new")
    assert {p.read(f"f{n}") for n in range(30)} == {b"new"}


@check
def whole_tree_copied_and_removed(p: Place) -> Iterator[None]:
    for number in range(5):
        p.mkdir(f"d{number}")
        for inner in range(5):
            p.write(f"d{number}/f{inner}", b"%d" % inner)
        os.symlink("f0", p / f"d{number}/l")
    yield
    import shutil

    shutil.copytree(p / "d0", p / "copy", symlinks=True)
    assert p.ls("copy") == p.ls("d0")
    for number in range(5):
        shutil.rmtree(p / f"d{number}")
    shutil.rmtree(p / "copy")
    assert p.ls() == []


@check
def inotify_sees_changes(p: Place) -> Iterator[None]:
    p.write("f")
    yield
    fd = _LIBC.inotify_init1(os.O_NONBLOCK)
    p.fds.append(fd)
    assert _LIBC.inotify_add_watch(fd, os.fsencode(p.root), 0x3C6) > 0
    p.write("g")
    os.rename(p / "g", p / "h")
    os.unlink(p / "h")
    events = os.read(fd, 65_536)
    for name in (b"g", b"h"):
        assert name in events


@check
def access_call(p: Place) -> Iterator[None]:
    p.write("f", mode=0o640)
    p.mkdir("d", 0o700)
    yield
    assert os.access(p / "f", os.R_OK | os.W_OK)
    assert not os.access(p / "f", os.X_OK)
    assert not os.access(p / "x", os.F_OK)
    with acting_as(ALICE):
        assert not os.access(p / "f", os.R_OK, effective_ids=True)
        assert not os.access(p / "d", os.X_OK, effective_ids=True)


@check
def group_of_new_files_follows_fsgid(p: Place) -> Iterator[None]:
    p.mkdir("d", 0o777)
    yield
    with acting_as((BOB[0], 60003, BOB[2])):
        p.write("d/f")
    assert (p.stat("d/f").st_uid, p.stat("d/f").st_gid) == (BOB[0], 60003)


@check
def create_read_only_file_and_write(p: Place) -> Iterator[None]:
    p.mkdir("d", 0o777)
    yield
    with acting_as(ALICE):
        fd = os.open(p / "d/f", os.O_CREAT | os.O_RDWR, 0o000)
        os.write(fd, b"mine")
        os.close(fd)
        fails("EACCES", os.open, p / "d/f", os.O_RDONLY)
    assert p.mode("d/f") == 0
    assert p.stat("d/f").st_size == 4


@check
def link_protection_of_foreign_files(p: Place) -> Iterator[None]:
    p.mkdir("d", 0o777)
    p.write("d/f", mode=0o644)
    yield
    with open("/proc/sys/fs/protected_hardlinks") as file:
        protected = file.read().strip() == "1"
    with acting_as(ALICE):
        fails("EPERM" if protected else "ok", os.link, p / "d/f", p / "d/g")


@check
def rename_into_unwritable_directory(p: Place) -> Iterator[None]:
    p.mkdir("open", 0o777)
    p.mkdir("shut", 0o755)
    p.write("open/f", mode=0o666)
    yield
    with acting_as(ALICE):
        fails("EACCES", os.rename, p / "open/f", p / "shut/f")
        os.rename(p / "open/f", p / "open/g")
    assert (p.ls("open"), p.ls("shut")) == (["g"], [])


@check
def trailing_slashes(p: Place) -> Iterator[None]:
    p.write("f")
    p.mkdir("d")
    yield
    fails("ENOTDIR", os.stat, p / "f/")
    fails("ENOTDIR", os.unlink, p / "f/")
    os.mkdir(p / "e/")
    os.rmdir(p / "e/")
    os.rename(p / "d/", p / "g/")
    fails("ENOTDIR", os.rename, p / "f", p / "h/")
    assert p.ls() == ["f", "g"]


@check
def readlink_size_and_stat_agree(p: Place) -> Iterator[None]:
    for length in (1, 59, 60, 61, 200, 1000):
        os.symlink("x" * length, p / f"l{length}")
    yield
    for length in (1, 59, 60, 61, 200, 1000):
        assert p.stat(f"l{length}").st_size == len(os.readlink(p / f"l{length}")) == length


@check
def exclusive_create_races_are_decided(p: Place) -> Iterator[None]:
    yield

    def attempt() -> None:
        os.close(os.open(p / "lock", os.O_CREAT | os.O_EXCL | os.O_WRONLY))

    children = [in_child(attempt) for _ in range(8)]
    results = sorted(child_result(pid) for pid in children)
    assert results == [0] + [errno.EEXIST] * 7


@check
def concurrent_appends_are_whole(p: Place) -> Iterator[None]:
    p.write("log", b"")
    yield

    def append(letter: bytes) -> Callable[[], object]:
        def work() -> None:
            fd = os.open(p / "log", os.O_WRONLY | os.O_APPEND)
            for _ in range(40):
                os.write(fd, letter * 99 + b"\n")

        return work

    children = [in_child(append(bytes([65 + n]))) for n in range(4)]
    assert [child_result(pid) for pid in children] == [0] * 4
    lines = p.read("log").splitlines()
    assert len(lines) == 160
    assert all(len(set(line)) == 1 and len(line) == 99 for line in lines)


@check
def concurrent_copy_up_of_one_file(p: Place) -> Iterator[None]:
    p.write("f", b"#" * 400_000, 0o666)
    yield

    def change(index: int) -> Callable[[], object]:
        def work() -> None:
            fd = os.open(p / "f", os.O_RDWR)
            os.pwrite(fd, b"%d" % index, index * 1000)

        return work

    children = [in_child(change(n)) for n in range(8)]
    assert [child_result(pid) for pid in children] == [0] * 8
    expected = bytearray(b"#" * 400_000)
    for number in range(8):
        expected[number * 1000 : number * 1000 + 1] = b"%d" % number
    assert p.read("f") == bytes(expected)


@check
def concurrent_renames_end_with_one(p: Place) -> Iterator[None]:
    for number in range(6):
        p.write(f"f{number}", b"%d" % number)
    yield

    def move(index: int) -> Callable[[], object]:
        return lambda: os.rename(p / f"f{index}", p / "target")

    children = [in_child(move(n)) for n in range(6)]
    assert [child_result(pid) for pid in children] == [0] * 6
    assert p.ls() == ["target"]
    assert p.read("target") in [b"%d" % n for n in range(6)]
