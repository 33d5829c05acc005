"""What a union adds to POSIX: small checks in three parts, divided by `yield`.

The first prepares `union.lower` (and, where a check wants, `union.upper`) before the mount; the
second works in merged (`union / name`) and may look into the layers; the third, after a remount,
sees whether it has lasted. Each check has its own area in all layers.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fslab.fslab_lab import error_of
from tests.fslab.posix_place import OLD, Place, fails, rename2, simple_acl


@dataclass
class Union(Place):
    """One check's area: `root` in merged, and the same in the layers."""

    lower: Path = Path()
    upper: Path = Path()
    kernel: bool = False  # kernel overlayfs, the yardstick

    def low(self) -> Place:
        """The area in lower."""
        return Place(self.lower)

    def up(self) -> Place:
        """The area in upper (made when it isn't there)."""
        self.upper.mkdir(exist_ok=True)
        return Place(self.upper)

    def raw(self, name: str) -> os.stat_result | None:
        """What upper has under that name."""
        try:
            return os.lstat(self.upper / name)
        except FileNotFoundError:
            return None


Check = Callable[[Union], Iterator[None]]
CHECKS: dict[str, Check] = {}
OPAQUE, REDIRECT = "trusted.overlay.opaque", "trusted.overlay.redirect"


def check(function: Check) -> Check:
    """Register a check under its function's name."""
    CHECKS[function.__name__] = function
    return function


def is_whiteout(found: os.stat_result | None) -> bool:
    return found is not None and stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def xattr(path: Path, name: str) -> bytes | None:
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return None


@check
def whiteout_of_a_file(u: Union) -> Iterator[None]:
    u.low().write("f")
    u.low().write("g")
    yield
    os.unlink(u / "f")
    assert is_whiteout(u.raw("f"))
    assert u.ls() == ["g"]
    yield
    assert u.ls() == ["g"]
    fails("ENOENT", os.stat, u / "f")
    fails("ENOENT", os.open, u / "f", os.O_RDONLY)


@check
def whiteout_goes_with_a_new_file(u: Union) -> Iterator[None]:
    u.low().write("f", b"old")
    yield
    os.unlink(u / "f")
    u.write("f", b"new")
    raw = u.raw("f")
    assert raw is not None and stat.S_ISREG(raw.st_mode)
    yield
    assert u.read("f") == b"new"


@check
def no_whiteout_for_what_lower_has_not(u: Union) -> Iterator[None]:
    yield
    u.write("f")
    u.mkdir("d")
    u.write("d/x")
    os.unlink(u / "f")
    os.unlink(u / "d/x")
    os.rmdir(u / "d")
    u.write("a")
    os.rename(u / "a", u / "b")
    assert os.listdir(u.upper) == ["b"]
    yield
    assert u.ls() == ["b"]


@check
def whiteouts_that_were_there(u: Union) -> Iterator[None]:
    for name in ("c", "x", "keep"):
        u.low().write(name)
    u.low().mkdir("dir")
    u.low().write("dir/inner")
    os.mknod(u.up() / "c", stat.S_IFCHR, 0)
    os.mknod(u.up() / "dir", stat.S_IFCHR, 0)
    u.up().write("x", b"")
    os.setxattr(u.upper / "x", "trusted.overlay.whiteout", b"y")
    os.setxattr(u.upper, OPAQUE, b"x")
    yield
    # overlayfs hides this form from lookup, but lists it, unless it is in a lower
    assert u.ls() in (["keep"], ["keep", "x"] if u.kernel else [])
    for name in ("c", "x", "dir", "dir/inner"):
        fails("ENOENT", os.lstat, u / name)
    u.write("x", b"new")
    u.mkdir("dir")
    assert u.ls("dir") == []
    yield
    assert u.ls() == ["dir", "keep", "x"]
    assert u.read("x") == b"new"
    assert u.ls("dir") == []


