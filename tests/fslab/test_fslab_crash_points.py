"""Killed before each single system call of a change: the old object or the new one, never half of
one. The core is called directly, without a mount; what it leaves is read through kernel overlayfs."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from mount_helpers import syscalls
from sdeefs.core.api import ROOT_NODE, Caller, Later, SetAttributes
from sdeefs.core.filesystem import Filesystem
from sdeefs.core.settings import Settings
from tests.fslab import fslab_lab as lab
from tests.fslab.oracle_player import differences, snapshot

CALLER = Caller(0, 0, 1)
#: The exit status of a child that was "killed".
KILLED = 77


@dataclass
class Core:
    """The operations by path, for actions that read like shell."""

    core: Filesystem

    def node(self, path: str) -> int:
        node = ROOT_NODE
        for name in filter(None, path.split("/")):
            node = self.core.lookup(node, name.encode(), CALLER).node
        return node

    def place(self, path: str) -> tuple[int, bytes]:
        parent, _, name = path.rpartition("/")
        return self.node(parent), name.encode()


def finish(answer: Any) -> Any:
    """The answer, also of what a worker would do."""
    return answer.finish() if isinstance(answer, Later) else answer


Action = Callable[[Core], object]
ACTIONS: dict[str, Action] = {
    "open": lambda c: finish(c.core.open(c.node("d/f"), os.O_RDWR, CALLER)),
    "open_truncating": lambda c: finish(
        c.core.open(c.node("d/f"), os.O_WRONLY | os.O_TRUNC, CALLER)
    ),
    "chmod": lambda c: finish(c.core.setattr(c.node("d/f"), SetAttributes(mode=0o600), 0, CALLER)),
    "truncate": lambda c: finish(c.core.setattr(c.node("d/f"), SetAttributes(size=3), 0, CALLER)),
    "chown_directory": lambda c: finish(
        c.core.setattr(c.node("d/e"), SetAttributes(uid=5, gid=6), 0, CALLER)
    ),
    "setxattr": lambda c: finish(c.core.setxattr(c.node("d/f"), b"user.x", b"1", 0, CALLER)),
    "setxattr_of_link": lambda c: finish(c.core.setxattr(c.node("l"), b"trusted.x", b"1", 0, CALLER)),
    "chmod_hard_link": lambda c: finish(
        c.core.setattr(c.node("d/h1"), SetAttributes(mode=0o600), 0, CALLER)
    ),
    "unlink": lambda c: finish(c.core.unlink(*c.place("d/f"), CALLER)),
    "unlink_hard_link": lambda c: finish(c.core.unlink(*c.place("d/h1"), CALLER)),
    "unlink_of_upper": lambda c: finish(c.core.unlink(*c.place("u/new"), CALLER)),
    "rmdir": lambda c: finish(c.core.rmdir(*c.place("emptied"), CALLER)),
    "rename": lambda c: finish(c.core.rename(*c.place("d/f"), *c.place("u/g"), 0, CALLER)),
    "rename_over": lambda c: finish(c.core.rename(*c.place("d/f"), *c.place("d/g"), 0, CALLER)),
    "rename_upper_over_lower": lambda c: finish(
        c.core.rename(*c.place("u/new"), *c.place("d/f"), 0, CALLER)
    ),
    "rename_directory": lambda c: finish(c.core.rename(*c.place("d"), *c.place("d2"), 0, CALLER)),
    "rename_directory_deep": lambda c: finish(
        c.core.rename(*c.place("d/e"), *c.place("u/e"), 0, CALLER)
    ),
    "rename_directory_over_emptied": lambda c: finish(
        c.core.rename(*c.place("d/e"), *c.place("emptied"), 0, CALLER)
    ),
    "exchange": lambda c: finish(c.core.rename(*c.place("d/f"), *c.place("u/new"), 2, CALLER)),
    "link": lambda c: finish(c.core.link(c.node("d/f"), *c.place("u/linked"), CALLER)),
    "link_over_whiteout": lambda c: finish(c.core.link(c.node("d/f"), *c.place("gone"), CALLER)),
    "mkdir_over_whiteout": lambda c: finish(
        c.core.mkdir(*c.place("gone"), 0o755, 0o022, CALLER)
    ),
    "create_over_whiteout": lambda c: finish(
        c.core.create(*c.place("gone"), 0o644, os.O_RDWR, 0o022, CALLER)
    ),
    "symlink_over_whiteout": lambda c: finish(c.core.symlink(*c.place("gone"), b"to", CALLER)),
    "mknod": lambda c: finish(
        c.core.mknod(*c.place("d/p"), stat.S_IFIFO | 0o600, 0, 0o022, CALLER)
    ),
}  # fmt: skip


def prepare(base: Path) -> lab.Layers:
    """Lower with directories, hard links and xattrs; upper with a whiteout and an emptied directory."""
    layers = lab.Layers.make(base)
    lower, upper = layers.lowers[0], layers.upper
    assert upper is not None
    (lower / "d/e").mkdir(parents=True)
    (lower / "d/e/inner").write_text("inner")
    for name in ("d/f", "d/g"):
        (lower / name).write_text(name * 2000)
        os.setxattr(lower / name, "user.a", b"1")
    (lower / "d/h1").write_text("linked")
    os.link(lower / "d/h1", lower / "d/h2")
    os.symlink("target", lower / "l")
    (lower / "emptied").mkdir()
    (lower / "emptied/x").write_text("x")
    (lower / "gone").mkdir()
    (lower / "gone/hidden").write_text("hidden")
    (upper / "u").mkdir()
    (upper / "u/new").write_text("new")
    (upper / "emptied").mkdir()
    os.mknod(upper / "emptied/x", stat.S_IFCHR, 0)
    os.mknod(upper / "gone", stat.S_IFCHR, 0)
    for directory, directories, files in os.walk(base):
        for name in (*directories, *files):
            os.utime(f"{directory}/{name}", ns=(10**18, 10**18), follow_symlinks=False)
    return layers


def attempt(layers: lab.Layers, action: Action, calls: int) -> int:
    """Do it in a child that ends before system call number `calls` (0: never). Its exit status."""

    def work() -> None:
        os.umask(0)
        assert layers.upper is not None and layers.work is not None
        settings = Settings(
            lowers=(os.fsencode(layers.lowers[0]),),
            upper=os.fsencode(layers.upper),
            work=os.fsencode(layers.work),
        )
        core = Core(Filesystem.open(settings))
        left = calls

        def count(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal left
            called = event == "c_call" and argument.__module__ in ("posix", "xattr", "fcntl")
            if event == "call" and frame.f_code.co_name == "call":
                called = frame.f_code.co_filename.endswith("mount_helpers/syscalls.py")
            if called:
                left -= 1
                if not left:
                    sys.setprofile(None)
                    os._exit(KILLED)

        sys.setprofile(count)
        try:
            action(core)
        finally:
            sys.setprofile(None)

    return lab.child_result(lab.in_child(work))


def state(layers: lab.Layers) -> dict[str, Any]:
    """What kernel overlayfs shows of the layers; times of directories apart, whose emptying of
    whiteouts is no change that anybody sees."""
    data = f"lowerdir={layers.lowers[0]},upperdir={layers.upper},workdir={layers.work},"
    data += ",".join(lab.KERNEL.options)
    syscalls.mount("overlay", os.fsencode(layers.merged), "overlay", 0, data)
    try:
        rows = snapshot(str(layers.merged))
    finally:
        syscalls.umount2(os.fsencode(layers.merged), syscalls.MNT_DETACH)
    return {
        path: (*row[:4], *row[5:]) if str(row[0]).startswith("0o4") else row
        for path, row in rows.items()
    }


@pytest.mark.parametrize("name", ACTIONS)
def test_killed_before_each_system_call(name: str) -> None:
    with lab.workspace("points", Path("/dev/shm")) as base:
        prepare(base / "clean")
        # A mount marks its layers, so each has its own copy of the unmounted ones.
        for name_of_copy in ("before", "once"):
            lab.run("cp", "-a", base / "clean", base / name_of_copy)
        after_layers = layers_of(base / "once")
        before = state(layers_of(base / "before"))
        assert attempt(after_layers, ACTIONS[name], 0) == 0
        after = state(after_layers)
        for calls in range(1, 300):
            layers = layers_of(base / f"try{calls}")
            copy(base / "clean", layers.base)
            status = attempt(layers, ACTIONS[name], calls)
            if status == 0:
                break
            assert status == KILLED
            found = state(layers)
            if differences(found, before) and differences(found, after):
                pytest.fail(
                    f"killed before call {calls}: neither before:\n"
                    + "\n".join(differences(found, before))
                    + "\nnor after:\n"
                    + "\n".join(differences(found, after))
                )
        else:
            pytest.fail("it makes more than 300 system calls")


def copy(source: Path, target: Path) -> None:
    """cp -a, in this process: there are hundreds."""
    target.mkdir()
    links: dict[int, Path] = {}
    for directory, directories, files in os.walk(source):
        for name in (*directories, *files):
            old = Path(directory, name)
            new = target / old.relative_to(source)
            seen = old.lstat()
            if stat.S_ISDIR(seen.st_mode):
                new.mkdir()
            elif seen.st_ino in links:
                os.link(links[seen.st_ino], new)
            elif stat.S_ISREG(seen.st_mode):
                new.write_bytes(old.read_bytes())
                for xattr in os.listxattr(old):
                    os.setxattr(new, xattr, os.getxattr(old, xattr))
            elif stat.S_ISLNK(seen.st_mode):
                new.symlink_to(os.readlink(old))
            else:
                os.mknod(new, seen.st_mode, seen.st_rdev)
            if seen.st_nlink > 1:
                links.setdefault(seen.st_ino, new)
    for directory, directories, files in os.walk(target, topdown=False):
        for name in (*directories, *files):
            os.utime(f"{directory}/{name}", ns=(10**18, 10**18), follow_symlinks=False)


def layers_of(base: Path) -> lab.Layers:
    return lab.Layers(
        base, base / "upper", (base / "lower",), base / "work", base / "merged"
    )  # fmt: skip
