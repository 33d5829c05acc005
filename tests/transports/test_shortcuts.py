"""The shortcuts in C answer as Python's handlers do: the same requests over two equal unions.

Both tables are asked the same; the replies must be equal byte by byte, but for inode numbers and
times that the layers' filesystem gave, and so must the uppers that come of it.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mount_helpers.namespaces import IdRange
from sdeefs.core import credentials
from sdeefs.core.filesystem import Filesystem
from sdeefs.core.settings import Settings
from sdeefs.transports import shortcuts, wire
from sdeefs.transports.requests import Deferred, Features, handlers
from sdeefs.transports.wire import Opcode
from sdeefs.watch import Watch

if (_reason := shortcuts.why_not(object())) != "another core":  # type: ignore[arg-type]
    pytest.skip(f"shortcuts: {_reason}", allow_module_level=True)

NAMES = (
    "file", "empty", "both", "only-upper", "gone", "link", "hard1", "hard2", "pipe", "secret",
    "marked", "dir", "new1", "new2", ".", "x" * 255, "x" * 256,
)  # fmt: skip
SETAS = {
    "plain": {},
    "mapped": {
        "uid_upper": (IdRange(0, 1000, 1), IdRange(1, 100000, 65535)),
        "gid_upper": (IdRange(0, 1000, 1), IdRange(1, 100000, 65535)),
        "uid_lower": (IdRange(0, 0, 65536),),
        "squash_overflow": True,
    },
    "secrets": {"secrets": (1000, 1000)},
    "two lowers": {},
    "write-back": {},
    "no index": {"index": False},
    "read-only": {"read_only": True},
    "watched": {},
    "crowded": {"max_directories": 1},
}


def _fill(base: Path, lowers: int) -> list[Path]:
    """Objects of all kinds in upper and lower; the last lower has what the first hasn't."""
    upper, made = base / "upper", [base / f"lower{n}" for n in range(lowers)]
    for path in (upper, *made):
        path.mkdir(mode=0o755)
    low = made[-1]
    for name in ("file", "both", "gone", "secret", "hard1"):
        (low / name).write_bytes(name.encode() * 20)
    (low / "secret").chmod(0o600)
    (low / "empty").touch()
    os.link(low / "hard1", low / "hard2")
    (low / "link").symlink_to("file")
    os.mkfifo(low / "pipe")
    (low / "marked").write_bytes(b"m")
    os.setxattr(low / "marked", "user.mark", b"1")
    if lowers > 1:
        (made[0] / "both").write_bytes(b"first lower")
    (upper / "both").write_bytes(b"upper")
    (upper / "only-upper").write_bytes(b"u" * 100)
    os.mknod(upper / "gone", stat.S_IFCHR)
    for directory in (upper / "dir", low / "dir"):
        directory.mkdir()
        (directory / "file").write_bytes(b"below")
    (low / "dir2" / "dir").mkdir(parents=True)
    (low / "dir2" / "file").write_bytes(b"below")
    for path in (upper, *made):
        for below in [path, *path.rglob("*")]:
            os.utime(below, (1_000_000, 1_000_000), follow_symlinks=False)
    return made