@check
def directory_made_again_is_opaque(u: Union) -> Iterator[None]:
    u.low().mkdir("d")
    u.low().write("d/f")
    yield
    os.unlink(u / "d/f")
    os.rmdir(u / "d")
    assert is_whiteout(u.raw("d"))
    os.mkdir(u / "d")
    assert xattr(u.upper / "d", OPAQUE) == b"y"
    assert u.ls("d") == []
    yield
    assert u.ls("d") == []
    fails("ENOENT", os.stat, u / "d/f")


@check
def opaque_that_was_there(u: Union) -> Iterator[None]:
    u.low().mkdir("d")
    u.low().write("d/hidden")
    u.low().mkdir("d/sub")
    u.up().mkdir("d")
    u.up().write("d/shown")
    os.setxattr(u.upper / "d", OPAQUE, b"y")
    yield
    assert u.ls("d") == ["shown"]
    fails("ENOENT", os.stat, u / "d/sub")
    fails("ENODATA", os.getxattr, u / "d", OPAQUE)
    assert os.listxattr(u / "d") == []
    os.unlink(u / "d/shown")
    os.rmdir(u / "d")
    assert u.ls() == []
    yield
    assert u.ls() == []


@check
def kinds_over_each_other(u: Union) -> Iterator[None]:
    u.low().mkdir("file-over-dir")
    u.low().write("file-over-dir/x")
    u.low().write("dir-over-file")
    u.low().mkdir("link-over-dir")
    u.up().write("file-over-dir", b"F")
    u.up().mkdir("dir-over-file")
    os.symlink("t", u.up() / "link-over-dir")
    yield
    assert u.read("file-over-dir") == b"F"
    assert u.ls("dir-over-file") == []
    assert os.readlink(u / "link-over-dir") == "t"
    os.unlink(u / "file-over-dir")
    os.mkdir(u / "file-over-dir")
    assert u.ls("file-over-dir") == []
    yield
    assert u.ls("file-over-dir") == []


@check
def merged_directory(u: Union) -> Iterator[None]:
    for name in ("a", "b", "both"):
        u.low().write(name, b"low")
    for name in ("c", "both"):
        u.up().write(name, b"up")
    yield
    assert u.ls() == ["a", "b", "both", "c"]
    assert u.read("both") == b"up"
    with os.scandir(u / ".") as entries:
        for entry in entries:
            assert entry.inode() == entry.stat().st_ino
    assert len({u.stat(n).st_dev for n in u.ls()}) == 1
    yield
    assert u.ls() == ["a", "b", "both", "c"]


def _same(low: os.stat_result, up: os.stat_result | None) -> None:
    assert up is not None
    for field in ("st_mode", "st_uid", "st_gid", "st_rdev", "st_mtime_ns", "st_atime_ns"):
        assert getattr(up, field) == getattr(low, field), field
    if not stat.S_ISDIR(low.st_mode):
        assert up.st_size == low.st_size


@check
def copy_up_of_each_kind(u: Union) -> Iterator[None]:
    low = u.low()
    low.write("file", b"content" * 1000, 0o640)
    low.mkdir("dir", 0o3775)
    os.symlink("target", low / "link")
    os.mkfifo(low / "fifo", 0o600)
    os.mknod(low / "char", stat.S_IFCHR | 0o620, os.makedev(1, 3))
    os.mknod(low / "block", stat.S_IFBLK | 0o660, os.makedev(7, 200))
    os.mknod(low / "socket", stat.S_IFSOCK | 0o666)
    names = sorted(os.listdir(u.lower))
    for index, name in enumerate(names):
        os.chown(low / name, 100 + index, 200 + index, follow_symlinks=False)
        os.setxattr(low / name, "trusted.t", name.encode(), follow_symlinks=False)
        if name not in ("link",):
            os.setxattr(low / name, "system.posix_acl_access", simple_acl(77, 5))
        os.utime(low / name, ns=(OLD + index, OLD + 50 + index), follow_symlinks=False)
    os.chmod(low / "dir", 0o3775)
    os.setxattr(low / "file", "security.capability", b"\1\0\0\2\0\4\0\0" + b"\0" * 12)
    yield
    for name in names:
        os.setxattr(u / name, "trusted.new", b"1", follow_symlinks=False)
        os.removexattr(u / name, "trusted.new", follow_symlinks=False)
    for name in names:
        _same(os.lstat(u.lower / name), u.raw(name))
        low_x = {
            x: xattr(u.lower / name, x) for x in os.listxattr(low / name, follow_symlinks=False)
        }
        up_x = {
            x: xattr(u.upper / name, x)
            for x in os.listxattr(u.upper / name, follow_symlinks=False)
            if "overlay." not in x
        }
        assert low_x == up_x, name
    assert Place(u.upper).read("file") == b"content" * 1000
    yield
    for name in names:
        low_now, now = os.lstat(u.lower / name), u.stat(name)
        assert (now.st_mode, now.st_uid) == (low_now.st_mode, low_now.st_uid)
        assert now.st_mtime_ns == low_now.st_mtime_ns


