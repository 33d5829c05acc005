"""The system calls of mounting and namespaces that the standard library lacks, each raising OSError.

Constants stand under their kernel names in the order of the headers. Every wrapper raises
`OSError(errno, text, path)` and nothing else; paths are bytes or str, descriptors plain ints whose
owner is the caller. Numbers of system calls below 424 differ between architectures and stand in
one table; from 424 on they are the same everywhere.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

Path = bytes | str

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_SYMLINK_FOLLOW = 0x400
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

# <sys/mount.h>
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_REMOUNT = 32
MS_MANDLOCK = 64
MS_DIRSYNC = 128
MS_NOSYMFOLLOW = 256
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_SILENT = 32768
MS_POSIXACL = 1 << 16
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25
MNT_FORCE = 1
MNT_DETACH = 2
MNT_EXPIRE = 4
UMOUNT_NOFOLLOW = 8

# <linux/mount.h>
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_SYMLINKS = 0x01
MOVE_MOUNT_F_EMPTY_PATH = 0x04
MOVE_MOUNT_T_SYMLINKS = 0x10
MOVE_MOUNT_T_EMPTY_PATH = 0x40
MOVE_MOUNT_SET_GROUP = 0x100
MOVE_MOUNT_BENEATH = 0x200
FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
FSPICK_CLOEXEC = 1
FSPICK_EMPTY_PATH = 8
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_SET_BINARY = 2
FSCONFIG_SET_PATH = 3
FSCONFIG_SET_PATH_EMPTY = 4
FSCONFIG_SET_FD = 5
FSCONFIG_CMD_CREATE = 6
FSCONFIG_CMD_RECONFIGURE = 7
MOUNT_ATTR_RDONLY = 0x01
MOUNT_ATTR_NOSUID = 0x02
MOUNT_ATTR_NODEV = 0x04
MOUNT_ATTR_NOEXEC = 0x08
MOUNT_ATTR_RELATIME = 0x00
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR__ATIME = 0x70
MOUNT_ATTR_NODIRATIME = 0x80
MOUNT_ATTR_IDMAP = 0x00100000
MOUNT_ATTR_NOSYMFOLLOW = 0x00200000

# <linux/sched.h>
CLONE_NEWTIME = 0x00000080
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# <linux/fs.h>, <linux/openat2.h>
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10
RESOLVE_CACHED = 0x20

# <linux/prctl.h>
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_NAME = 15
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_SECUREBITS = 28
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4

# <linux/fanotify.h>
FAN_ACCESS = 0x01
FAN_MODIFY = 0x02
FAN_ATTRIB = 0x04
FAN_CLOSE_WRITE = 0x08
FAN_MOVED_FROM = 0x40
FAN_MOVED_TO = 0x80
FAN_CREATE = 0x100
FAN_DELETE = 0x200
FAN_DELETE_SELF = 0x400
FAN_MOVE_SELF = 0x800
FAN_Q_OVERFLOW = 0x4000
FAN_RENAME = 0x10000000
FAN_EVENT_ON_CHILD = 0x08000000
FAN_ONDIR = 0x40000000
FAN_CLOEXEC = 0x01
FAN_NONBLOCK = 0x02
FAN_CLASS_NOTIF = 0x00
FAN_UNLIMITED_QUEUE = 0x10
FAN_UNLIMITED_MARKS = 0x20
FAN_REPORT_FID = 0x200
FAN_REPORT_DIR_FID = 0x400
FAN_REPORT_NAME = 0x800
FAN_REPORT_DFID_NAME = FAN_REPORT_DIR_FID | FAN_REPORT_NAME
FAN_MARK_ADD = 0x01
FAN_MARK_REMOVE = 0x02
FAN_MARK_DONT_FOLLOW = 0x04
FAN_MARK_ONLYDIR = 0x08
FAN_MARK_FLUSH = 0x80
FAN_MARK_EVICTABLE = 0x200
FAN_EVENT_INFO_TYPE_FID = 1
FAN_EVENT_INFO_TYPE_DFID_NAME = 2
FAN_EVENT_INFO_TYPE_DFID = 3

_OLD_NUMBERS = {
    "x86_64": {
        "pivot_root": 155,
        "name_to_handle_at": 303,
        "open_by_handle_at": 304,
        "setns": 308,
        "unshare": 272,
        "renameat2": 316,
        "clone": 56,
        "fanotify_init": 300,
        "fanotify_mark": 301,
        "syncfs": 306,
        "statx": 332,
        "sync_file_range": 277,
    },
    "aarch64": {
        "pivot_root": 41,
        "name_to_handle_at": 264,
        "open_by_handle_at": 265,
        "setns": 268,
        "unshare": 97,
        "renameat2": 276,
        "clone": 220,
        "fanotify_init": 262,
        "fanotify_mark": 263,
        "syncfs": 267,
        "statx": 291,
        "sync_file_range": 84,
    },
}
_NUMBERS = {
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "openat2": 437,
    "mount_setattr": 442,
    **_OLD_NUMBERS.get(platform.machine(), {}),
}

_STATX_BTIME = 0x800
_SYNC_FILE_RANGE_WRITE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def _bytes(path: Path) -> bytes:
    return path if isinstance(path, bytes) else os.fsencode(path)


def _failed(path: Path | None) -> OSError:
    number = ctypes.get_errno()
    if path is None:
        return OSError(number, os.strerror(number))
    return OSError(number, os.strerror(number), path)


def call(name: str, *arguments: object, path: Path | None = None) -> int:
    """Make the system call `name`; ints travel as 64 bits. Raises OSError, ENOSYS where unknown."""
    number = _NUMBERS.get(name)
    if number is None:
        raise OSError(errno.ENOSYS, f"{name} has no number for {platform.machine()}")
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = int(_syscall(ctypes.c_long(number), *words))
    if result < 0:
        raise _failed(path)
    return result


def mount(
    source: Path | None,
    target: Path,
    fstype: Path | None = None,
    flags: int = 0,
    data: Path | None = None,
) -> None:
    """mount(2)."""
    result = _libc.mount(
        None if source is None else _bytes(source),
        _bytes(target),
        None if fstype is None else _bytes(fstype),
        ctypes.c_ulong(flags),
        None if data is None else _bytes(data),
    )
    if result < 0:
        raise _failed(target)


def umount2(target: Path, flags: int = 0) -> None:
    """umount2(2)."""
    if _libc.umount2(_bytes(target), flags) < 0:
        raise _failed(target)


def open_tree(dirfd: int, path: Path, flags: int = OPEN_TREE_CLOEXEC) -> int:
    """open_tree(2): a descriptor of a mount, or with OPEN_TREE_CLONE of a detached copy of it."""
    return call("open_tree", dirfd, _bytes(path), flags, path=path)


def move_mount(from_dirfd: int, from_path: Path, to_dirfd: int, to_path: Path, flags: int) -> None:
    """move_mount(2)."""
    call(
        "move_mount", from_dirfd, _bytes(from_path), to_dirfd, _bytes(to_path), flags, path=to_path
    )


def attach(mount_fd: int, target: Path) -> None:
    """Attach the detached mount `mount_fd` at the directory `target`."""
    move_mount(mount_fd, b"", AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH)


def fsopen(fstype: Path) -> int:
    """fsopen(2): a file system context; read(2) of it gives the kernel's messages."""
    return call("fsopen", _bytes(fstype), FSOPEN_CLOEXEC, path=fstype)


