"""Every structure of FUSE's protocol, packed and unpacked; every opcode through its handler."""

from __future__ import annotations

import errno
import os
import stat
import struct
from pathlib import Path
from typing import Any

import pytest

from sdeefs.core.api import Attributes, Caller, DirectoryEntry, Entry, Io, Later, Opened, StatFs
from sdeefs.transports import negotiate, wire
from sdeefs.transports.requests import Deferred, Features, handlers
from sdeefs.transports.transport import TransportOptions
from sdeefs.transports.wire import Opcode

ATTRIBUTES = Attributes(
    77, stat.S_IFREG | 0o640, 2, 1000, 1001, 0, 12345, 24, 4096,
    1_500_000_000_000_000_001, -1, 1_700_000_000_999_999_999,
)  # fmt: skip
ENTRY = Entry(5, ATTRIBUTES, 1.5, 86400.0)
CALLER = Caller(1000, 1001, 4711)


class Recorder:
    """Operations that note their arguments and answer what they are told to."""

    kernel = None
    passthrough = writeback = killpriv = False

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name in ("exports",):
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            return self.answers.get(name)

        return call


class Table:
    def __init__(self, **features: bool) -> None:
        self.core = Recorder()
        self.interrupted: list[int] = []
        chosen = {"flush": True, "setxattr_ext": True, "writeback": False} | features
        self.table = handlers(
            self.core,  # type: ignore[arg-type]
            Features(**chosen),
            None,
            self.interrupted.append,
        )

    def ask(self, opcode: Opcode, body: bytes, answer: Any = None, node: int = 9) -> Any:
        self.core.calls.clear()
        name = {
            Opcode.RENAME2: "rename",
            Opcode.COPY_FILE_RANGE_64: "copy_file_range",
            Opcode.STATX: "getattr",
        }.get(opcode, opcode.name.lower())
        self.core.answers = {name: answer, "birth_time": 1_600_000_000_000_000_007}
        plain = self.table[opcode](node, body, *CALLER)
        if answer is not None or opcode.name.lower() in ("unlink", "rmdir", "rename", "rename2"):
            # The same by a worker.
            self.core.answers[name] = Later(lambda: answer)
            later = self.table[opcode](node, body, *CALLER) if name not in _NEVER_LATER else None
            if later is not None:
                assert isinstance(later, Deferred)
                assert later.finish() == plain
        return plain

    @property
    def call(self) -> tuple[Any, ...]:
        return self.core.calls[0]


_NEVER_LATER = {
    "lookup", "getattr", "readlink", "read", "write", "readdir", "readdirplus",
    "getxattr", "listxattr", "statfs", "lseek", "release", "flush",
}  # fmt: skip


def entry_of(reply: bytes) -> tuple[Any, ...]:
    return wire.ENTRY_OUT.unpack_from(reply)


def test_lookup() -> None:
    table = Table()
    reply = table.ask(Opcode.LOOKUP, b"name\0", ENTRY)
    assert table.call == ("lookup", 9, b"name", CALLER)
    (node, generation, entry_s, attr_s, entry_ns, attr_ns, ino, size, blocks, atime, mtime, ctime,
     atime_ns, mtime_ns, ctime_ns, mode, nlink, uid, gid, rdev, blksize, flags) = entry_of(reply)  # fmt: skip
    assert (node, generation, entry_s, entry_ns, attr_s, attr_ns) == (
        5,
        0,
        1,
        500_000_000,
        86400,
        0,
    )
    assert (ino, size, blocks, mode, nlink) == (77, 12345, 24, 0o100640, 2)
    assert (atime, atime_ns) == (1_500_000_000, 1)
    assert (mtime, mtime_ns) == (-1, 999_999_999)
    assert (ctime, ctime_ns) == (1_700_000_000, 999_999_999)
    assert (uid, gid, rdev, blksize, flags) == (1000, 1001, 0, 4096, 0)


