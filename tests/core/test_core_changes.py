"""Creating, removing and renaming; what is then on disk is read by kernel overlayfs."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mount_helpers.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from sdeefs.core.api import Io
from sdeefs.core.ids import ACL_DEFAULT, pack_acl
from sdeefs.core.settings import RedirectDir, WhiteoutForm
from tests.core.core_lab import ROOT, USER, Core, finish


@contextmanager
def overlayfs(core: Core, *options: str) -> Iterator[Path]:
    """The same layers under the kernel's engine."""
    core.close()
    point = core.base / "kernel"
    point.mkdir(exist_ok=True)
    lowers = ":".join(map(str, core.lowers))
    words = [f"lowerdir={lowers}", f"upperdir={core.upper}", f"workdir={core.work}"]
    words += options or ("redirect_dir=on", "index=on")
    command = ["mount", "-t", "overlay", "overlay", "-o", ",".join(words), str(point)]
    subprocess.run(command, check=True, timeout=60)
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True, timeout=60)


def tree(point: Path) -> dict[str, tuple[int, str]]:
    """Type and content of everything."""
    found = {}
    for directory, names, files in os.walk(point):
        for name in [*names, *files]:
            path = Path(directory, name)
            mode = path.lstat().st_mode
            text = path.read_text() if stat.S_ISREG(mode) else ""
            found[str(path.relative_to(point))] = (mode, text)
    return found


def merged(core: Core, path: str = "") -> dict[str, tuple[int, str]]:
    """The same of the core."""
    found = {}
    for name in core.list(path):
        full = f"{path}/{name}".strip("/")
        mode = core.stat(full).mode
        found[full] = (mode, core.read(full).decode() if stat.S_ISREG(mode) else "")
        if stat.S_ISDIR(mode):
            found.update(merged(core, full))
    return found


def fails(number: int, call: object, *arguments: object) -> None:
    """The call raises this errno."""
    assert callable(call)
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.errno == number, caught.value


def build(core: Core) -> None:
    for name in ("a", "b", "c"):
        (core.lower / name / "sub").mkdir(parents=True)
        (core.lower / name / "f").write_text(name)
        (core.lower / name / "sub/g").write_text(name)
    (core.lower / "file").write_text("file")


def test_new_objects_belong_to_the_caller(core: Core) -> None:
    core.write("f", b"text", caller=USER)
    core.mkdir("d", 0o777, USER)
    finish(core.fs.mknod(1, b"p", stat.S_IFIFO | 0o666, 0, 0o002, USER))
    finish(core.fs.symlink(1, b"l", b"to", USER))
    for name, mode in (("f", 0o644), ("d", 0o755), ("p", 0o664), ("l", 0o777)):
        found = core.stat(name)
        assert (found.uid, found.gid, stat.S_IMODE(found.mode)) == (1234, 1235, mode)
    fails(errno.EPERM, core.fs.mknod, 1, b"w", stat.S_IFCHR, 0, 0, ROOT)
    fails(errno.EEXIST, core.mkdir, "f")


def test_setgid_directories_and_default_acls(disk: Core) -> None:
    disk.mkdir("s")
    disk.change("s", gid=77)
    disk.change("s", mode=0o2775)
    disk.write("s/f", b"", caller=USER)
    disk.mkdir("s/d", 0o755, USER)
    assert disk.stat("s/f").gid == disk.stat("s/d").gid == 77
    assert disk.stat("s/d").mode & stat.S_ISGID
    default = pack_acl(
        [(1, 7, 0xFFFFFFFF), (2, 7, 99), (4, 5, 0xFFFFFFFF), (0x10, 7, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF)]
    )  # fmt: skip
    disk.mkdir("acl")
    disk.fs.setxattr(disk.node("acl"), ACL_DEFAULT, default, 0, ROOT)
    (disk.lower / "low").mkdir()
    disk.mkdir("low/x")
    disk.write("acl/f", b"")
    disk.mkdir("acl/d", 0o770)
    assert stat.S_IMODE(disk.stat("acl/f").mode) == 0o640
    assert disk.fs.getxattr(disk.node("acl/d"), ACL_DEFAULT, ROOT) == default


def test_over_a_whiteout(disk: Core) -> None:
    build(disk)
    disk.unlink("file")
    disk.write("file", b"again", caller=USER)
    disk.unlink("a/f")
    disk.mkdir("a/f", 0o750, USER)
    disk.unlink("b/f")
    disk.link("file", "b/f")
    for name in ("f", "sub/g"):
        disk.unlink(f"c/{name}")
    disk.rmdir("c/sub")
    disk.rmdir("c")
    disk.mkdir("c", 0o700, USER)
    assert disk.list("c") == [] and disk.read("file") == b"again"
    assert disk.stat("c").uid == 1234 and disk.stat("file").nlink == 2
    before = merged(disk)
    with overlayfs(disk) as point:
        assert tree(point) == before