@check
def what_copies_up_and_what_not(u: Union) -> Iterator[None]:
    triggers: dict[str, Callable[[str], object]] = {
        "write": lambda p: os.close(os.open(p, os.O_WRONLY)),
        "readwrite": lambda p: os.close(os.open(p, os.O_RDWR)),
        "append": lambda p: os.close(os.open(p, os.O_WRONLY | os.O_APPEND)),
        "truncate": lambda p: os.truncate(p, 1),
        "chmod": lambda p: os.chmod(p, 0o611),
        "chown": lambda p: os.chown(p, 3, 3),
        "utime": lambda p: os.utime(p, ns=(OLD, OLD)),
        "setxattr": lambda p: os.setxattr(p, "user.x", b"1"),
        "acl": lambda p: os.setxattr(p, "system.posix_acl_access", simple_acl(7, 7)),
        "link": lambda p: os.link(p, p + "-new"),
    }
    harmless: dict[str, Callable[[str], object]] = {
        "read": lambda p: Path(p).read_bytes(),
        "stat": lambda p: os.stat(p),
        "path": lambda p: os.close(os.open(p, os.O_PATH)),
        "access": lambda p: os.access(p, os.R_OK | os.W_OK),
        "listxattr": lambda p: os.listxattr(p),
        "removexattr": lambda p: error_of(os.removexattr, p, "user.none"),
    }
    for name in (*triggers, *harmless):
        u.low().write(name, b"some data")
    yield
    for name, call in (triggers | harmless).items():
        call(u / name)
        assert (u.raw(name) is not None) == (name in triggers), name
    yield
    for name in (*triggers, *harmless):
        assert u.read(name) == (b"s" if name == "truncate" else b"some data"), name


@check
def copy_up_keeps_holes(u: Union) -> Iterator[None]:
    with open(u.lower / "f", "wb") as file:
        file.truncate(64 << 20)
        for offset in (0, 10 << 20, 40 << 20):
            file.seek(offset)
            file.write(b"data" * 1024)
    yield
    os.chmod(u / "f", 0o600)
    raw = u.raw("f")
    assert raw is not None and raw.st_size == 64 << 20
    assert raw.st_blocks * 512 <= 16 << 20
    fd = u.open("f", os.O_RDONLY)
    for offset in (0, 10 << 20, 40 << 20):
        assert os.pread(fd, 4096, offset) == b"data" * 1024
        assert os.pread(fd, 10, offset + 5000) == b"\0" * 10
    u.close_all()
    yield


