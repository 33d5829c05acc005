"""FUSE's protocol on the wire, 7.31 to 7.45: numbers, structures, packing. Nothing else packs.

The numbers are ours and not the installed header's, which may be older than the kernel. Structures
are little more than `struct.Struct`s that are compiled once; those of requests are named `*_IN`,
those of answers `*_OUT`. All integers are in the machine's byte order, as the kernel has them.
"""

from __future__ import annotations

import enum
from struct import Struct
from typing import NamedTuple

from sdeefs.core.api import Attributes, DirectoryEntry, Entry, StatFs

MAJOR = 7
#: The newest minor version of which this module knows the structures.
MINOR = 45
#: Older kernels than 5.4 (7.31) aren't spoken to.
OLDEST_MINOR = 31


class Opcode(enum.IntEnum):
    """enum fuse_opcode."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52  # 7.39
    COPY_FILE_RANGE_64 = 53  # 7.45


#: Length of tables that are indexed by opcode.
OPCODES = 64


class Notify(enum.IntEnum):
    """enum fuse_notify_code: what a server writes unasked."""

    POLL = 1
    INVAL_INODE = 2
    INVAL_ENTRY = 3
    STORE = 4
    RETRIEVE = 5
    DELETE = 6
    RESEND = 7
    INC_EPOCH = 8


# Flags of INIT; bits from 32 on travel in flags2.
ASYNC_READ = 1 << 0
POSIX_LOCKS = 1 << 1
ATOMIC_O_TRUNC = 1 << 3
EXPORT_SUPPORT = 1 << 4
BIG_WRITES = 1 << 5
DONT_MASK = 1 << 6
SPLICE_WRITE = 1 << 7
SPLICE_MOVE = 1 << 8
SPLICE_READ = 1 << 9
FLOCK_LOCKS = 1 << 10
HAS_IOCTL_DIR = 1 << 11
AUTO_INVAL_DATA = 1 << 12
DO_READDIRPLUS = 1 << 13
READDIRPLUS_AUTO = 1 << 14
ASYNC_DIO = 1 << 15
WRITEBACK_CACHE = 1 << 16
NO_OPEN_SUPPORT = 1 << 17
PARALLEL_DIROPS = 1 << 18
HANDLE_KILLPRIV = 1 << 19
POSIX_ACL = 1 << 20
ABORT_ERROR = 1 << 21
MAX_PAGES = 1 << 22
CACHE_SYMLINKS = 1 << 23
NO_OPENDIR_SUPPORT = 1 << 24
EXPLICIT_INVAL_DATA = 1 << 25
MAP_ALIGNMENT = 1 << 26
SUBMOUNTS = 1 << 27
HANDLE_KILLPRIV_V2 = 1 << 28
SETXATTR_EXT = 1 << 29
INIT_EXT = 1 << 30
SECURITY_CTX = 1 << 32
HAS_INODE_DAX = 1 << 33
CREATE_SUPP_GROUP = 1 << 34
HAS_EXPIRE_ONLY = 1 << 35
DIRECT_IO_ALLOW_MMAP = 1 << 36
PASSTHROUGH = 1 << 37
NO_EXPORT_SUPPORT = 1 << 38
HAS_RESEND = 1 << 39
ALLOW_IDMAP = 1 << 40
OVER_IO_URING = 1 << 41
REQUEST_TIMEOUT = 1 << 42

# open_flags of an OPEN, CREATE or OPENDIR answer.
FOPEN_DIRECT_IO = 1 << 0
FOPEN_KEEP_CACHE = 1 << 1
FOPEN_NONSEEKABLE = 1 << 2
FOPEN_CACHE_DIR = 1 << 3
FOPEN_STREAM = 1 << 4
FOPEN_NOFLUSH = 1 << 5
FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6
FOPEN_PASSTHROUGH = 1 << 7

# `valid` of SETATTR.
FATTR_MODE = 1 << 0
FATTR_UID = 1 << 1
FATTR_GID = 1 << 2
FATTR_SIZE = 1 << 3
FATTR_ATIME = 1 << 4
FATTR_MTIME = 1 << 5
FATTR_FH = 1 << 6
FATTR_ATIME_NOW = 1 << 7
FATTR_MTIME_NOW = 1 << 8
FATTR_LOCKOWNER = 1 << 9
FATTR_CTIME = 1 << 10
FATTR_KILL_SUIDGID = 1 << 11

GETATTR_FH = 1 << 0
OPEN_KILL_SUIDGID = 1 << 0
WRITE_CACHE = 1 << 0
WRITE_KILL_SUIDGID = 1 << 2
FSYNC_FDATASYNC = 1 << 0
SETXATTR_ACL_KILL_SGID = 1 << 0
EXPIRE_ONLY = 1 << 0
MIN_READ_BUFFER = 8192

# ioctls of /dev/fuse (_IOR and _IOW of asm-generic: x86_64, aarch64, riscv64).
DEV_IOC_CLONE = 0x8004E500
DEV_IOC_BACKING_OPEN = 0x4010E501
DEV_IOC_BACKING_CLOSE = 0x4004E502

#: struct fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding.
IN_HEADER = Struct("=IIQQIIIHH")
#: struct fuse_out_header: len, error, unique.
OUT_HEADER = Struct("=IiQ")

_ATTR = "QQQqqqIIIIIIIIII"
ATTR_OUT = Struct("=QII" + _ATTR)
ENTRY_OUT = Struct("=QQQQII" + _ATTR)
OPEN_OUT = Struct("=QIi")
CREATE_OUT = Struct("=QQQQII" + _ATTR + "QIi")
WRITE_OUT = Struct("=II")
STATFS_OUT = Struct("=QQQQQIIII24x")
GETXATTR_OUT = Struct("=II")
LSEEK_OUT = Struct("=Q")
COPY_FILE_RANGE_OUT = Struct("=Q")
DIRENT = Struct("=QQII")
#: struct fuse_statx_out: attr_valid (sec, nsec), flags, spare; then struct fuse_statx.
STATX_OUT = Struct("=QII16xIIQIIIH2xQQQQqIiqIiqIiqIiIIII112x")

GETATTR_IN = Struct("=IIQ")
SETATTR_IN = Struct("=IIQQQqqqIIIIIIII")
MKNOD_IN = Struct("=IIII")
MKDIR_IN = Struct("=II")
RENAME_IN = Struct("=Q")
RENAME2_IN = Struct("=QII")
LINK_IN = Struct("=Q")
OPEN_IN = Struct("=II")
CREATE_IN = Struct("=IIII")
RELEASE_IN = Struct("=QIIQ")
FLUSH_IN = Struct("=QIIQ")
READ_IN = Struct("=QQIIQII")
WRITE_IN = Struct("=QQIIQII")
FSYNC_IN = Struct("=QII")
SETXATTR_IN = Struct("=IIII")
SETXATTR_IN_COMPAT = Struct("=II")
GETXATTR_IN = Struct("=II")
FORGET_IN = Struct("=Q")
BATCH_FORGET_IN = Struct("=II")
FORGET_ONE = Struct("=QQ")
FALLOCATE_IN = Struct("=QQQII")
LSEEK_IN = Struct("=QQII")
COPY_FILE_RANGE_IN = Struct("=QQQQQQQ")
INTERRUPT_IN = Struct("=Q")
STATX_IN = Struct("=IIQII")
#: major, minor, max_readahead, flags; from 7.36 on flags2 and spare words follow.
INIT_IN = Struct("=IIII")
INIT_FLAGS2_IN = Struct("=I")
#: major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran,
#: max_pages, map_alignment, flags2, max_stack_depth, request_timeout, spare.
INIT_OUT = Struct("=IIIIHHIIHHIIH22x")

NOTIFY_INVAL_INODE = Struct("=IiQQqq")
NOTIFY_INVAL_ENTRY = Struct("=IiQQII")
BACKING_MAP = Struct("=iIQ")
BACKING_ID = Struct("=I")

_NS = 1_000_000_000


class InitRequest(NamedTuple):
    """What the kernel offers; `flags` has flags2 in its upper half."""

    major: int
    minor: int
    max_readahead: int
    flags: int


class InitAnswer(NamedTuple):
    """What we take of it."""

    minor: int
    max_readahead: int
    flags: int
    max_background: int
    max_write: int
    max_pages: int
    max_stack_depth: int


def unpack_init(body: bytes) -> InitRequest:
    """Decode struct fuse_init_in."""
    major, minor, max_readahead, flags = INIT_IN.unpack_from(body)
    if flags & INIT_EXT and len(body) >= INIT_IN.size + INIT_FLAGS2_IN.size:
        flags |= INIT_FLAGS2_IN.unpack_from(body, INIT_IN.size)[0] << 32
    return InitRequest(major, minor, max_readahead, flags)


def pack_init(answer: InitAnswer) -> bytes:
    """Encode struct fuse_init_out."""
    return INIT_OUT.pack(
        MAJOR,
        answer.minor,
        answer.max_readahead,
        answer.flags & 0xFFFFFFFF,
        answer.max_background,
        answer.max_background * 3 // 4,
        answer.max_write,
        1,
        answer.max_pages,
        0,
        answer.flags >> 32,
        answer.max_stack_depth,
        0,
    )


class Timeouts(dict[float, tuple[int, int]]):
    """seconds -> (seconds, nanoseconds), remembered, since few different ones are in use."""

    def __missing__(self, timeout: float) -> tuple[int, int]:
        if len(self) > 256:
            self.clear()
        whole = int(timeout)
        self[timeout] = pair = (whole, int((timeout - whole) * 1e9))
        return pair


_timeouts = Timeouts()


_pack_entry, _pack_attributes = ENTRY_OUT.pack, ATTR_OUT.pack


def pack_entry(entry: Entry) -> bytes:
    """Encode struct fuse_entry_out; node 0 is a name that isn't there, for the kernel to remember."""
    node, attributes, entry_timeout, attr_timeout = entry
    entry_sec, entry_nsec = _timeouts[entry_timeout]
    if attributes is None:
        return _pack_entry(0, 0, entry_sec, 0, entry_nsec, 0, *_NO_ATTR)
    attr_sec, attr_nsec = _timeouts[attr_timeout]
    ino, mode, nlink, uid, gid, rdev, size, blocks, blksize, atime, mtime, ctime = attributes
    return _pack_entry(
        node, 0, entry_sec, attr_sec, entry_nsec, attr_nsec,
        ino, size, blocks, atime // _NS, mtime // _NS, ctime // _NS,
        atime % _NS, mtime % _NS, ctime % _NS, mode, nlink, uid, gid, rdev & 0xFFFFFFFF, blksize, 0,
    )  # fmt: skip