class Side:
    """One union and the table that is asked."""

    def __init__(self, base: Path, variant: str, shorten: bool) -> None:
        self.base = base
        os.umask(0o022)  # opening a union sets it to 0
        base.mkdir(mode=0o755)
        made = _fill(base, 2 if variant == "two lowers" else 1)
        self.filesystem = Filesystem(
            Settings(
                lowers=tuple(os.fsencode(path) for path in made),
                upper=os.fsencode(base / "upper"),
                work=None if variant == "read-only" else os.fsencode(base / "work"),
                **SETAS[variant],  # type: ignore[arg-type]
            )
        )
        self.watch = Watch.open(self.filesystem) if variant in ("watched", "crowded") else None
        self.filesystem.killpriv = True
        self.filesystem.writeback = variant == "write-back"
        features = Features(False, True, self.filesystem.writeback)
        self.table: list[Any] = handlers(self.filesystem, features, None, lambda _: None)
        if shorten:
            self.table = shortcuts.shorten(self.filesystem, self.table, None, features)

    def ask(
        self, opcode: Opcode, node: int, body: bytes, uid: int = 0, pid: int = 1
    ) -> tuple[int, bytes]:
        """(errno, reply)."""
        try:
            answer = self.table[opcode](node, body, uid, uid, pid)
            if isinstance(answer, int):
                return answer, b""
            return 0, (answer.finish() if isinstance(answer, Deferred) else answer) or b""
        except OSError as error:
            return error.errno or -1, b""

    def tree(self) -> dict[str, object]:
        """What is in upper, without what depends on the moment."""
        upper, found = self.base / "upper", {}
        for path in sorted(upper.rglob("*")):
            seen = path.lstat()
            marks = {
                name: os.getxattr(path, name, follow_symlinks=False)
                for name in os.listxattr(path, follow_symlinks=False)
                if not name.endswith((".origin", ".nlink"))
            }
            data = path.read_bytes() if stat.S_ISREG(seen.st_mode) else b""
            found[str(path.relative_to(upper))] = (
                seen.st_mode, seen.st_uid, seen.st_gid, seen.st_nlink, seen.st_rdev, data, marks
            )  # fmt: skip
        return found


@contextmanager
def sides(variant: str) -> Iterator[tuple[Side, Side]]:
    umask = os.umask(0o022)
    base = Path(tempfile.mkdtemp(prefix="sdee-shortcuts-", dir="/dev/shm"))
    base.chmod(0o755)
    made: list[Side] = []
    try:
        for name, shorten in (("python", False), ("c", True)):
            made.append(Side(base / name, variant, shorten))
        yield made[0], made[1]
    finally:
        for side in made:
            side.filesystem.close()
            if side.watch is not None:
                side.watch.close()
        credentials.restore()
        shutil.rmtree(base, ignore_errors=True)
        os.umask(umask)


_ENTRY, _ATTR = wire.ENTRY_OUT, wire.ATTR_OUT
_GIVES_ENTRY = (
    Opcode.LOOKUP, Opcode.MKDIR, Opcode.MKNOD, Opcode.SYMLINK, Opcode.LINK, Opcode.CREATE
)  # fmt: skip


def _plain(values: tuple[Any, ...], attributes: int) -> tuple[Any, ...]:
    """Without the inode number, blocks, and times of today."""
    head, attr = values[:attributes], list(values[attributes:])
    attr[0] = attr[2] = attr[5] = attr[8] = 0
    for second, nanosecond in ((3, 6), (4, 7)):
        if attr[second] > 2_000_000:
            attr[second] = attr[nanosecond] = 0
    return (*head, *attr)


def comparable(opcode: Opcode, reply: bytes) -> object:
    """A reply without what depends on the moment."""
    if opcode == Opcode.CREATE and reply:
        return _plain(_ENTRY.unpack_from(reply), 6), wire.OPEN_OUT.unpack_from(reply, _ENTRY.size)
    if opcode in _GIVES_ENTRY and reply:
        return _plain(_ENTRY.unpack(reply), 6)
    if opcode in (Opcode.GETATTR, Opcode.SETATTR) and reply:
        return _plain(_ATTR.unpack(reply), 3)
    if opcode in (Opcode.READDIR, Opcode.READDIRPLUS):
        head = _ENTRY.size if opcode == Opcode.READDIRPLUS else 0
        entries, at = [], 0
        while at < len(reply):
            _, following, length, kind = wire.DIRENT.unpack_from(reply, at + head)
            start = at + head + wire.DIRENT.size
            values = _plain(_ENTRY.unpack_from(reply, at), 6) if head else (0,)
            entries.append(
                (reply[start : start + length], following, kind, bool(values[0]), values[2:])
            )
            at = start + (length + 7 & ~7)
        return entries
    return reply