@check
def copy_up_makes_parents_as_they_were(u: Union) -> Iterator[None]:
    low = u.low()
    for path, ids in (("a", 5), ("a/b", 6), ("a/b/c", 7)):
        low.mkdir(path, 0o751)
        os.chown(low / path, ids, ids)
        os.setxattr(low / path, "user.name", path.encode())
    low.write("a/b/c/f")
    for path in ("a/b/c", "a/b", "a"):
        os.utime(low / path, ns=(OLD, OLD + len(path)))
    yield
    os.chmod(u / "a/b/c/f", 0o600)
    for path in ("a", "a/b", "a/b/c"):
        raw = u.raw(path)
        assert raw is not None
        own = os.lstat(u.lower / path)
        assert (raw.st_mode, raw.st_uid, raw.st_mtime_ns) == (
            own.st_mode, own.st_uid, own.st_mtime_ns
        )  # fmt: skip
        assert xattr(u.upper / path, "user.name") == path.encode()
    yield
    assert u.stat("a/b").st_mtime_ns == OLD + 3


@check
def hard_links_stay_together(u: Union) -> Iterator[None]:
    u.low().write("a", b"1")
    u.low().mkdir("d")
    os.link(u.lower / "a", u.lower / "d/b")
    os.link(u.lower / "a", u.lower / "c")
    yield
    inode = u.stat("a").st_ino
    with open(u / "d/b", "ab") as file:
        file.write(b"2")
    assert u.read("a") == u.read("c") == b"12"
    assert {u.stat(n).st_ino for n in ("a", "d/b", "c")} == {inode}
    assert {u.stat(n).st_nlink for n in ("a", "d/b", "c")} == {3}
    yield
    assert {u.stat(n).st_nlink for n in ("a", "d/b", "c")} == {3}
    assert {u.stat(n).st_ino for n in ("a", "d/b", "c")} == {inode}
    with open(u / "c", "ab") as file:
        file.write(b"3")
    assert u.read("a") == u.read("d/b") == b"123"
    os.unlink(u / "a")
    assert u.stat("c").st_nlink == 2


@check
def hard_links_removed_and_renamed(u: Union) -> Iterator[None]:
    u.low().write("a", b"1")
    os.link(u.lower / "a", u.lower / "b")
    os.link(u.lower / "a", u.lower / "c")
    yield
    os.unlink(u / "a")
    assert u.stat("b").st_nlink == 2
    os.rename(u / "b", u / "d")
    assert u.stat("d").st_nlink == 2
    assert u.stat("d").st_ino == u.stat("c").st_ino
    os.truncate(u / "c", 0)
    assert u.read("d") == b""
    yield
    assert u.ls() == ["c", "d"]
    assert u.stat("d").st_ino == u.stat("c").st_ino
    assert u.stat("d").st_nlink == 2


@check
def directory_of_lower_renamed(u: Union) -> Iterator[None]:
    low = u.low()
    low.mkdir("d", 0o750)
    low.write("d/f", b"F")
    low.mkdir("d/sub")
    low.write("d/sub/g", b"G")
    yield
    inodes = u.stat("d").st_ino, u.stat("d/sub/g").st_ino
    os.rename(u / "d", u / "e")
    assert is_whiteout(u.raw("d"))
    assert xattr(u.upper / "e", REDIRECT) == b"d"
    assert u.ls("e") == ["f", "sub"]
    u.write("e/new")
    os.unlink(u / "e/f")
    assert (u.stat("e").st_ino, u.stat("e/sub/g").st_ino) == inodes
    yield
    assert u.ls() == ["e"]
    assert u.ls("e") == ["new", "sub"]
    assert u.read("e/sub/g") == b"G"
    assert u.mode("e") == 0o750
    assert (u.stat("e").st_ino, u.stat("e/sub/g").st_ino) == inodes