def test_lookup_of_a_name_that_is_not_there() -> None:
    reply = Table().ask(Opcode.LOOKUP, b"none\0", Entry(0, None, 3.25, 0.0))
    values = entry_of(reply)
    assert values[:6] == (0, 0, 3, 0, 250_000_000, 0)
    assert not any(values[6:])


def test_forget() -> None:
    table = Table()
    assert table.ask(Opcode.FORGET, struct.pack("=Q", 3)) is None
    assert table.call == ("forget", 9, 3)
    body = struct.pack("=IIQQQQ", 2, 0, 11, 1, 12, 2) + b"after the last"
    assert table.ask(Opcode.BATCH_FORGET, body) is None
    assert table.core.calls == [("forget", 11, 1), ("forget", 12, 2)]


def test_getattr() -> None:
    table = Table()
    reply = table.ask(Opcode.GETATTR, struct.pack("=IIQ", 0, 0, 99), (ATTRIBUTES, 2.0))
    assert table.call == ("getattr", 9)
    values = wire.ATTR_OUT.unpack(reply)
    assert values[:5] == (2, 0, 0, 77, 12345)
    table.ask(Opcode.GETATTR, struct.pack("=IIQ", 1, 0, 99), (ATTRIBUTES, 2.0))
    assert table.call == ("getattr", 9, 99)


def test_statx() -> None:
    table = Table()
    device = ATTRIBUTES._replace(mode=stat.S_IFCHR | 0o600, rdev=os.makedev(300, 70000))
    reply = table.ask(Opcode.STATX, struct.pack("=IIQII", 1, 0, 4, 0, 0xFFF), (device, 2.0))
    values = wire.STATX_OUT.unpack(reply)
    assert values[:5] == (2, 0, 0, 0xFFF, 4096)
    assert 1_600_000_000 in values and 7 in values
    assert values[-4:-2] == (300, 70000)


def test_setattr() -> None:
    table = Table()
    everything = (
        wire.FATTR_MODE | wire.FATTR_UID | wire.FATTR_GID | wire.FATTR_SIZE | wire.FATTR_ATIME
        | wire.FATTR_MTIME | wire.FATTR_CTIME | wire.FATTR_FH | wire.FATTR_KILL_SUIDGID
    )  # fmt: skip
    body = wire.SETATTR_IN.pack(
        everything, 0, 8, 100, 0, -2, 3, 4, 5, 6, 7, 0o104755, 0, 1, 2, 0
    )  # fmt: skip
    table.ask(Opcode.SETATTR, body, (ATTRIBUTES, 1.0))
    name, node, change, handle, caller = table.call
    assert (name, node, handle, caller) == ("setattr", 9, 8, CALLER)
    assert change == (0o4755, 1, 2, 100, -1_999_999_995, 3_000_000_006, 4_000_000_007, True)
    body = wire.SETATTR_IN.pack(
        wire.FATTR_ATIME | wire.FATTR_ATIME_NOW | wire.FATTR_MTIME | wire.FATTR_MTIME_NOW,
        *(0,) * 15,
    )
    table.ask(Opcode.SETATTR, body, (ATTRIBUTES, 1.0))
    assert table.call[2] == (None, None, None, None, -1, -1, None, False)
    assert table.call[3] == 0


@pytest.mark.parametrize(
    ("opcode", "body", "call"),
    [
        (Opcode.MKNOD, struct.pack("=IIII", 0o20666, 0x105, 0o22, 0) + b"n\0",
         ("mknod", 9, b"n", 0o20666, 0x105, 0o22, CALLER)),
        (Opcode.MKDIR, struct.pack("=II", 0o777, 0o22) + b"n\0",
         ("mkdir", 9, b"n", 0o777, 0o22, CALLER)),
        (Opcode.SYMLINK, b"name\0target/of it\0", ("symlink", 9, b"name", b"target/of it", CALLER)),
        (Opcode.LINK, struct.pack("=Q", 3) + b"n\0", ("link", 3, 9, b"n", CALLER)),
    ],
)  # fmt: skip
def test_what_makes_names(opcode: Opcode, body: bytes, call: tuple[Any, ...]) -> None:
    table = Table()
    assert entry_of(table.ask(opcode, body, ENTRY))[0] == 5
    assert table.call == call


