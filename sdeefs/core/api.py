"""The seam between the core and the transports: what is asked, and what is answered.

A request is a call of a method of `Operations`. It returns its answer, raises `OSError` with the
errno for the caller, or, where the work may take long (copying up a large file, fsync), returns a
`Later` whose `finish()` a worker thread calls for the answer. Names are bytes, as the kernel has
them; times are integers in nanoseconds; nodes are the numbers that the kernel holds (1 is the root).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

T = TypeVar("T")

ROOT_NODE = 1
#: In `SetAttributes`: the time of the server's clock, as UTIME_NOW.
NOW = -1


class Caller(NamedTuple):
    """Who asks, in the ids of the mount's user namespace, as FUSE's request header has it."""

    uid: int
    gid: int
    pid: int


class Attributes(NamedTuple):
    """What stat(2) tells of an object in merged; ids are already mapped."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    blocks: int
    blksize: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


class Entry(NamedTuple):
    """The answer to a look-up. Node 0 is a cacheable "no such name"; then attributes is None."""

    node: int
    attributes: Attributes | None
    entry_timeout: float
    attr_timeout: float


class Io(enum.Enum):
    """How the kernel reads and writes one open file. All handles of a node that are open at the
    same time agree; DIRECT ones may stand beside CACHED ones, not beside PASSTHROUGH (the kernel
    allows one backing file per inode at a time, and fails any other open with EIO meanwhile)."""

    PASSTHROUGH = "passthrough"  # the kernel uses `Opened.backing` itself (Linux >= 6.9)
    CACHED = "cached"  # page cache, READ and WRITE requests
    DIRECT = "direct"  # FOPEN_DIRECT_IO: every read and write is a request


class Opened(NamedTuple):
    """An open file or directory. `backing` is a descriptor that the core owns until release()."""

    handle: int
    io: Io
    backing: int
    keep_cache: bool


