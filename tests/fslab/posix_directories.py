"""POSIX checks: directories."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterator

from tests.fslab.fslab_lab import ALICE, acting_as
from tests.fslab.posix_place import _LIBC, OLD, Place, check, fails


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
