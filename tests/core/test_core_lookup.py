"""Names: upper before lower, whiteouts in each form, opaque and redirected directories."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from sdeefs.core.api import Caller
from sdeefs.core.settings import RedirectDir, WhiteoutForm
from tests.core.core_lab import ROOT, Core


def test_upper_before_lower(core: Core) -> None:
    for path, text in ((core.lower, "low"), (core.upper, "up")):
        (path / "both").write_text(text)
        (path / "d").mkdir()
        (path / "d" / text).write_text(text)
    (core.lower / "file").write_text("low")
    (core.upper / "file").mkdir()
    (core.lower / "dir").mkdir()
    (core.lower / "dir/x").write_text("")
    (core.upper / "dir").write_text("up")
    assert core.read("both") == b"up"
    assert core.list("d") == ["low", "up"]
    assert core.list("file") == []
    assert core.read("dir") == b"up"
    assert core.list() == ["both", "d", "dir", "file"]
    assert core.stat("d").nlink == 1
    assert core.stat("d").ino == (core.lower / "d").stat().st_ino


def test_the_three_forms_of_whiteouts(core: Core) -> None:
    for name in "abcd":
        (core.lower / name).write_text(name)
    os.mknod(core.upper / "a", stat.S_IFCHR | 0o600, os.makedev(0, 0))
    os.setxattr(core.upper, "trusted.overlay.opaque", b"x")
    (core.upper / "b").write_text("")
    os.setxattr(core.upper / "b", "trusted.overlay.whiteout", b"y")
    (core.upper / ".wh.c").write_text("")
    assert core.list() == [".wh.c", "c", "d"]
    assert not core.exists("a") and not core.exists("b")
    core.open(whiteouts=WhiteoutForm.PREFIX)
    assert core.list() == ["d"]
    with pytest.raises(OSError):
        core.write(".wh.d", b"")


def test_negative_answers_are_believed_as_long_as_they_last(core: Core) -> None:
    (core.lower / "gone").write_text("")
    os.mknod(core.upper / "gone", stat.S_IFCHR, 0)
    fs = core.open(lower_timeout=0.5)
    assert fs.lookup(1, b"gone", ROOT)[::2] == (0, fs.upper_timeout)
    assert fs.lookup(1, b"never", ROOT)[::2] == (0, 0.5)
    pure = core.mkdir("pure").node
    assert fs.lookup(pure, b"never", ROOT)[::2] == (0, fs.upper_timeout)


def test_opaque_directories_hide_lower(three: Core) -> None:
    for number, lower in enumerate(three.lowers):
        (lower / "d").mkdir()
        (lower / f"d/{number}").write_text("")
    assert three.list("d") == ["0", "1", "2"]
    os.setxattr(three.lowers[1] / "d", "trusted.overlay.opaque", b"y")
    assert three.open() and three.list("d") == ["0", "1"]
    (three.upper / "d").mkdir()
    os.setxattr(three.upper / "d", "trusted.overlay.opaque", b"y")
    assert three.open() and three.list("d") == []


def test_a_file_in_the_middle_ends_the_stack(three: Core) -> None:
    (three.lowers[0] / "d").mkdir()
    (three.lowers[1] / "d").write_text("")
    (three.lowers[2] / "d").mkdir()
    (three.lowers[2] / "d/hidden").write_text("")
    assert three.list("d") == []


def test_redirects_through_several_lowers(three: Core) -> None:
    # the middle layer moved a/b to x/y, the topmost moved x/y to z: the bottom has it at a/b
    (three.lowers[2] / "a/b").mkdir(parents=True)
    (three.lowers[2] / "a/b/bottom").write_text("bottom")
    (three.lowers[1] / "x/y").mkdir(parents=True)
    (three.lowers[1] / "x/y/middle").write_text("middle")
    os.setxattr(three.lowers[1] / "x/y", "trusted.overlay.redirect", b"/a/b")
    (three.lowers[0] / "z").mkdir()
    (three.lowers[0] / "z/top").write_text("top")
    os.setxattr(three.lowers[0] / "z", "trusted.overlay.redirect", b"/x/y")
    assert three.list("z") == ["bottom", "middle", "top"]
    assert three.read("z/bottom") == b"bottom"
    three.open(redirect_dir=RedirectDir.NOFOLLOW)
    with pytest.raises(PermissionError):
        three.node("z")


def test_a_broken_redirect_is_an_error(core: Core) -> None:
    (core.lower / "a").mkdir()
    (core.upper / "b").mkdir()
    os.setxattr(core.upper / "b", "trusted.overlay.redirect", b"/../a")
    with pytest.raises(OSError):
        core.node("b")


def test_lower_alone_is_read_only(three: Core) -> None:
    (three.lowers[2] / "f").write_text("text")
    fs = three.open(upper=None, work=None)
    assert three.read("f") == b"text"
    for call in (
        lambda: three.write("new", b""),
        lambda: three.write("f", b""),
        lambda: three.change("f", mode=0o600),
        lambda: three.unlink("f"),
        lambda: three.mkdir("d"),
        lambda: three.rename("f", "g"),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EROFS
    assert fs.statfs().namemax == 255


def test_changes_of_lower_are_seen(core: Core) -> None:
    (core.lower / "f").write_text("one")
    (core.lower / "d").mkdir()
    first = core.fs.lookup(1, b"f", ROOT)
    held = core.node("d")
    (core.lower / "new").write_text("")
    (core.lower / "other").write_text("another")
    os.rename(core.lower / "other", core.lower / "f")
    assert core.exists("new")
    with pytest.raises(OSError) as caught:
        core.fs.getattr(first.node)
    assert caught.value.errno == errno.ESTALE
    assert core.fs.lookup(1, b"f", ROOT).node != first.node
    assert core.read("f") == b"another"
    os.rmdir(core.lower / "d")
    assert not core.exists("d")
    assert len(list(core.fs.readdir(held, 0))) == 2


def test_the_same_object_is_the_same_node(core: Core) -> None:
    (core.lower / "f").write_text("")
    os.link(core.lower / "f", core.lower / "g")
    fs = core.fs
    assert fs.lookup(1, b"f", ROOT).node == fs.lookup(1, b"f", ROOT).node == core.node("g")
    assert fs.counts()["nodes"] == 2
    fs.forget(core.node("f"), 4)
    assert fs.counts()["nodes"] == 1


def test_names_and_kinds_that_are_wrong(core: Core) -> None:
    (core.lower / "f").write_text("")
    long = "n" * 256
    with pytest.raises(OSError) as caught:
        core.write(long, b"")
    assert caught.value.errno == errno.ENAMETOOLONG
    with pytest.raises(NotADirectoryError):
        core.fs.lookup(core.node("f"), b"x", Caller(0, 0, 1))
    with pytest.raises(OSError) as caught:
        core.fs.getattr(4711)
    assert caught.value.errno == errno.ESTALE
