"""Copy-up: complete, in one step, and harmless when it fails."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from sdeefs.core import copyup
from sdeefs.core.api import Io, Later, SetAttributes
from tests.core.core_lab import ROOT, Core, finish

STAMP = 900_000_000_123_456_789


def snapshot(path: Path) -> list[tuple[Any, ...]]:
    """Everything below a directory, for comparison."""
    found = []
    for directory, names, files in os.walk(path):
        for name in sorted([*names, *files]):
            st = os.lstat(f"{directory}/{name}")
            found.append((directory, name, st.st_mode, st.st_size, st.st_mtime_ns, st.st_ino))
    return found


def test_everything_is_copied(disk: Core) -> None:
    file = disk.lower / "d/f"
    file.parent.mkdir(mode=0o750)
    os.chown(file.parent, 5, 6)
    file.write_bytes(b"x" * 10_000)
    os.chown(file, 7, 8)
    file.chmod(0o6755)
    os.setxattr(file, "user.a", b"1")
    os.setxattr(file, "trusted.b", b"2")
    os.setxattr(file, "security.capability", b"\1\0\0\2\0\4\0\0\0\0\0\0\0\0\0\0\0\0\0\0")
    os.utime(file, ns=(STAMP, STAMP + 1))
    os.utime(file.parent, ns=(STAMP, STAMP + 2))
    before, parent = disk.stat("d/f"), disk.stat("d")
    disk.change("d/f", atime_ns=STAMP + 5)
    after = disk.stat("d/f")
    assert after.atime_ns == STAMP + 5
    assert after[:6] == before[:6] and after.mtime_ns == STAMP + 1 and after.size == 10_000
    copy = disk.upper / "d/f"
    assert copy.read_bytes() == file.read_bytes()
    assert stat.S_IMODE(copy.stat().st_mode) == 0o6755
    for name in ("user.a", "trusted.b", "security.capability"):
        assert os.getxattr(copy, name) == os.getxattr(file, name)
    now = disk.stat("d")
    assert (now.mode, now.uid, now.gid, now.mtime_ns) == (
        parent.mode, 5, 6, STAMP + 2,
    )  # fmt: skip
    assert os.listdir(disk.work / "work") == []


@pytest.mark.parametrize("kind", ["link", "pipe", "device", "socket"])
def test_other_kinds(core: Core, kind: str) -> None:
    path = core.lower / "o"
    if kind == "link":
        path.symlink_to("target")
    elif kind == "device":
        os.mknod(path, stat.S_IFCHR | 0o640, os.makedev(1, 3))
    else:
        os.mknod(path, (stat.S_IFIFO if kind == "pipe" else stat.S_IFSOCK) | 0o640)
    before = core.stat("o")
    core.change("o", uid=12, gid=13)
    after = core.stat("o")
    assert (after.ino, after.mode, after.rdev) == (before.ino, before.mode, before.rdev)
    assert (after.uid, after.gid) == (12, 13)
    if kind == "link":
        assert core.fs.readlink(core.node("o")) == b"target"


def test_holes_stay(disk: Core) -> None:
    with open(disk.lower / "sparse", "wb") as file:
        file.write(b"a")
        file.seek(50 << 20)
        file.write(b"b")
        file.truncate(100 << 20)
    disk.change("sparse", mode=0o600)
    copy = (disk.upper / "sparse").stat()
    assert copy.st_size == 100 << 20 and copy.st_blocks * 512 < 1 << 20
    with open(disk.upper / "sparse", "rb") as file:
        file.seek(50 << 20)
        assert file.read(1) == b"b"


def test_data_is_copied_by_a_worker_and_not_under_truncation(core: Core) -> None:
    (core.lower / "f").write_bytes(b"x" * 100_000)
    (core.lower / "g").write_bytes(b"y" * 100_000)
    answer = core.fs.open(core.node("f"), os.O_RDWR, ROOT)
    assert isinstance(answer, Later)
    assert not (core.upper / "f").exists()
    opened = finish(answer)
    assert core.fs.read(opened.handle, 99_999, 10) == b"x"
    core.fs.release(opened.handle)
    opened = core.fs.open(core.node("g"), os.O_WRONLY | os.O_TRUNC, ROOT)
    assert not isinstance(opened, Later)
    core.fs.release(opened.handle)
    assert core.stat("g").size == 0
    assert (core.lower / "g").stat().st_size == 100_000


def test_truncation_copies_what_is_left(core: Core) -> None:
    (core.lower / "f").write_bytes(b"0123456789" * 10_000)
    core.change("f", size=15)
    assert core.read("f") == b"012345678901234"


def test_volatile_copies_at_once(core: Core) -> None:
    (core.lower / "f").write_bytes(b"x" * 1000)
    core.open(volatile=True)
    opened = core.fs.open(core.node("f"), os.O_RDWR, ROOT)
    assert not isinstance(opened, Later)
    assert core.fs.fsync(opened.handle, False) is None


def test_a_reader_sees_what_a_later_writer_writes(core: Core) -> None:
    (core.lower / "f").write_bytes(b"old data")
    fs = core.fs
    fs.passthrough = True
    node = core.node("f")
    reader = finish(fs.open(node, os.O_RDONLY, ROOT))
    writer = finish(fs.open(node, os.O_WRONLY, ROOT))
    assert reader.io is writer.io is Io.CACHED
    fs.write(writer.handle, 0, b"new", False)
    assert fs.read(reader.handle, 0, 100) == b"new data"
    fs.release(writer.handle)
    fs.release(reader.handle)
    again = finish(fs.open(node, os.O_RDONLY, ROOT))
    assert again.io is Io.PASSTHROUGH


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failure_leaves_everything_as_it_was(
    core: Core, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (core.lower / "d").mkdir()
    (core.lower / "d/f").write_bytes(b"x" * 3000)
    core.change("d", mode=0o700)
    before = snapshot(core.upper)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(copyup, "copy_data", fail)
    monkeypatch.setattr(copyup, "_clone", lambda *_: False)
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            finish(core.fs.open(core.node("d/f"), os.O_RDWR, ROOT))
        assert caught.value.errno == number
    assert snapshot(core.upper) == before
    assert os.listdir(core.work / "work") == []
    monkeypatch.undo()
    core.write("d/f", b"works", 0)
    assert core.read("d/f")[:6] == b"worksx"


def test_hard_links_stay_together_also_after_a_remount(core: Core) -> None:
    (core.lower / "d").mkdir()
    (core.lower / "a").write_text("1")
    os.link(core.lower / "a", core.lower / "d/b")
    os.link(core.lower / "a", core.lower / "c")
    ino = core.stat("a").ino
    core.write("d/b", b"2")
    for _ in range(2):
        for name in ("a", "d/b", "c"):
            assert core.read(name) == b"2"
            assert core.stat(name)[::2][:2] == (ino, 3)
            assert core.stat(name).ino == ino
        core.open()
    core.unlink("a")
    core.link("c", "e")
    core.unlink("d/b")
    for _ in range(2):
        assert core.stat("c").nlink == 2 and core.read("e") == b"2"
        assert core.list() == ["c", "d", "e"] and core.list("d") == []
        core.open()
    core.unlink("c")
    core.unlink("e")
    assert os.listdir(core.work / "index") == []


def test_without_an_index_links_break_with_numbers_of_their_own(core: Core) -> None:
    (core.lower / "a").write_text("1")
    os.link(core.lower / "a", core.lower / "b")
    core.open(index=False)
    core.write("a", b"2")
    assert core.read("b") == b"1"
    assert core.stat("a").ino != core.stat("b").ino
    before = core.stat("a").ino
    core.open()
    assert core.stat("a").ino == before


def test_without_xattrs(core: Core) -> None:
    (core.lower / "d/sub").mkdir(parents=True)
    (core.lower / "d/sub/a").write_text("1")
    os.link(core.lower / "d/sub/a", core.lower / "b")
    core.open(noxattr=True)
    core.rename("d", "moved")
    core.write("b", b"2")
    inos = {name: core.stat(name).ino for name in ("b", "moved", "moved/sub", "moved/sub/a")}
    assert core.stat("b").nlink == 2
    for _ in range(2):
        assert core.list() == ["b", "moved"]
        assert core.read("moved/sub/a") == b"2"
        assert inos == {name: core.stat(name).ino for name in inos}
        core.open()
    assert os.listxattr(core.upper / "moved") == []


def test_a_file_without_a_name_is_copied_up(core: Core) -> None:
    (core.lower / "f").write_text("text")
    opened = finish(core.fs.open(core.node("f"), os.O_RDONLY, ROOT))
    node = core.node("f")
    core.unlink("f")
    finish(core.fs.setattr(node, SetAttributes(mode=0o600), 0, ROOT))
    assert stat.S_IMODE(core.fs.getattr(node)[0].mode) == 0o600
    assert core.fs.read(opened.handle, 0, 9) == b"text"
    core.fs.release(opened.handle)
    assert not core.exists("f")
    assert os.listdir(core.work / "work") in ([], ["#1"]) or core.upper.exists()


def test_inode_numbers_last(core: Core) -> None:
    (core.lower / "d").mkdir()
    (core.lower / "d/f").write_text("1")
    (core.lower / "d/l").symlink_to("f")
    inos = {name: core.stat(name).ino for name in ("d", "d/f", "d/l")}
    core.write("d/f", b"2")
    core.change("d/l", uid=3)
    core.rename("d/f", "g")
    inos["g"] = inos.pop("d/f")
    for _ in range(2):
        assert inos == {name: core.stat(name).ino for name in inos}
        assert core.list() == ["d", "g"] and core.list("d") == ["l"]
        core.open()
