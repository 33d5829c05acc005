"""POSIX checks: unlink, link."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from tests.fslab.posix_place import OLD, Place, check, fails


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
