"""POSIX checks: rename."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from tests.fslab.posix_place import OLD, Place, check, fails, rename2


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