@pytest.mark.parametrize(
    ("opcode", "body", "call"),
    [
        (Opcode.UNLINK, b"n\0", ("unlink", 9, b"n", CALLER)),
        (Opcode.RMDIR, b"n\0", ("rmdir", 9, b"n", CALLER)),
        (Opcode.RENAME, struct.pack("=Q", 4) + b"old\0new\0",
         ("rename", 9, b"old", 4, b"new", 0, CALLER)),
        (Opcode.RENAME2, struct.pack("=QII", 4, 2, 0) + b"old\0new\0",
         ("rename", 9, b"old", 4, b"new", 2, CALLER)),
        (Opcode.FSYNC, struct.pack("=QII", 8, 1, 0), ("fsync", 8, True)),
        (Opcode.FSYNCDIR, struct.pack("=QII", 8, 0, 0), ("fsyncdir", 9, False)),
        (Opcode.SYNCFS, struct.pack("=Q", 0), ("syncfs",)),
        (Opcode.FLUSH, struct.pack("=QIIQ", 8, 0, 0, 0), ("flush", 8)),
        (Opcode.RELEASE, struct.pack("=QIIQ", 8, 0, 0, 0), ("release", 8)),
        (Opcode.FALLOCATE, struct.pack("=QQQII", 8, 100, 200, 1, 0), ("fallocate", 8, 1, 100, 200, CALLER)),
        (Opcode.REMOVEXATTR, b"user.x\0", ("removexattr", 9, b"user.x", CALLER)),
        (Opcode.SETXATTR, struct.pack("=IIII", 3, 2, 1, 0) + b"user.x\0a\0b",
         ("setxattr", 9, b"user.x", b"a\0b", 2, CALLER, True)),
    ],
)  # fmt: skip
def test_what_answers_nothing(opcode: Opcode, body: bytes, call: tuple[Any, ...]) -> None:
    table = Table()
    assert table.ask(opcode, body) == b""
    assert table.call == call


def test_setxattr_of_older_kernels() -> None:
    table = Table(setxattr_ext=False)
    assert table.ask(Opcode.SETXATTR, struct.pack("=II", 1, 0) + b"user.x\0v") == b""
    assert table.call == ("setxattr", 9, b"user.x", b"v", 0, CALLER, False)


def test_open_and_create() -> None:
    table = Table()
    body = struct.pack("=II", os.O_RDWR, wire.OPEN_KILL_SUIDGID)
    for opened, flags in (
        (Opened(6, Io.CACHED, -1, False), 0),
        (Opened(6, Io.CACHED, -1, True), wire.FOPEN_KEEP_CACHE),
        (Opened(6, Io.DIRECT, -1, True), wire.FOPEN_DIRECT_IO),
        (Opened(6, Io.PASSTHROUGH, -1, False), 0),  # not negotiated
    ):
        assert table.ask(Opcode.OPEN, body, opened) == struct.pack("=QIi", 6, flags, 0)
        assert table.call == ("open", 9, os.O_RDWR, CALLER, True)
    body = struct.pack("=IIII", os.O_WRONLY, 0o100644, 0o22, 0) + b"n\0"
    opened = Opened(6, Io.CACHED, -1, False)
    for opcode, call in (
        (Opcode.CREATE, ("create", 9, b"n", 0o100644, os.O_WRONLY, 0o22, CALLER)),
        (Opcode.TMPFILE, ("tmpfile", 9, 0o100644, os.O_WRONLY, 0o22, CALLER)),
    ):
        reply = table.ask(opcode, body, (ENTRY, opened))
        assert table.call == call
        assert entry_of(reply)[0] == 5
        assert wire.OPEN_OUT.unpack_from(reply, wire.ENTRY_OUT.size) == (6, 0, 0)
        assert len(reply) == wire.CREATE_OUT.size