def _fsconfig(fs: int, command: int, key: str | None, value: bytes | None, aux: int) -> None:
    encoded = None if key is None else key.encode()
    try:
        call("fsconfig", fs, command, encoded, value, aux, path=key)
    except OSError as error:
        message = fs_messages(fs)
        if message:
            raise OSError(error.errno, f"{error.strerror} ({message})", key) from None
        raise


def fs_messages(fs: int) -> str:
    """What the kernel says about the failure of a file system context, in one line."""
    parts = []
    while True:
        try:
            text = os.read(fs, 4096)
        except OSError:
            break
        if not text:
            break
        parts.append(text.decode("utf-8", "replace").strip()[2:].strip())
    return "; ".join(parts)


def fsconfig_flag(fs: int, key: str) -> None:
    """Set an option without value."""
    _fsconfig(fs, FSCONFIG_SET_FLAG, key, None, 0)


def fsconfig_string(fs: int, key: str, value: Path) -> None:
    """Set an option to a string (the kernel takes 255 bytes)."""
    _fsconfig(fs, FSCONFIG_SET_STRING, key, _bytes(value), 0)


def fsconfig_fd(fs: int, key: str, fd: int) -> None:
    """Set an option to a descriptor (overlayfs: Linux >= 6.13)."""
    _fsconfig(fs, FSCONFIG_SET_FD, key, None, fd)


def fsconfig_create(fs: int) -> None:
    """Make the superblock."""
    _fsconfig(fs, FSCONFIG_CMD_CREATE, None, None, 0)


def fspick(dirfd: int, path: Path, flags: int = 0) -> int:
    """fspick(2): a context for changing the filesystem that is mounted there."""
    return call("fspick", dirfd, _bytes(path), FSPICK_CLOEXEC | flags, path=path)


def fsconfig_reconfigure(fs: int) -> None:
    """Change the superblock's options to those set."""
    _fsconfig(fs, FSCONFIG_CMD_RECONFIGURE, None, None, 0)


def fsmount(fs: int, attributes: int = 0) -> int:
    """fsmount(2): a descriptor of a new detached mount."""
    return call("fsmount", fs, FSMOUNT_CLOEXEC, attributes)