_name = st.sampled_from(NAMES)
_node = st.integers(0, 12)
_handle = st.integers(0, 5)
_pid = st.integers(1, 2)  # lists, or looks up what it listed
_step = st.one_of(
    st.tuples(st.just("lookup"), _node, st.tuples(_name, _pid)),
    st.tuples(st.just("getattr"), _node, st.none()),
    st.tuples(st.just("list"), _node, _pid),
    st.tuples(st.just("chmod"), _node, st.sampled_from([0o600, 0o4755, 0o1777])),
    st.tuples(st.just("chown"), _node, st.sampled_from([(0, 0), (5, 6), (70000, 1), (None, 3)])),
    st.tuples(st.just("times"), _node, st.sampled_from(["now", 5, None])),
    st.tuples(st.just("cut"), _node, st.integers(0, 50)),
    st.tuples(st.just("cut open"), _handle, st.integers(0, 50)),
    st.tuples(st.just("create"), _node, _name),
    st.tuples(st.just("open"), _node, st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_TRUNC])),
    st.tuples(st.just("read"), _handle, st.integers(0, 30)),
    st.tuples(st.just("write"), _handle, st.integers(0, 30)),
    st.tuples(st.just("copy"), _handle, st.tuples(_handle, st.integers(0, 30))),
    st.tuples(st.just("release"), _handle, st.none()),
    st.tuples(st.just("unlink"), _node, _name),
    st.tuples(st.just("mkdir"), _node, _name),
    st.tuples(st.just("mknod"), _node, _name),
    st.tuples(st.just("symlink"), _node, _name),
    st.tuples(st.just("rmdir"), _node, _name),
    st.tuples(st.just("rename"), _node, st.tuples(_node, _name, _name, st.sampled_from([None, 0, 1, 2]))),
    st.tuples(st.just("link"), _node, st.tuples(_node, _name)),
    st.tuples(st.just("getxattr"), _node, st.sampled_from(
        [b"user.mark", b"security.capability", b"system.posix_acl_access", b"trusted.overlay.x"])),
    st.tuples(st.just("setxattr"), _node, st.sampled_from([b"user.mark", b"user.other", b"system.posix_acl_access"])),
    st.tuples(st.just("listxattr"), _node, st.sampled_from([0, 1000])),
    st.tuples(st.just("forget"), _node, st.integers(1, 2)),
)  # fmt: skip


#: An ACL that says what a mode of 0640 does.
_MINIMAL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, perm, 0xFFFFFFFF) for tag, perm in ((1, 6), (4, 4), (32, 0))
)


