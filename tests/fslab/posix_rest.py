"""POSIX checks: the rest."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fslab.fslab_lab import ALICE, BOB, acting_as, child_result, in_child
from tests.fslab.posix_place import _LIBC, Place, check, fails


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


def _birth(path: Path) -> float | None:
    buffer = ctypes.create_string_buffer(256)
    assert _LIBC.statx(-100, os.fsencode(path), 0x100, 0x800, buffer) == 0
    if not struct.unpack_from("<I", buffer)[0] & 0x800:
        return None
    seconds, nanoseconds = struct.unpack_from("<qI", buffer, 80)
    return float(seconds + nanoseconds / 1e9)


@check
def birth_time(p: Place) -> Iterator[None]:
    p.write("old")
    p.mkdir("d")
    begun = time.time()
    yield
    p.write("new")
    for name, first in (("old", begun - 60), ("d", begun - 60), ("new", begun - 1)):
        born = _birth(p / name)
        if "birth" in p.lacks:
            assert born is None
        else:
            assert born is not None and first < born < time.time() + 1
    os.utime(p / "new", (5, 5))
    assert "birth" in p.lacks or (_birth(p / "new") or 0) > begun - 1


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