def test_removal_of_all_kinds(core: Core) -> None:
    build(core)
    (core.upper / "a").mkdir()
    (core.upper / "a/new").write_text("new")
    fails(errno.ENOTEMPTY, core.rmdir, "a")
    fails(errno.ENOTDIR, core.rmdir, "file")
    fails(errno.EISDIR, core.unlink, "a")
    for name in ("a/new", "a/f", "a/sub/g"):
        core.unlink(name)
    core.rmdir("a/sub")
    core.rmdir("a")
    core.write("upper", b"")
    core.unlink("upper")
    assert core.list() == ["b", "c", "file"]
    assert sorted(os.listdir(core.upper)) == ["a"]
    before = merged(core)
    with overlayfs(core) as point:
        assert tree(point) == before


def test_open_files_live_on(core: Core) -> None:
    (core.lower / "low").write_text("low")
    core.write("up", b"up")
    core.write("over", b"over")
    opened = {
        n: finish(core.fs.open(core.node(n), os.O_RDONLY, ROOT)) for n in ("low", "up", "over")
    }
    nodes = {n: core.node(n) for n in opened}
    core.unlink("low")
    core.unlink("up")
    core.write("other", b"other")
    core.rename("other", "over")
    for name, file in opened.items():
        assert core.fs.read(file.handle, 0, 10) == name.encode()
        assert core.fs.getattr(nodes[name])[0].size == len(name)
    assert core.fs.getattr(nodes["up"])[0].nlink == 0
    core.change("over", mode=0o600)
    descriptors = len(os.listdir("/proc/self/fd"))
    for name, file in opened.items():
        core.fs.release(file.handle)
        core.fs.forget(nodes[name], 100)
    assert len(os.listdir("/proc/self/fd")) < descriptors


def test_renames_of_files(core: Core) -> None:
    build(core)
    core.rename("file", "a/moved")
    core.rename("a/f", "b/f")
    core.write("new", b"new")
    core.rename("new", "c/f")
    fails(errno.EEXIST, core.rename, "c/f", "b/f", RENAME_NOREPLACE)
    core.rename("c/f", "b/f", RENAME_EXCHANGE)
    fails(errno.ENOENT, core.rename, "c/f", "nothing", RENAME_EXCHANGE)
    fails(errno.EINVAL, core.rename, "c/f", "w", RENAME_WHITEOUT)
    assert core.read("b/f") == b"new" and core.read("c/f") == b"a"
    assert core.list("a") == ["moved", "sub"]
    before = merged(core)
    with overlayfs(core) as point:
        assert tree(point) == before
        (point / "a/f").write_text("by the kernel")
    assert core.read("a/f") == b"by the kernel"


def test_renames_of_directories(core: Core) -> None:
    build(core)
    core.rename("a", "moved")
    core.write("moved/sub/g", b"changed")
    core.rename("moved/sub", "b/sub2")
    core.mkdir("empty")
    core.rename("c/sub", "empty")
    core.rename("b", "c", RENAME_EXCHANGE)
    fails(errno.ENOTEMPTY, core.rename, "b", "c")
    fails(errno.EINVAL, core.rename, "c", "c/f2")
    fails(errno.ENOTDIR, core.rename, "b", "c/f")
    fails(errno.EISDIR, core.rename, "c/f", "b")
    core.mkdir("pure")
    core.rename("pure", "a")
    assert core.list("a") == []
    assert core.list("moved") == ["f"] and core.list("empty") == ["g"]
    before = merged(core)
    core.open()
    assert merged(core) == before
    with overlayfs(core) as point:
        assert tree(point) == before
        os.rename(point / "c", point / "k")
        os.rename(point / "k/sub", point / "moved/s")
    assert core.list("k") == ["f", "sub2"] and core.read("moved/s/g") == b"b"


def test_without_redirects_directories_of_lower_stay(core: Core) -> None:
    build(core)
    core.open(redirect_dir=RedirectDir.OFF)
    fails(errno.EXDEV, core.rename, "a", "moved")
    core.mkdir("up")
    core.rename("up", "up2")
    assert core.list() == ["a", "b", "c", "file", "up2"]


