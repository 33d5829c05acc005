"""POSIX checks: space."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from tests.fslab.fslab_lab import child_result, in_child
from tests.fslab.posix_place import (
    KEEP_SIZE,
    PUNCH_HOLE,
    ZERO_RANGE,
    Place,
    check,
    fails,
    fallocate,
)


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