def mount_setattr(
    dirfd: int,
    path: Path,
    flags: int,
    attr_set: int = 0,
    attr_clr: int = 0,
    propagation: int = 0,
    userns_fd: int = 0,
) -> None:
    """mount_setattr(2), Linux >= 5.12."""
    attributes = ctypes.create_string_buffer(
        struct.pack("=QQQQ", attr_set, attr_clr, propagation, userns_fd), 32
    )
    call("mount_setattr", dirfd, _bytes(path), flags, attributes, 32, path=path)


def openat2(dirfd: int, path: Path, flags: int, mode: int = 0, resolve: int = 0) -> int:
    """openat2(2), Linux >= 5.6. O_CLOEXEC is added."""
    how = ctypes.create_string_buffer(struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, resolve), 24)
    while True:
        try:
            return call("openat2", dirfd, _bytes(path), how, 24, path=path)
        except OSError as error:
            if error.errno != errno.EAGAIN:  # RESOLVE_BENEATH beside a rename: try again
                raise


def unshare(flags: int) -> None:
    """unshare(2)."""
    call("unshare", flags)


def setns(fd: int, nstype: int = 0) -> None:
    """setns(2)."""
    call("setns", fd, nstype)


def clone(flags: int) -> int:
    """fork(2) into new namespaces: clone(2) with `flags` and SIGCHLD; 0 in the child.

    For processes with one thread: the child runs no fork handlers of Python.
    """
    import signal

    return call("clone", flags | signal.SIGCHLD, 0, 0, 0, 0)


def pivot_root(new: Path, old: Path) -> None:
    """pivot_root(2)."""
    call("pivot_root", _bytes(new), _bytes(old), path=new)


def renameat2(old_dirfd: int, old: Path, new_dirfd: int, new: Path, flags: int = 0) -> None:
    """renameat2(2)."""
    call("renameat2", old_dirfd, _bytes(old), new_dirfd, _bytes(new), flags, path=old)


def syncfs(fd: int) -> None:
    """syncfs(2): write out the file system of `fd`."""
    call("syncfs", fd)


def start_writing_out(fd: int) -> None:
    """sync_file_range(2): have the kernel begin to write a file to its disk, and don't wait."""
    call("sync_file_range", fd, 0, 0, _SYNC_FILE_RANGE_WRITE)


def name_to_handle_at(dirfd: int, path: Path, flags: int = 0) -> tuple[bytes, int]:
    """name_to_handle_at(2): (type as 4 bytes and the handle's bytes, mount id)."""
    limit = 128
    buffer = ctypes.create_string_buffer(struct.pack("=Ii", limit, 0), 8 + limit)
    mount_id = ctypes.c_int()
    call("name_to_handle_at", dirfd, _bytes(path), buffer, ctypes.byref(mount_id), flags, path=path)
    size = struct.unpack_from("=I", buffer.raw)[0]
    return buffer.raw[4 : 8 + size], mount_id.value


def open_by_handle_at(mount_fd: int, handle: bytes, flags: int) -> int:
    """open_by_handle_at(2) of what `name_to_handle_at` gave; needs CAP_DAC_READ_SEARCH."""
    buffer = ctypes.create_string_buffer(struct.pack("=I", len(handle) - 4) + handle)
    return call("open_by_handle_at", mount_fd, buffer, flags | os.O_CLOEXEC)


def birth_time(dirfd: int, name: bytes) -> int | None:
    """When an object was made, in nanoseconds, by statx(2); None where its filesystem doesn't know.

    An empty name is the object of the descriptor itself. Raises OSError.
    """
    buffer = ctypes.create_string_buffer(256)
    flags = AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH
    call("statx", dirfd, name, flags, _STATX_BTIME, buffer)
    mask = struct.unpack_from("=I", buffer)[0]
    if not mask & _STATX_BTIME:
        return None
    seconds, nanoseconds = struct.unpack_from("=qI", buffer, 80)  # stx_btime
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


def fanotify_init(flags: int, event_flags: int = os.O_RDONLY | os.O_CLOEXEC) -> int:
    """fanotify_init(2)."""
    return call("fanotify_init", flags, event_flags)


def fanotify_mark(fd: int, flags: int, mask: int, dirfd: int, path: Path | None = None) -> None:
    """fanotify_mark(2)."""
    call("fanotify_mark", fd, flags, mask, dirfd, None if path is None else _bytes(path), path=path)


def prctl(option: int, a: int = 0, b: int = 0, c: int = 0, d: int = 0) -> int:
    """prctl(2)."""
    words = [ctypes.c_ulong(x) for x in (a, b, c, d)]
    result = int(_libc.prctl(ctypes.c_int(option), *words))
    if result < 0:
        raise _failed(None)
    return result
