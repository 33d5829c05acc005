"""POSIX checks: open and create."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from tests.fslab.fslab_lab import error_of
from tests.fslab.posix_place import _LIBC, OLD, Place, check, fails, link_handle


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