def test_noflush_where_the_core_is_not_asked() -> None:
    table = Table(flush=False)
    reply = table.ask(Opcode.OPEN, struct.pack("=II", 0, 0), Opened(6, Io.CACHED, -1, False))
    assert wire.OPEN_OUT.unpack(reply)[1] == wire.FOPEN_NOFLUSH
    flush = struct.pack("=QIIQ", 6, 0, 0, 0)
    assert table.table[Opcode.FLUSH](9, flush, *CALLER) == errno.ENOSYS


def test_read_and_write() -> None:
    table = Table()
    body = struct.pack("=QQIIQII", 6, 4096, 10, 0, 0, 0, 0)
    assert table.ask(Opcode.READ, body, b"0123456789") == b"0123456789"
    assert table.call == ("read", 6, 4096, 10)
    body = struct.pack("=QQIIQII", 6, 4096, 4, wire.WRITE_KILL_SUIDGID, 0, 0, 0) + b"data"
    assert table.ask(Opcode.WRITE, body, 4) == struct.pack("=II", 4, 0)
    assert table.call == ("write", 6, 4096, b"data", True)
    body = struct.pack("=QQIIQII", 6, 0, 4, wire.WRITE_CACHE, 0, 0, 0) + b"data"
    table.ask(Opcode.WRITE, body, 3)
    assert table.call[-1] is False


def test_readlink_lseek_statfs_copy() -> None:
    table = Table()
    assert table.ask(Opcode.READLINK, b"", b"target") == b"target"
    body = struct.pack("=QQII", 6, 100, os.SEEK_HOLE, 0)
    assert table.ask(Opcode.LSEEK, body, 4096) == struct.pack("=Q", 4096)
    assert table.call == ("lseek", 6, 100, os.SEEK_HOLE)
    reply = table.ask(Opcode.STATFS, b"", StatFs(4096, 512, 1, 2, 3, 4, 5, 6, 255))
    assert struct.unpack("=QQQQQIII", reply[:52]) == (1, 2, 3, 4, 5, 4096, 255, 512)
    assert len(reply) == 80
    body = struct.pack("=QQQQQQQ", 6, 10, 3, 7, 20, 1 << 40, 0)
    assert table.ask(Opcode.COPY_FILE_RANGE, body, 5) == struct.pack("=II", 5, 0)
    assert table.call == ("copy_file_range", 6, 10, 7, 20, 0x7FFFF000, CALLER)
    assert table.ask(Opcode.COPY_FILE_RANGE_64, body, 1 << 35) == struct.pack("=Q", 1 << 35)
    assert table.call[-2] == 1 << 40


def test_seeking_holes_is_left_to_the_kernel_with_writeback() -> None:
    body = struct.pack("=QQII", 6, 0, 3, 0)
    assert Table(writeback=True).table[Opcode.LSEEK](9, body, *CALLER) == errno.ENOSYS


def entries() -> list[DirectoryEntry]:
    return [
        DirectoryEntry(b".", 1, stat.S_IFDIR, 1),
        DirectoryEntry(b"..", 2, stat.S_IFDIR, 2),
        DirectoryEntry(b"eight888", 3, stat.S_IFREG, 3),
        DirectoryEntry(b"n" * 255, 4, stat.S_IFLNK, 4),
    ]


def test_directories_are_opened_by_the_kernel_where_it_keeps_all_entries() -> None:
    body = struct.pack("=II", 0, 0)
    for offered in (False, True):
        table = Table(no_opendir=offered)
        table.core.answers |= {"spares_opendir": not offered, "caches_directory": False}
        assert table.table[Opcode.OPENDIR](9, body, *CALLER) == struct.pack("=QIi", 0, 0, 0)
        table.core.answers["caches_directory"] = True
        flags = wire.FOPEN_CACHE_DIR | wire.FOPEN_KEEP_CACHE
        assert table.table[Opcode.OPENDIR](9, body, *CALLER) == struct.pack("=QIi", 0, flags, 0)
    table.core.answers["spares_opendir"] = True
    assert table.table[Opcode.OPENDIR](9, body, *CALLER) == errno.ENOSYS
    assert table.table[Opcode.RELEASEDIR](9, bytes(24), *CALLER) == b""