_NO_ATTR = (0,) * 16
NO_ENTRY = ENTRY_OUT.pack(*(0,) * 22)


def pack_attributes(attributes: Attributes, timeout: float) -> bytes:
    """Encode struct fuse_attr_out."""
    ino, mode, nlink, uid, gid, rdev, size, blocks, blksize, atime, mtime, ctime = attributes
    seconds, nanoseconds = _timeouts[timeout]
    return _pack_attributes(
        seconds, nanoseconds, 0, ino, size, blocks, atime // _NS, mtime // _NS, ctime // _NS,
        atime % _NS, mtime % _NS, ctime % _NS, mode, nlink, uid, gid, rdev & 0xFFFFFFFF, blksize, 0,
    )  # fmt: skip


#: STATX_BASIC_STATS and STATX_BTIME of statx(2).
STATX_BASIC_STATS = 0x7FF
STATX_BTIME = 0x800


def pack_statx(attributes: Attributes, timeout: float, birth_ns: int | None) -> bytes:
    """Encode struct fuse_statx_out; birth_ns None: the object's birth isn't known."""
    ino, mode, nlink, uid, gid, rdev, size, blocks, blksize, atime, mtime, ctime = attributes
    seconds, nanoseconds = _timeouts[timeout]
    mask = STATX_BASIC_STATS | (0 if birth_ns is None else STATX_BTIME)
    birth = birth_ns or 0
    major, minor = (rdev >> 8) & 0xFFF, (rdev & 0xFF) | ((rdev >> 12) & 0xFFF00)
    return STATX_OUT.pack(
        seconds, nanoseconds, 0, mask, blksize, 0, nlink, uid, gid, mode, ino, size, blocks, 0,
        atime // _NS, atime % _NS, 0, birth // _NS, birth % _NS, 0, ctime // _NS, ctime % _NS, 0,
        mtime // _NS, mtime % _NS, 0, major, minor, 0, 0,
    )  # fmt: skip