@pytest.mark.parametrize("form", [WhiteoutForm.XATTR, WhiteoutForm.PREFIX])
def test_other_forms_of_whiteouts(core: Core, form: WhiteoutForm) -> None:
    build(core)
    core.open(whiteouts=form)
    core.unlink("file")
    core.rename("a/f", "a/g")
    core.rename("b", "d")
    core.unlink("c/f")
    core.unlink("c/sub/g")
    core.rmdir("c/sub")
    core.mkdir("e")
    core.rename("e", "c/e")
    core.rename("c/e", "c/sub")
    core.rmdir("c/sub")
    core.rmdir("c")
    core.mkdir("c")
    core.write("c/f", b"new")
    expected = {"a", "a/g", "a/sub", "a/sub/g", "d", "d/f", "d/sub", "d/sub/g", "c", "c/f"}
    for _ in range(2):
        assert set(merged(core)) == expected
        core.open()
    for directory, names, files in os.walk(core.upper):
        assert not any(stat.S_ISCHR(os.lstat(f"{directory}/{n}").st_mode) for n in names + files)


def test_the_kernels_upper_is_ours(core: Core) -> None:
    build(core)
    with overlayfs(core) as point:
        os.rename(point / "a", point / "x")
        os.rename(point / "x/sub", point / "b/y")
        (point / "b/f").write_text("changed")
        (point / "c/f").unlink()
        subprocess.run(["rm", "-r", str(point / "c")], check=True, timeout=60)
        (point / "c").mkdir()
        expected = tree(point)
        inos = {name: (point / name).lstat().st_ino for name in expected}
    assert merged(core) == expected
    assert {name: core.stat(name).ino for name in expected} == inos


def test_creation_goes_through_to_the_file(core: Core) -> None:
    core.fs.passthrough = True
    entry, opened = finish(core.fs.create(1, b"f", 0o640, os.O_RDWR, 0o022, USER))
    assert opened.io is Io.PASSTHROUGH and os.fstat(opened.backing).st_ino == entry.attributes.ino
    core.fs.write(opened.handle, 0, b"text", False)
    assert core.fs.fsync(opened.handle, True).finish() is None
    core.fs.release(opened.handle)
    fails(errno.EBADF, core.fs.read, opened.handle, 0, 1)
    fails(errno.EEXIST, core.fs.create, 1, b"f", 0o640, os.O_RDWR | os.O_EXCL, 0, USER)


def test_nameless_files_get_names(core: Core) -> None:
    entry, opened = finish(core.fs.tmpfile(1, 0o600, os.O_RDWR, 0, USER))
    core.fs.write(opened.handle, 0, b"text", False)
    assert core.list() == [] and core.fs.getattr(entry.node)[0].nlink == 0
    finish(core.fs.link(entry.node, 1, b"named", USER))
    core.fs.release(opened.handle)
    assert core.read("named") == b"text" and core.stat("named").uid == 1234


def test_data_requests(disk: Core) -> None:
    _, opened = finish(disk.fs.create(1, b"f", 0o4755, os.O_RDWR, 0, ROOT))
    fs, handle = disk.fs, opened.handle
    fs.write(handle, 1 << 20, b"data", False)
    assert stat.S_IMODE(disk.stat("f").mode) == 0o4755
    fs.write(handle, 0, b"x", True)
    assert stat.S_IMODE(disk.stat("f").mode) == 0o755
    assert fs.lseek(handle, 1 << 16, os.SEEK_DATA) == 1 << 20
    finish(fs.fallocate(handle, 0, 0, 3 << 20, ROOT))
    assert disk.stat("f").size == 3 << 20
    _, target = finish(fs.create(1, b"g", 0o644, os.O_RDWR, 0, ROOT))
    assert finish(fs.copy_file_range(handle, 1 << 20, target.handle, 5, 4, ROOT)) == 4
    assert fs.read(target.handle, 0, 100) == bytes(5) + b"data"
    reader = finish(fs.open(disk.node("g"), os.O_RDONLY, ROOT))
    fails(errno.EBADF, fs.write, reader.handle, 0, b"", False)
    finish(fs.fsyncdir(1, False))
    finish(fs.syncfs())


def test_a_work_directory_that_root_left(disk: Core) -> None:
    """Kernel overlayfs mounted by root leaves work/work with mode 0, which its user can't read."""
    (disk.work / "work").mkdir(mode=0)
    for path in (disk.upper, disk.work):
        os.chown(path, USER.uid, USER.gid)
    pid = os.fork()
    if not pid:
        try:
            os.setgroups([])
            os.setresgid(USER.gid, USER.gid, USER.gid)
            os.setresuid(USER.uid, USER.uid, USER.uid)
            disk.open(userxattr=True).close()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert (disk.work / "work").stat().st_uid == USER.uid