@check
def directory_of_lower_moved_elsewhere(u: Union) -> Iterator[None]:
    low = u.low()
    for path in ("a", "a/b", "a/b/c", "z"):
        low.mkdir(path)
    low.write("a/b/c/f", b"F")
    yield
    os.rename(u / "a/b/c", u / "z/c")
    redirect = xattr(u.upper / "z/c", REDIRECT)
    assert redirect is not None and redirect.startswith(b"/") and redirect.endswith(b"/a/b/c")
    os.rename(u / "a/b", u / "z/b")
    os.rename(u / "z/c", u / "z/b/c2")
    os.mkdir(u / "a/b")
    assert u.ls("a/b") == []
    assert u.read("z/b/c2/f") == b"F"
    yield
    assert u.ls("a/b") == []
    assert u.ls("z") == ["b"]
    assert u.ls("z/b") == ["c2"]
    assert u.read("z/b/c2/f") == b"F"
    os.rename(u / "z/b/c2", u / "a/b/c")
    assert u.read("a/b/c/f") == b"F"


@check
def directory_renamed_over_another_of_lower(u: Union) -> Iterator[None]:
    low = u.low()
    low.mkdir("from")
    low.write("from/f", b"F")
    low.mkdir("to")
    low.write("to/hidden")
    yield
    os.unlink(u / "to/hidden")
    os.rename(u / "from", u / "to")
    assert u.ls() == ["to"]
    assert u.ls("to") == ["f"]
    yield
    assert u.ls("to") == ["f"]
    assert u.read("to/f") == b"F"


@check
def new_directory_renamed_over_one_of_lower(u: Union) -> Iterator[None]:
    u.low().mkdir("d")
    u.low().write("d/hidden")
    yield
    u.mkdir("new")
    u.write("new/f")
    os.unlink(u / "d/hidden")
    os.rename(u / "new", u / "d")
    assert u.ls("d") == ["f"]
    assert xattr(u.upper / "d", OPAQUE) == b"y"
    yield
    assert u.ls("d") == ["f"]


@check
def exchange_of_layers(u: Union) -> Iterator[None]:
    u.low().write("low", b"low")
    u.low().mkdir("d")
    u.low().write("d/f")
    yield
    u.write("new", b"new")
    u.mkdir("e")
    u.write("e/g")
    rename2(u / "low", u / "new", 2)
    rename2(u / "d", u / "e", 2)
    assert (u.read("low"), u.read("new")) == (b"new", b"low")
    assert (u.ls("d"), u.ls("e")) == (["g"], ["f"])
    yield
    assert (u.read("low"), u.read("new")) == (b"new", b"low")
    assert (u.ls("d"), u.ls("e")) == (["g"], ["f"])


@check
def directory_that_is_empty_only_when_merged(u: Union) -> Iterator[None]:
    u.low().mkdir("d")
    for name in ("a", "b", "c"):
        u.low().write(f"d/{name}")
    yield
    for name in ("a", "b"):
        os.unlink(u / f"d/{name}")
    fails("ENOTEMPTY", os.rmdir, u / "d")
    os.unlink(u / "d/c")
    assert u.ls("d") == []
    os.rmdir(u / "d")
    assert is_whiteout(u.raw("d"))
    yield
    assert u.ls() == []


@check
def inodes_are_stable(u: Union) -> Iterator[None]:
    low = u.low()
    low.write("f")
    low.mkdir("d")
    low.write("d/g")
    os.symlink("x", low / "l")
    yield
    names = ("f", "d", "d/g", "l")
    inodes = [u.stat(n).st_ino for n in names]
    u.write("f", b"changed")
    os.chmod(u / "d", 0o700)
    os.rename(u / "d/g", u / "d/h")
    os.chown(u / "l", 1, 1, follow_symlinks=False)
    names = ("f", "d", "d/h", "l")
    assert [u.stat(n).st_ino for n in names] == inodes
    yield
    assert [u.stat(n).st_ino for n in names] == inodes
    with os.scandir(u / ".") as entries:
        assert {e.name: e.inode() for e in entries} == {
            n: u.stat(n).st_ino for n in ("f", "d", "l")
        }  # fmt: skip