def test_readdir() -> None:
    table = Table()
    body = struct.pack("=QQIIQII", 0, 1, 4096, 0, 0, 0, 0)
    reply = table.ask(Opcode.READDIR, body, entries())
    assert table.call == ("readdir", 9, 1)
    seen, at = [], 0
    while at < len(reply):
        ino, following, length, kind = wire.DIRENT.unpack_from(reply, at)
        name = reply[at + 24 : at + 24 + length]
        seen.append(DirectoryEntry(name, ino, kind << 12, following))
        at += (24 + length + 7) & ~7
    assert seen == entries() and at == len(reply)
    # A page that is too small ends before the entry that doesn't fit.
    for size in range(24, 400):
        body = struct.pack("=QQIIQII", 12, 0, size, 0, 0, 0, 0)
        assert len(table.ask(Opcode.READDIR, body, entries())) <= size


def test_readdirplus_gives_back_what_does_not_fit() -> None:
    table = Table()
    found = [
        (
            entry,
            Entry(0, None, 0, 0) if entry.name in (b".", b"..") else ENTRY._replace(node=40 + i),
        )
        for i, entry in enumerate(entries())
    ]
    body = struct.pack("=QQIIQII", 12, 0, 4096, 0, 0, 0, 0)
    reply = table.ask(Opcode.READDIRPLUS, body, found)
    assert [call[0] for call in table.core.calls] == ["readdirplus"]
    assert len(reply) == sum((152 + len(e.name) + 7) & ~7 for e, _ in found)
    assert entry_of(reply)[0] == 0
    assert entry_of(reply[2 * 160 :])[0] == 42
    body = struct.pack("=QQIIQII", 12, 0, 600, 0, 0, 0, 0)
    reply = table.ask(Opcode.READDIRPLUS, body, found)
    assert table.core.calls[1:] == [("forget", 43, 1)]
    assert len(reply) == 3 * 160


def test_getxattr_and_listxattr() -> None:
    table = Table()
    body = struct.pack("=II", 100, 0) + b"user.x\0"
    assert table.ask(Opcode.GETXATTR, body, b"value") == b"value"
    assert table.call == ("getxattr", 9, b"user.x", CALLER)
    body = struct.pack("=II", 0, 0) + b"user.x\0"
    assert table.ask(Opcode.GETXATTR, body, b"value") == struct.pack("=II", 5, 0)
    with pytest.raises(OSError) as caught:
        table.ask(Opcode.GETXATTR, struct.pack("=II", 4, 0) + b"user.x\0", b"value")
    assert caught.value.errno == errno.ERANGE
    body = struct.pack("=II", 100, 0)
    assert table.ask(Opcode.LISTXATTR, body, [b"user.x", b"user.y"]) == b"user.x\0user.y\0"
    assert table.ask(Opcode.LISTXATTR, body, []) == b""
    assert table.ask(Opcode.LISTXATTR, struct.pack("=II", 0, 0), [b"a"]) == struct.pack("=II", 2, 0)


def test_control() -> None:
    table = Table()
    assert table.ask(Opcode.INTERRUPT, struct.pack("=Q", 17)) is None
    assert table.interrupted == [17]
    assert table.ask(Opcode.NOTIFY_REPLY, b"") is None
    assert table.ask(Opcode.DESTROY, b"") == b""


@pytest.mark.parametrize("opcode", [0, 7, 19, Opcode.IOCTL, Opcode.POLL, Opcode.BMAP, 54, 63])
def test_what_is_not_implemented(opcode: int) -> None:
    assert Table().table[opcode](9, b"", *CALLER) == errno.ENOSYS