class SetAttributes(NamedTuple):
    """What SETATTR changes; None leaves a field alone. `kill_suid_sgid` is FATTR_KILL_SUIDGID."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    ctime_ns: int | None = None
    kill_suid_sgid: bool = False


class DirectoryEntry(NamedTuple):
    """One entry of a directory. `next_offset` is what to pass to go on after it (telldir)."""

    name: bytes
    ino: int
    kind: int  # the S_IFMT bits of the mode
    next_offset: int


class StatFs(NamedTuple):
    """statvfs of upper (of the topmost lower where there is no upper)."""

    bsize: int
    frsize: int
    blocks: int
    bfree: int
    bavail: int
    files: int
    ffree: int
    favail: int
    namemax: int


class Later(Generic[T]):
    """The rest of a request that may take long: a worker thread calls `finish()`."""

    __slots__ = ("finish",)

    def __init__(self, finish: Callable[[], T]) -> None:
        self.finish = finish


class Kernel(Protocol):
    """What the core asks of a transport: to make the kernel forget what it has cached.

    Both may be called from any thread and never while the core holds a lock that a request needs;
    both ignore nodes and names that the kernel doesn't know.
    """

    def invalidate_inode(self, node: int, attributes_only: bool = False) -> None: ...

    def invalidate_entry(self, parent: int, name: bytes) -> None: ...


class Operations(Protocol):
    """The core as transports see it. Fulfilled by `sdeefs.core.filesystem.Filesystem`.

    `handle` arguments are what open/create answered; 0 where the kernel gave none.
    """

    # A transport sets these before the first request, from what INIT negotiated:
    kernel: Kernel | None
    passthrough: bool  # backing files can be registered
    writeback: bool  # the kernel owns size and mtime of files open for writing
    killpriv: bool  # HANDLE_KILLPRIV_V2: the handlers clear suid, sgid and capabilities

    def lookup(self, parent: int, name: bytes, caller: Caller) -> Entry: ...
    def forget(self, node: int, count: int) -> None: ...
    def getattr(self, node: int, handle: int = 0) -> tuple[Attributes, float]: ...
    # in nanoseconds; None: the layer's filesystem doesn't know
    def birth_time(self, node: int) -> int | None: ...
    def setattr(
        self, node: int, change: SetAttributes, handle: int, caller: Caller
    ) -> tuple[Attributes, float] | Later[tuple[Attributes, float]]: ...
    def readlink(self, node: int) -> bytes: ...
    # mode as the caller gave it; umask is applied by the core (or the parent's default ACL instead)
    def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, umask: int, caller: Caller
    ) -> Entry | Later[Entry]: ...
    def mkdir(
        self, parent: int, name: bytes, mode: int, umask: int, caller: Caller
    ) -> Entry | Later[Entry]: ...
    def symlink(
        self, parent: int, name: bytes, target: bytes, caller: Caller
    ) -> Entry | Later[Entry]: ...
    def link(self, node: int, parent: int, name: bytes, caller: Caller) -> Entry | Later[Entry]: ...
    def unlink(self, parent: int, name: bytes, caller: Caller) -> None | Later[None]: ...
    def rmdir(self, parent: int, name: bytes, caller: Caller) -> None | Later[None]: ...
    # flags: RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT of renameat2(2)
    def rename(
        self, parent: int, name: bytes, to_parent: int, to_name: bytes, flags: int, caller: Caller
    ) -> None | Later[None]: ...
    def open(
        self, node: int, flags: int, caller: Caller, kill_suid_sgid: bool = False
    ) -> Opened | Later[Opened]: ...
    def create(
        self, parent: int, name: bytes, mode: int, flags: int, umask: int, caller: Caller
    ) -> tuple[Entry, Opened] | Later[tuple[Entry, Opened]]: ...
    def tmpfile(
        self, parent: int, mode: int, flags: int, umask: int, caller: Caller
    ) -> tuple[Entry, Opened] | Later[tuple[Entry, Opened]]: ...
    def read(self, handle: int, offset: int, size: int) -> bytes: ...
    def write(
        self, handle: int, offset: int, data: bytes | memoryview, kill_suid_sgid: bool
    ) -> int: ...
    def flush(self, handle: int) -> None: ...
    def fsync(self, handle: int, datasync: bool) -> None | Later[None]: ...
    def fsyncdir(self, node: int, datasync: bool) -> None | Later[None]: ...
    def syncfs(self) -> None | Later[None]: ...
    def release(self, handle: int) -> None: ...
    # Directories have no handles: offsets (`next_offset`) stay good whoever reads and whatever changes.
    # Whether the kernel may keep a directory's entries; and whether it may those of all, for good,
    # so that it needn't ask.
    def caches_directory(self, node: int) -> bool: ...
    def spares_opendir(self) -> bool: ...
    # "." and ".." included; endless only as the directory is; the transport stops when its page is full
    def readdir(self, node: int, offset: int) -> Iterator[DirectoryEntry]: ...
    # readdirplus: the same, each with its Entry; every yielded entry whose node isn't 0 counts as a
    # look-up (forget), so a transport that can't use the last one calls forget(node, 1) itself.
    # "." and ".." are yielded with node 0 and their attributes. To a caller that hasn't looked up
    # what it listed (core/lookers.py), node 0 without attributes may be told of others; None: never.
    def readdirplus(
        self, node: int, offset: int, caller: Caller | None = None
    ) -> Iterator[tuple[DirectoryEntry, Entry]]: ...
    def setxattr(
        self,
        node: int,
        name: bytes,
        value: bytes,
        flags: int,
        caller: Caller,
        kill_sgid: bool = False,
    ) -> None | Later[None]: ...
    def getxattr(self, node: int, name: bytes, caller: Caller) -> bytes: ...
    def listxattr(self, node: int, caller: Caller) -> list[bytes]: ...
    def removexattr(self, node: int, name: bytes, caller: Caller) -> None | Later[None]: ...
    def statfs(self) -> StatFs: ...
    def lseek(self, handle: int, offset: int, whence: int) -> int: ...
    # Of these two the kernel doesn't say whether setuid and setgid go: the caller's id has to.
    def fallocate(
        self, handle: int, mode: int, offset: int, length: int, caller: Caller
    ) -> None | Later[None]: ...
    def copy_file_range(
        self,
        handle_in: int,
        offset_in: int,
        handle_out: int,
        offset_out: int,
        length: int,
        caller: Caller,
    ) -> int | Later[int]: ...
    def close(self) -> None: ...
