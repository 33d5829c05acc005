"""POSIX checks: names."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tests.fslab.posix_place import OLD, Place, check, fails


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