def test_every_opcode_has_its_answer() -> None:
    table = Table(flush=True).table
    without = {
        "INIT", "GETLK", "SETLK", "SETLKW", "ACCESS", "BMAP", "IOCTL", "POLL", "SETUPMAPPING",
        "REMOVEMAPPING",
    }  # fmt: skip
    for opcode in wire.Opcode:
        assert (table[opcode].__name__ == "not_implemented") == (opcode.name in without), opcode


def test_notifications() -> None:
    assert wire.inval_inode(7, -1, 0) == struct.pack("=IiQQqq", 40, 2, 0, 7, -1, 0)
    assert wire.inval_entry(7, b"name") == struct.pack("=IiQQII", 37, 3, 0, 7, 4, 0) + b"name\0"


ALL_FLAGS = (1 << 43) - 1


def offer(minor: int = 45, flags: int = ALL_FLAGS) -> wire.InitRequest:
    return wire.InitRequest(7, minor, 131072, flags)


def test_init_on_the_wire() -> None:
    body = struct.pack("=IIIII44x", 7, 45, 65536, wire.INIT_EXT | 5, 3)
    assert wire.unpack_init(body) == (7, 45, 65536, wire.INIT_EXT | 5 | 3 << 32)
    assert wire.unpack_init(struct.pack("=IIII", 7, 31, 65536, 5)) == (7, 31, 65536, 5)
    answer = wire.pack_init(wire.InitAnswer(44, 65536, 5 | 3 << 32, 64, 1 << 20, 256, 1))
    assert struct.unpack("=IIIIHHIIHHII", answer[:40]) == (
        7, 44, 65536, 5, 64, 48, 1 << 20, 1, 256, 0, 3, 1,
    )  # fmt: skip
    assert len(answer) == 64


def test_data_paths_exclude_each_other() -> None:
    options = TransportOptions()
    both = wire.PASSTHROUGH | wire.WRITEBACK_CACHE
    got = negotiate.agree(offer(), options, True, 1 << 20)
    assert got.data_path == "passthrough" and got.flags & both == wire.PASSTHROUGH
    assert got.answer.max_stack_depth == 1
    got = negotiate.agree(offer(), options, False, 1 << 20)
    assert got.data_path == "writeback" and got.flags & both == wire.WRITEBACK_CACHE
    got = negotiate.agree(offer(), TransportOptions(passthrough=False), True, 1 << 20)
    assert got.data_path == "writeback" and got.answer.max_stack_depth == 0
    got = negotiate.agree(
        offer(), TransportOptions(passthrough=False, writeback=False), True, 1 << 20
    )
    assert got.data_path == "plain" and got.flags & both == 0


def test_only_what_is_offered_is_taken() -> None:
    got = negotiate.agree(
        offer(31, wire.ASYNC_READ | wire.BIG_WRITES), TransportOptions(), True, 1 << 20
    )
    assert got.flags == wire.ASYNC_READ | wire.BIG_WRITES
    assert got.answer.minor == 31 and got.data_path == "plain"
    assert got.answer.max_write == 32 * os.sysconf("SC_PAGE_SIZE")
    got = negotiate.agree(offer(99), TransportOptions(acl=False), True, 1 << 20)
    assert got.answer.minor == wire.MINOR
    assert not got.flags & wire.POSIX_ACL and got.flags & wire.DONT_MASK
    for never in (wire.ALLOW_IDMAP, wire.POSIX_LOCKS, wire.FLOCK_LOCKS):
        assert not got.flags & never
    with pytest.raises(OSError, match=r"7\.30"):
        negotiate.agree(offer(30), TransportOptions(), True, 1 << 20)


def test_opcodes_agree_with_the_header() -> None:
    header = Path("/usr/include/linux/fuse.h")
    numbers = {}
    for line in header.read_text().splitlines():
        words = line.replace(",", " ").split()
        if len(words) >= 3 and words[0].startswith("FUSE_") and words[1] == "=":
            numbers[words[0].removeprefix("FUSE_")] = words[2]
    for opcode in wire.Opcode:
        if opcode.name in numbers:
            assert int(numbers[opcode.name]) == opcode