def pack_statfs(answer: StatFs) -> bytes:
    """Encode struct fuse_statfs_out."""
    return STATFS_OUT.pack(
        answer.blocks, answer.bfree, answer.bavail, answer.files, answer.ffree,
        answer.bsize, answer.namemax, answer.frsize, 0,
    )  # fmt: skip


_PADDING = tuple(b"\0" * (-length % 8) for length in range(8))


def pack_dirent(entry: DirectoryEntry) -> bytes:
    """Encode struct fuse_dirent, padded to 8 bytes."""
    name, ino, kind, next_offset = entry
    length = len(name)
    return DIRENT.pack(ino, next_offset, length, kind >> 12) + name + _PADDING[length & 7]


def pack_direntplus(entry: DirectoryEntry, found: Entry) -> bytes:
    """Encode struct fuse_direntplus; node 0: without what a look-up would have told."""
    head: bytes = NO_ENTRY if found.node == 0 else pack_entry(found)
    return head + pack_dirent(entry)


def inval_inode(node: int, offset: int, length: int) -> bytes:
    """A whole notification; a negative offset leaves the data alone, length 0 is to the end."""
    return NOTIFY_INVAL_INODE.pack(
        NOTIFY_INVAL_INODE.size, Notify.INVAL_INODE, 0, node, offset, length
    )


def inval_entry(parent: int, name: bytes, flags: int = 0) -> bytes:
    """A whole notification: what is known of this name is forgotten."""
    length = NOTIFY_INVAL_ENTRY.size + len(name) + 1
    return (
        NOTIFY_INVAL_ENTRY.pack(length, Notify.INVAL_ENTRY, 0, parent, len(name), flags)
        + name
        + b"\0"
    )


assert ENTRY_OUT.size == 128 and ATTR_OUT.size == 104 and IN_HEADER.size == 40
assert INIT_OUT.size == 64 and STATX_OUT.size == 288 and SETATTR_IN.size == 88