@check
def xattrs_of_overlay_are_hidden(u: Union) -> Iterator[None]:
    u.up().write("f")
    for name in ("opaque", "origin", "impure", "metacopy", "redirect"):
        if name != "metacopy":
            os.setxattr(u.upper / "f", f"trusted.overlay.{name}", b"y")
    u.low().write("g")
    os.setxattr(u.lower / "g", "user.visible", b"1")
    yield
    assert os.listxattr(u / "f") == []
    fails("ENODATA", os.getxattr, u / "f", "trusted.overlay.origin")
    os.chmod(u / "g", 0o600)
    assert os.listxattr(u / "g") == ["user.visible"]
    yield
    assert os.listxattr(u / "f") == []


@check
def xattrs_of_a_nested_overlay_are_escaped(u: Union) -> Iterator[None]:
    u.low().write("f")
    yield
    os.setxattr(u / "f", "trusted.overlay.opaque", b"y")
    assert os.listxattr(u / "f") == ["trusted.overlay.opaque"]
    assert os.getxattr(u / "f", "trusted.overlay.opaque") == b"y"
    assert xattr(u.upper / "f", "trusted.overlay.overlay.opaque") == b"y"
    yield
    assert os.getxattr(u / "f", "trusted.overlay.opaque") == b"y"
    os.removexattr(u / "f", "trusted.overlay.opaque")
    assert os.listxattr(u / "f") == []


@check
def reader_and_writer_at_once(u: Union) -> Iterator[None]:
    import mmap

    u.low().write("f", b"#" * 8192)
    yield
    reader = u.open("f", os.O_RDONLY)
    with mmap.mmap(reader, 8192, mmap.MAP_SHARED, mmap.PROT_READ) as before:
        assert before[0:1] == b"#"
        writer = u.open("f", os.O_RDWR)
        os.pwrite(writer, b"new", 4096)
        with mmap.mmap(writer, 8192) as area:
            area[0:3] = b"map"
            area.flush()
        # opened after the copy-up, while the old reader still is:
        late = u.open("f", os.O_RDONLY)
        assert os.pread(late, 3, 0) == b"map"
        assert os.pread(late, 3, 4096) == b"new"
        assert os.pread(writer, 3, 0) == b"map"
        assert os.pread(reader, 3, 0) in (b"map", b"###")
        assert before[4096:4099] in (b"new", b"###")
        assert u.stat("f").st_size == 8192
    u.close_all()
    assert u.read("f")[:3] == b"map"
    yield
    assert u.read("f")[4096:4099] == b"new"


@check
def open_file_outlives_its_directory(u: Union) -> Iterator[None]:
    u.low().mkdir("d")
    u.low().write("d/f", b"alive")
    yield
    reader = u.open("d/f", os.O_RDONLY)
    writer = u.open("d/f", os.O_RDWR)
    os.unlink(u / "d/f")
    os.rmdir(u / "d")
    os.pwrite(writer, b"A", 0)
    assert os.pread(writer, 5, 0) == b"Alive"
    assert os.pread(reader, 5, 0) in (b"alive", b"Alive")
    os.mkdir(u / "d")
    u.write("d/f", b"other")
    assert os.pread(writer, 5, 0) == b"Alive"
    u.close_all()
    yield
    assert u.read("d/f") == b"other"


@check
def new_names_for_a_lower_file(u: Union) -> Iterator[None]:
    u.low().write("f", b"F")
    yield
    os.link(u / "f", u / "g")
    os.unlink(u / "f")
    os.rename(u / "g", u / "h")
    os.link(u / "h", u / "f")
    assert u.stat("f").st_nlink == 2
    yield
    assert u.ls() == ["f", "h"]
    assert u.stat("f").st_ino == u.stat("h").st_ino
    assert u.read("f") == b"F"


@check
def volatile_names(u: Union) -> Iterator[None]:
    u.low().mkdir("a")
    u.low().write("a/f", b"0")
    yield
    for round_ in range(10):
        os.rename(u / "a", u / "b")
        u.write(f"b/f{round_}")
        os.rename(u / "b", u / "a")
    assert len(u.ls("a")) == 11
    yield
    assert len(u.ls("a")) == 11
    assert u.read("a/f") == b"0"