class Player:
    """Asks both sides the same, and remembers nodes and handles."""

    def __init__(self, python: Side, c: Side, user: int = 0) -> None:
        self.both = (python, c)
        self.user = user
        self.nodes, self.handles = [1], [0]
        self.handle_node: dict[int, int] = {}
        self.counts: dict[int, int] = {}

    def ask(self, opcode: Opcode, node: int, body: bytes = b"", pid: int = 1) -> bytes:
        """The reply, which is the same from both."""
        answers = [side.ask(opcode, node, body, self.user, pid) for side in self.both]
        seen = [(number, comparable(opcode, reply)) for number, reply in answers]
        assert seen[0] == seen[1], f"{opcode.name} of {node} {body!r}"
        if opcode in _GIVES_ENTRY and answers[0][1]:
            found = struct.unpack_from("=Q", answers[0][1])[0]
            self.counts[found] = self.counts.get(found, 0) + 1
            if found and found not in self.nodes:
                self.nodes.append(found)
        return answers[0][1]

    def setattr(self, node: int, valid: int, **fields: int) -> None:
        words = ("fh", "size", "mtime", "mode", "uid", "gid")
        fh, size, mtime, mode, uid, gid = (fields.get(word, 0) for word in words)
        self.ask(
            Opcode.SETATTR, node,
            wire.SETATTR_IN.pack(
                valid, 0, fh, size, 0, mtime, mtime, 0, 7, 7, 0, mode, 0, uid, gid, 0
            ),
        )  # fmt: skip

    def play(self, word: str, which: int, more: Any) -> None:
        node = self.nodes[which % len(self.nodes)]
        handle = self.handles[which % len(self.handles)]
        name = os.fsencode(more) + b"\0" if isinstance(more, str) else b""
        if word == "lookup":
            self.ask(Opcode.LOOKUP, node, os.fsencode(more[0]) + b"\0", more[1])
        elif word == "getattr":
            self.ask(Opcode.GETATTR, node, wire.GETATTR_IN.pack(0, 0, 0))
        elif word == "list":
            self._list(node, more)
        elif word == "chmod":
            self.setattr(node, wire.FATTR_MODE, mode=more)
        elif word == "chown":
            uid, gid = more
            valid = wire.FATTR_GID | (
                0 if uid is None else wire.FATTR_UID | wire.FATTR_KILL_SUIDGID
            )
            self.setattr(node, valid, uid=uid or 0, gid=gid)
        elif word == "times":
            valid = wire.FATTR_MTIME | wire.FATTR_ATIME if more == 5 else wire.FATTR_ATIME
            if more == "now":
                valid |= wire.FATTR_ATIME_NOW
            self.setattr(node, valid, mtime=5)
        elif word == "cut":
            self.setattr(node, wire.FATTR_SIZE, size=more)
        elif word == "cut open":
            if handle in self.handle_node:
                valid = wire.FATTR_SIZE | wire.FATTR_FH
                self.setattr(self.handle_node[handle], valid, size=more, fh=handle)
        elif word == "create":
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            body = wire.CREATE_IN.pack(flags, stat.S_IFREG | 0o666, 0o22, 0) + name
            reply = self.ask(Opcode.CREATE, node, body)
            if reply:
                self._opened(struct.unpack_from("=Q", reply)[0], reply[_ENTRY.size :])
        elif word == "open":
            self._opened(node, self.ask(Opcode.OPEN, node, wire.OPEN_IN.pack(more, 0)))
        elif word == "read":
            self.ask(Opcode.READ, 1, wire.READ_IN.pack(handle, more, 64, 0, 0, 0, 0))
        elif word == "write":
            data = b"w" * 10
            self.ask(Opcode.WRITE, 1, wire.WRITE_IN.pack(handle, more, 10, 0, 0, 0, 0) + data)
        elif word == "copy":
            source = self.handles[more[0] % len(self.handles)]
            body = wire.COPY_FILE_RANGE_IN.pack(source, more[1], 1, handle, 5, 20, 0)
            self.ask(Opcode.COPY_FILE_RANGE_64, 1, body)
            self.ask(Opcode.COPY_FILE_RANGE, 1, body)
        elif word == "release":
            self.ask(Opcode.RELEASE, 1, wire.RELEASE_IN.pack(handle, 0, 0, 0))
            self.handle_node.pop(handle, None)
        elif word in ("unlink", "rmdir"):
            self.ask(Opcode.UNLINK if word == "unlink" else Opcode.RMDIR, node, name)
        elif word == "mkdir":
            self.ask(Opcode.MKDIR, node, wire.MKDIR_IN.pack(0o755, 0o22) + name)
        elif word == "mknod":
            self.ask(
                Opcode.MKNOD, node, wire.MKNOD_IN.pack(stat.S_IFIFO | 0o666, 0, 0o22, 0) + name
            )
        elif word == "symlink":
            self.ask(Opcode.SYMLINK, node, name + b"target\0")
        elif word == "rename":
            other, old, new, flags = more
            target = self.nodes[other % len(self.nodes)]
            names = os.fsencode(old) + b"\0" + os.fsencode(new) + b"\0"
            if flags is None:
                self.ask(Opcode.RENAME, node, wire.RENAME_IN.pack(target) + names)
            else:
                self.ask(Opcode.RENAME2, node, wire.RENAME2_IN.pack(target, flags, 0) + names)
        elif word == "link":
            source = self.nodes[more[0] % len(self.nodes)]
            new = os.fsencode(more[1]) + b"\0"
            self.ask(Opcode.LINK, node, wire.LINK_IN.pack(source) + new)
        elif word == "getxattr":
            self.ask(Opcode.GETXATTR, node, wire.GETXATTR_IN.pack(100, 0) + more + b"\0")
        elif word == "setxattr":
            value = b"ab" if more.startswith(b"user.") else _MINIMAL
            body = wire.SETXATTR_IN.pack(len(value), 0, 0, 0) + more + b"\0" + value
            self.ask(Opcode.SETXATTR, node, body)
        elif word == "listxattr":
            self.ask(Opcode.LISTXATTR, node, wire.GETXATTR_IN.pack(more, 0))
        elif word == "forget" and node != 1:
            count = min(more, self.counts.get(node, 0))
            if count:
                self.counts[node] -= count
                self.ask(Opcode.FORGET, node, wire.FORGET_IN.pack(count))

    def _opened(self, node: int, reply: bytes) -> None:
        if reply:
            handle = wire.OPEN_OUT.unpack(reply)[0]
            self.handles.append(handle)
            self.handle_node[handle] = node

    def _list(self, node: int, pid: int) -> None:
        for offset, room in (
            (0, 1 << 16),
            (1, 400),
            (2, 0),
            (1 << 62, 1 << 16),
            (-1 % (1 << 63), 1 << 16),
        ):
            page = wire.READ_IN.pack(0, offset, room, 0, 0, 0, 0)
            self.ask(Opcode.READDIRPLUS, node, page, pid)
            self.ask(Opcode.READDIR, node, page, pid)
        assert len({len(side.filesystem._lists) for side in self.both}) == 1


