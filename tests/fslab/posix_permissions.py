"""POSIX checks: permissions."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator

from tests.fslab.fslab_lab import ALICE, BOB, acting_as, child_result, error_of, in_child
from tests.fslab.posix_place import Place, check, fails


@check
def permission_bits(p: Place) -> Iterator[None]:
    p.write("owner", mode=0o600)
    os.chown(p / "owner", ALICE[0], ALICE[1])
    p.write("group", mode=0o060)
    os.chown(p / "group", 0, ALICE[1])
    p.write("others", mode=0o006)
    p.write("none", mode=0o000)
    yield
    with acting_as(ALICE):
        for name in ("owner", "group", "others"):
            os.close(os.open(p / name, os.O_RDWR))
        fails("EACCES", os.open, p / "none", os.O_RDONLY)
        fails("EACCES", os.open, p / "none", os.O_WRONLY)
        assert os.access(p / "owner", os.W_OK, effective_ids=True)
        assert not os.access(p / "none", os.R_OK, effective_ids=True)
    with acting_as(BOB):
        fails("EACCES", os.open, p / "owner", os.O_RDONLY)
        fails("EACCES", os.open, p / "group", os.O_RDONLY)


@check
def permission_of_owner_comes_first(p: Place) -> Iterator[None]:
    p.write("f", mode=0o077)
    os.chown(p / "f", ALICE[0], ALICE[1])
    yield
    with acting_as(ALICE):
        fails("EACCES", os.open, p / "f", os.O_RDONLY)
    with acting_as(BOB):
        os.close(os.open(p / "f", os.O_RDONLY))


@check
def permission_of_supplementary_group(p: Place) -> Iterator[None]:
    p.write("f", mode=0o060)
    os.chown(p / "f", 0, 60003)
    p.mkdir("d", 0o770)
    os.chown(p / "d", 0, 60003)
    yield
    with acting_as(BOB):
        fd = os.open(p / "f", os.O_RDWR)
        os.write(fd, b"bob")
        os.close(fd)
        p.write("d/new")
    with acting_as(ALICE):
        fails("EACCES", os.open, p / "f", os.O_RDONLY)
        fails("EACCES", os.listdir, p / "d")


@check
def permission_to_create_and_remove(p: Place) -> Iterator[None]:
    p.mkdir("d", 0o755)
    p.write("d/f")
    yield
    with acting_as(ALICE):
        fails("EACCES", os.open, p / "d/new", os.O_CREAT | os.O_WRONLY)
        fails("EACCES", os.mkdir, p / "d/new")
        fails("EACCES", os.symlink, "x", p / "d/new")
        fails("EACCES", os.mkfifo, p / "d/new")
        fails("EACCES", os.unlink, p / "d/f")
        fails("EACCES", os.rename, p / "d/f", p / "d/g")
        assert error_of(os.link, p / "d/f", p / "d/g") in ("EACCES", "EPERM")
    assert p.ls("d") == ["f"]


@check
def permission_to_search(p: Place) -> Iterator[None]:
    p.mkdir("d", 0o700)
    p.mkdir("d/e", 0o777)
    p.write("d/e/f", mode=0o666)
    yield
    with acting_as(ALICE):
        fails("EACCES", os.stat, p / "d/e/f")
        fails("EACCES", os.open, p / "d/e/f", os.O_RDONLY)
        fails("EACCES", os.listdir, p / "d/e")
    os.chmod(p / "d", 0o711)
    with acting_as(ALICE):
        os.close(os.open(p / "d/e/f", os.O_RDWR))


@check
def new_files_belong_to_the_caller(p: Place) -> Iterator[None]:
    p.mkdir("d", 0o777)
    yield
    with acting_as(ALICE, umask=0o027):
        os.close(os.open(p / "d/f", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(p / "d/e", 0o777)
        os.symlink("x", p / "d/l")
        os.mkfifo(p / "d/p", 0o666)
    for name, mode in (("f", 0o640), ("e", 0o750), ("l", 0o777), ("p", 0o640)):
        now = p.stat(f"d/{name}")
        assert (now.st_uid, now.st_gid) == ALICE[:2], name
        assert stat.S_IMODE(now.st_mode) == mode, name


@check
def umask_of_root(p: Place) -> Iterator[None]:
    yield
    old = os.umask(0o077)
    try:
        os.close(os.open(p / "f", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(p / "d", 0o777)
        os.umask(0)
        os.close(os.open(p / "g", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(p / "e", 0o1777)
    finally:
        os.umask(old)
    assert [p.mode(n) for n in ("f", "d", "g", "e")] == [0o600, 0o700, 0o666, 0o1777]


@check
def setgid_directory_is_inherited(p: Place) -> Iterator[None]:
    p.mkdir("d")
    os.chown(p / "d", 0, 60003)
    os.chmod(p / "d", 0o2777)
    yield
    with acting_as(ALICE, umask=0o022):
        os.close(os.open(p / "d/f", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(p / "d/e")
        os.mkfifo(p / "d/p")
        os.symlink("x", p / "d/l")
    for name in ("f", "e", "p", "l"):
        assert (p.stat(f"d/{name}").st_uid, p.stat(f"d/{name}").st_gid) == (60001, 60003), name
    assert p.mode("d/e") == 0o2755
    assert p.mode("d/f") == 0o644


@check
def setgid_directory_strips_sgid_of_files(p: Place) -> Iterator[None]:
    p.mkdir("d")
    os.chown(p / "d", 0, 60003)
    os.chmod(p / "d", 0o2777)
    yield
    with acting_as(ALICE, umask=0):
        os.close(os.open(p / "d/f", os.O_CREAT | os.O_WRONLY, 0o2775))
    with acting_as(BOB, umask=0):  # who is in the group
        os.close(os.open(p / "d/g", os.O_CREAT | os.O_WRONLY, 0o2775))
    assert p.mode("d/f") == 0o775
    assert p.mode("d/g") == 0o2775


@check
def setgid_directory_with_copy_up(p: Place) -> Iterator[None]:
    p.mkdir("d", 0o2755)
    os.chown(p / "d", 0, 60003)
    os.chmod(p / "d", 0o2755)
    p.write("d/f")
    p.mkdir("d/e")
    yield
    os.chmod(p / "d/f", 0o600)
    p.write("d/e/new")
    assert p.mode("d") == 0o2755
    assert p.stat("d/f").st_gid == p.stat("d/f").st_gid


@check
def sticky_directory(p: Place) -> Iterator[None]:
    p.mkdir("d", 0o1777)
    for name, who in (("a", ALICE), ("b", BOB)):
        p.write(f"d/{name}", mode=0o666)
        os.chown(p / f"d/{name}", who[0], who[1])
    yield
    with acting_as(ALICE):
        fails("EPERM", os.unlink, p / "d/b")
        fails("EPERM", os.rename, p / "d/b", p / "d/c")
        fails("EPERM", os.rename, p / "d/a", p / "d/b")
        os.rename(p / "d/a", p / "d/a2")
        os.unlink(p / "d/a2")
    assert p.ls("d") == ["b"]


@check
def sticky_directory_of_the_owner(p: Place) -> Iterator[None]:
    p.mkdir("d", 0o1777)
    os.chown(p / "d", ALICE[0], ALICE[1])
    os.chmod(p / "d", 0o1777)
    p.write("d/b")
    yield
    with acting_as(ALICE):
        os.unlink(p / "d/b")
    assert p.ls("d") == []


@check
def rename_of_foreign_directory_in_sticky(p: Place) -> Iterator[None]:
    p.mkdir("d", 0o777)
    p.mkdir("d/sub", 0o755)
    p.mkdir("d/other", 0o777)
    yield
    with acting_as(ALICE):
        # moving a directory to another parent writes its "..", which needs write permission
        fails("EACCES", os.rename, p / "d/sub", p / "d/other/sub")
        os.rename(p / "d/sub", p / "d/sub2")
    assert p.ls("d") == ["other", "sub2"]


@check
def root_reads_everything(p: Place) -> Iterator[None]:
    p.write("f", b"secret", 0o000)
    os.chown(p / "f", 7, 7)
    p.mkdir("d", 0o000)
    yield
    assert p.read("f") == b"secret"
    p.write("d/x")
    assert p.ls("d") == ["x"]
    assert p.mode("f") == 0


@check
def execution_permission(p: Place) -> Iterator[None]:
    p.write("run", b"#!/bin/sh\nexit 42\n", 0o755)
    p.write("not", b"#!/bin/sh\nexit 42\n", 0o644)
    yield

    def execute(name: str) -> Callable[[], object]:
        return lambda: os.execv(p / name, [name])

    assert child_result(in_child(execute("run"))) == 42
    assert child_result(in_child(execute("not"))) == errno.EACCES


@check
def written_program_is_busy(p: Place) -> Iterator[None]:
    with open("/bin/sleep", "rb") as file:
        p.write("sleep", file.read(), 0o755)
    yield
    fd = p.open("sleep", os.O_WRONLY)
    got = child_result(in_child(lambda: os.execv(p / "sleep", ["sleep", "0"])))
    assert got == errno.ETXTBSY
    os.close(fd)
    assert child_result(in_child(lambda: os.execv(p / "sleep", ["sleep", "0"]))) == 0


@check
def suid_program_runs_as_its_owner(p: Place) -> Iterator[None]:
    with open("/usr/bin/id", "rb") as file:
        p.write("id", file.read())
    os.chown(p / "id", BOB[0], BOB[1])
    os.chmod(p / "id", 0o4755)
    p.write("out", b"", 0o666)
    yield

    def run_it() -> None:
        fd = os.open(p / "out", os.O_WRONLY)
        os.dup2(fd, 1)
        os.execv(p / "id", ["id", "-u"])

    assert child_result(in_child(run_it, ALICE)) == 0
    assert p.read("out") == b"%d\n" % (ALICE[0] if _nosuid(p) else BOB[0])


def _nosuid(p: Place) -> bool:
    return bool(os.statvfs(p.root).f_flag & os.ST_NOSUID)