@pytest.mark.parametrize("variant", SETAS)
@given(steps=st.lists(_step, min_size=10, max_size=60))
@settings(
    max_examples=25, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
def test_the_same_answers(variant: str, steps: list[tuple[str, int, Any]]) -> None:
    with sides(variant) as (python, c):
        player = Player(python, c)
        for name in NAMES:
            player.play("lookup", 0, (name, 1))
        for word, which, more in steps:
            player.play(word, which, more)
        assert python.tree() == c.tree()
        held = [side.filesystem.counts() for side in (python, c)]
        if variant == "crowded":  # which of the open ones are closed is told at other moments
            for counts in held:
                counts.pop("directories")
        assert held[0] == held[1]
        assert len({len(side.filesystem.table.linked) for side in (python, c)}) == 1
        watched = [side.watch and len(side.watch) for side in (python, c)]
        assert watched[0] == watched[1]


def _left(side: Side) -> dict[str, int]:
    counts = side.table[Opcode.LOOKUP].__self__.left()
    return {Opcode(number).name: count for number, count in enumerate(counts) if count}


def test_plain_cases_are_answered_in_c() -> None:
    with sides("plain") as (python, c):
        player = Player(python, c)
        player.play("create", 0, "new0")  # the first asks for the directory's default ACL
        player.play("lookup", 0, ("dir", 1))
        directory = len(player.nodes) - 1
        before = _left(c)
        for name in ("file", "only-upper", "absent", "link"):
            player.play("lookup", 0, (name, 1))
        player.play("create", 0, "new1")
        made, handle = len(player.nodes) - 1, len(player.handles) - 1
        for word, which, more in (
            ("mkdir", 0, "new2"),
            ("mknod", made + 1, "pipe"),
            ("symlink", made + 1, "link"),
            ("lookup", 0, ("new2", 1)),
            ("create", made + 1, "file"),
            ("rename", made + 1, (made + 1, "file", "file2", None)),
            ("rename", made + 1, (0, "pipe", "file3", 0)),
            ("rename", made + 1, (made + 1, "file2", "link", 0)),
            ("rename", 0, (made + 1, "new1", "file", 0)),
            ("rename", made + 1, (0, "file", "new1", 0)),
            ("mkdir", made + 1, "dir"),
            ("rmdir", made + 1, "dir"),
            ("link", 0, (made + 2, "linked")),  # what was made as `pipe` is `file3` now
            ("lookup", 0, ("linked", 1)),
            ("unlink", 0, "file3"),
            ("unlink", 0, "linked"),
            ("forget", made + 2, 3),
            ("getattr", made, None),
            ("chmod", made, 0o640),
            ("chown", made, (5, 6)),
            ("times", made, 5),
            ("cut open", handle, 3),
            ("getxattr", made, b"security.capability"),
            ("setxattr", made, b"system.posix_acl_access"),
            ("read", handle, 0),
            ("copy", handle, (handle, 2)),
            ("lookup", 0, ("dir2", 1)),
            ("release", handle, None),
            ("open", made, os.O_RDWR),
            ("unlink", 0, "new1"),
            ("release", handle + 2, None),
            ("forget", made, 1),
            ("list", directory, 1),
        ):
            player.play(word, which, more)
        assert _left(c) == before


def test_errors_are_the_kernels() -> None:
    with sides("plain") as (python, c):
        player = Player(python, c)
        body = wire.GETXATTR_IN.pack(100, 0) + b"security.capability\0"
        player.play("lookup", 0, ("only-upper", 1))
        assert c.ask(Opcode.GETXATTR, player.nodes[-1], body)[0] == errno.ENODATA
        assert c.ask(Opcode.GETATTR, 999, wire.GETATTR_IN.pack(0, 0, 0))[0] == errno.ESTALE


def test_an_inode_number_that_is_used_again_is_another_object() -> None:
    with sides("plain") as (python, c):
        player = Player(python, c)
        player.play("lookup", 0, ("file", 1))
        number = player.nodes[-1]
        for side in (python, c):
            path = side.base / "lower0" / "file"
            path.unlink()
            path.mkdir()
            side.filesystem.table.nodes[number].ino = path.stat().st_ino
            getattr = wire.GETATTR_IN.pack(0, 0, 0)
            assert side.ask(Opcode.GETATTR, number, getattr)[0] == errno.ESTALE
            assert side.ask(Opcode.OPEN, number, wire.OPEN_IN.pack(0, 0))[0] == errno.ESTALE


@pytest.mark.parametrize("opcode", [Opcode.FORGET, Opcode.BATCH_FORGET])
def test_what_was_removed_is_closed_without_the_lock(
    opcode: Opcode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last descriptor of a removed directory frees its blocks, for which nobody should wait."""
    locked = []
    close = os.close
    with sides("plain") as (_, c):
        made = c.ask(Opcode.MKDIR, 1, wire.MKDIR_IN.pack(0o755, 0) + b"new\0")[1]
        node = struct.unpack_from("=Q", made)[0]
        assert c.ask(Opcode.RMDIR, 1, b"new\0")[0] == 0

        def note(fd: int) -> None:
            locked.append(c.filesystem.lock._is_owned())  # type: ignore[attr-defined]
            close(fd)

        one = wire.FORGET_ONE.pack(node, 1)
        body = wire.BATCH_FORGET_IN.pack(1, 0) + one if opcode == Opcode.BATCH_FORGET else one[8:]
        with monkeypatch.context() as patched:
            patched.setattr(os, "close", note)
            c.table[opcode](node, body, 0, 0, 1)
    assert locked == [False]


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory on the machine's own file system."""
    base = Path(tempfile.mkdtemp(prefix="sdee-shortcuts-", dir="/var/tmp"))
    yield base
    shutil.rmtree(base, ignore_errors=True)


def test_what_is_on_the_disk_alone_is_read_by_a_worker(disk: Path) -> None:
    """One who waits for a disk must not keep the others of this thread waiting."""
    data = os.urandom(1 << 18)
    for name in ("lower", "upper", "work"):
        (disk / name).mkdir()
    (disk / "lower" / "file").write_bytes(data)
    fd = os.open(disk / "lower" / "file", os.O_RDONLY)
    lower, upper, work = (os.fsencode(disk / name) for name in ("lower", "upper", "work"))
    filesystem = Filesystem(Settings(lowers=(lower,), upper=upper, work=work))
    try:
        features = Features(False, True, False)
        table = handlers(filesystem, features, None, lambda _: None)
        table = shortcuts.shorten(filesystem, table, None, features)
        node = struct.unpack_from("=Q", table[Opcode.LOOKUP](1, b"file\0", 0, 0, 1))[0]
        opened = table[Opcode.OPEN](node, wire.OPEN_IN.pack(os.O_RDONLY, 0), 0, 0, 1)
        body = wire.READ_IN.pack(wire.OPEN_OUT.unpack(opened)[0], 0, len(data), 0, 0, 0, 0)
        os.fsync(fd)
        for _ in range(100):  # what somebody else is about to read stays in memory
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            answer = table[Opcode.READ](node, body, 0, 0, 1)
            if isinstance(answer, Deferred):
                break
            assert answer == data
        assert isinstance(answer, Deferred)
        assert answer.finish() == data
        assert table[Opcode.READ](node, body, 0, 0, 1) == data
    finally:
        filesystem.close()
        credentials.restore()
        os.close(fd)
