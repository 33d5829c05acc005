"""From a request's bytes to a call of the core, and from its answer to the reply's bytes.

One table, indexed by opcode, that the device and the rings share. A handler takes the node and what
follows the header, and the caller's ids as the header has them; it returns the reply's bytes, None
where the kernel expects no reply, or a `Deferred` for a worker thread. Errors are OSErrors.

This is the hot path: closures over local names, positional arguments, nothing built in vain.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

from sdeefs.core.api import (
    NOW,
    Attributes,
    Caller,
    Entry,
    Io,
    Later,
    Opened,
    Operations,
    SetAttributes,
)
from sdeefs.transports import wire
from sdeefs.transports.backing import BackingIds
from sdeefs.transports.wire import Opcode, pack_attributes, pack_entry

log = logging.getLogger(__name__)


class Deferred:
    """The rest of a request: `finish()` calls the core and returns the reply's bytes."""

    __slots__ = ("encode", "later")

    def __init__(self, later: Later[Any], encode: Callable[[Any], bytes]) -> None:
        self.later = later
        self.encode = encode

    def finish(self) -> bytes:
        return self.encode(self.later.finish())


Body = bytes
#: An int is an errno, as OSError is: what is common (no such xattr, no such ioctl) needn't be raised.
Reply = bytes | int | Deferred | None
Handler = Callable[[int, Body, int, int, int], Reply]

_PAIR = wire.GETXATTR_IN


def not_implemented(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
    return errno.ENOSYS


def forget_each(operations: Operations, ones: Iterable[tuple[int, int]]) -> None:
    """FORGETs (node, look-ups) that came together: the kernel sends none twice, so what fails in one
    leaves the others to be done."""
    op_forget = operations.forget
    for node, lookups in ones:
        try:
            op_forget(node, lookups)
        except OSError as error:
            log.debug("forgetting node %d: %s", node, error)
        except Exception:
            log.exception("forgetting node %d failed", node)


class Features:
    """What was negotiated, as far as answers depend on it."""

    __slots__ = ("flush", "no_opendir", "setxattr_ext", "writeback")

    def __init__(
        self, flush: bool, setxattr_ext: bool, writeback: bool, no_opendir: bool = False
    ) -> None:
        self.flush = flush
        self.setxattr_ext = setxattr_ext
        self.writeback = writeback
        self.no_opendir = no_opendir

    @property
    def open_base(self) -> int:
        """The flags of every OPEN reply. With write-back the kernel ignores FOPEN_NOFLUSH; FLUSH
        answers ENOSYS once instead."""
        return 0 if self.flush else wire.FOPEN_NOFLUSH


def handlers(
    operations: Operations,
    features: Features,
    backing_ids: BackingIds | None,
    interrupt: Callable[[int], None],
) -> list[Handler]:
    """The table. `backing_ids` None: no passthrough; `interrupt` is told a request's unique."""
    table: list[Handler] = [not_implemented] * wire.OPCODES
    for part in (
        _names(operations),
        _attributes(operations),
        _files(operations, features, backing_ids),
        _directories(operations, features),
        _xattrs(operations, features),
        _control(interrupt),
    ):
        for opcode, handler in part.items():
            table[opcode] = handler
    return table


Part = dict[Opcode, Handler]


def _caller(values: tuple[int, int, int], _new: Any = tuple.__new__) -> Caller:
    return _new(Caller, values)  # type: ignore[no-any-return]


def _empty(_: None) -> bytes:
    return b""


def _done(answer: None | Later[None]) -> Reply:
    return b"" if answer is None else Deferred(answer, _empty)


def _entry(answer: Entry | Later[Entry]) -> Reply:
    if isinstance(answer, Later):
        return Deferred(answer, pack_entry)
    return pack_entry(answer)


def _names(operations: Operations) -> Part:
    """Look-ups, and everything that makes, moves and removes names."""
    op_lookup, op_forget = operations.lookup, operations.forget
    op_mknod, op_mkdir, op_symlink = operations.mknod, operations.mkdir, operations.symlink
    op_link, op_unlink, op_rmdir = operations.link, operations.unlink, operations.rmdir
    op_rename, op_readlink = operations.rename, operations.readlink
    new, caller_type = tuple.__new__, Caller

    def lookup(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        return pack_entry(op_lookup(node, body[:-1], new(caller_type, (uid, gid, pid))))

    def forget(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        op_forget(node, wire.FORGET_IN.unpack_from(body)[0])
        return None

    def batch_forget(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        count = wire.BATCH_FORGET_IN.unpack_from(body)[0]
        forget_each(operations, wire.FORGET_ONE.iter_unpack(body[8 : 8 + 16 * count]))
        return None

    def readlink(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        return op_readlink(node)

    def mknod(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        mode, rdev, umask, _ = wire.MKNOD_IN.unpack_from(body)
        return _entry(op_mknod(node, body[16:-1], mode, rdev, umask, _caller((uid, gid, pid))))

    def mkdir(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        mode, umask = wire.MKDIR_IN.unpack_from(body)
        return _entry(op_mkdir(node, body[8:-1], mode, umask, _caller((uid, gid, pid))))

    def symlink(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        name, target, _ = body.split(b"\0", 2)
        return _entry(op_symlink(node, name, target, _caller((uid, gid, pid))))

    def link(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        source = wire.LINK_IN.unpack_from(body)[0]
        return _entry(op_link(source, node, body[8:-1], _caller((uid, gid, pid))))

    def unlink(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        return _done(op_unlink(node, body[:-1], _caller((uid, gid, pid))))

    def rmdir(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        return _done(op_rmdir(node, body[:-1], _caller((uid, gid, pid))))

    def rename(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        to_node = wire.RENAME_IN.unpack_from(body)[0]
        name, to_name, _ = body[8:].split(b"\0", 2)
        return _done(op_rename(node, name, to_node, to_name, 0, _caller((uid, gid, pid))))

    def rename2(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        to_node, flags, _ = wire.RENAME2_IN.unpack_from(body)
        name, to_name, _ = body[16:].split(b"\0", 2)
        return _done(op_rename(node, name, to_node, to_name, flags, _caller((uid, gid, pid))))

    return {
        Opcode.LOOKUP: lookup,
        Opcode.FORGET: forget,
        Opcode.BATCH_FORGET: batch_forget,
        Opcode.READLINK: readlink,
        Opcode.MKNOD: mknod,
        Opcode.MKDIR: mkdir,
        Opcode.SYMLINK: symlink,
        Opcode.LINK: link,
        Opcode.UNLINK: unlink,
        Opcode.RMDIR: rmdir,
        Opcode.RENAME: rename,
        Opcode.RENAME2: rename2,
    }


def _attributes(operations: Operations) -> Part:
    """stat, statx, chmod, chown, truncate, utimens, statfs."""
    op_getattr, op_setattr, op_statfs = operations.getattr, operations.setattr, operations.statfs
    birth_time = operations.birth_time
    getattr_in = wire.GETATTR_IN.unpack_from

    def encode(answer: tuple[Attributes, float]) -> bytes:
        return pack_attributes(*answer)

    def get(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        flags, _, handle = getattr_in(body)
        if flags & 1:  # GETATTR_FH
            attributes, timeout = op_getattr(node, handle)
        else:
            attributes, timeout = op_getattr(node)
        return pack_attributes(attributes, timeout)

    def set_(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        (valid, _, handle, size, _, atime, mtime, ctime, atime_nsec, mtime_nsec, ctime_nsec,
         mode, _, new_uid, new_gid, _) = wire.SETATTR_IN.unpack_from(body)  # fmt: skip
        change = SetAttributes(
            mode & 0o7777 if valid & wire.FATTR_MODE else None,
            new_uid if valid & wire.FATTR_UID else None,
            new_gid if valid & wire.FATTR_GID else None,
            size if valid & wire.FATTR_SIZE else None,
            NOW
            if valid & wire.FATTR_ATIME_NOW
            else atime * 1_000_000_000 + atime_nsec
            if valid & wire.FATTR_ATIME
            else None,
            NOW
            if valid & wire.FATTR_MTIME_NOW
            else mtime * 1_000_000_000 + mtime_nsec
            if valid & wire.FATTR_MTIME
            else None,
            ctime * 1_000_000_000 + ctime_nsec if valid & wire.FATTR_CTIME else None,
            bool(valid & wire.FATTR_KILL_SUIDGID),
        )
        answer = op_setattr(
            node, change, handle if valid & wire.FATTR_FH else 0, _caller((uid, gid, pid))
        )
        if isinstance(answer, Later):
            return Deferred(answer, encode)
        return pack_attributes(*answer)

    def statx(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        flags, _, handle, _, _ = wire.STATX_IN.unpack_from(body)
        attributes, timeout = op_getattr(node, handle if flags & wire.GETATTR_FH else 0)
        return wire.pack_statx(attributes, timeout, birth_time(node))

    def statfs(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        return wire.pack_statfs(op_statfs())

    return {
        Opcode.GETATTR: get,
        Opcode.SETATTR: set_,
        Opcode.STATFS: statfs,
        Opcode.STATX: statx,
    }


def _files(operations: Operations, features: Features, backing_ids: BackingIds | None) -> Part:
    """Open files."""
    op_open, op_create, op_tmpfile = operations.open, operations.create, operations.tmpfile
    op_read, op_write, op_release = operations.read, operations.write, operations.release
    op_fsync, op_fallocate, op_lseek = operations.fsync, operations.fallocate, operations.lseek
    op_copy, op_flush, op_syncfs = (
        operations.copy_file_range,
        operations.flush,
        operations.syncfs,
    )
    read_in, write_in = wire.READ_IN.unpack_from, wire.WRITE_IN.unpack_from
    write_out, open_out = wire.WRITE_OUT.pack, wire.OPEN_OUT.pack
    passthrough, direct = Io.PASSTHROUGH, Io.DIRECT
    base = features.open_base

    def encode_open(node: int, opened: Opened) -> bytes:
        handle, io, backing, keep_cache = opened
        if io is direct:
            return open_out(handle, base | wire.FOPEN_DIRECT_IO, 0)
        if backing_ids is not None:
            backing_id = backing_ids.acquire(node, handle, backing if io is passthrough else None)
            if backing_id:
                return open_out(handle, base | wire.FOPEN_PASSTHROUGH, backing_id)
        return open_out(handle, base | wire.FOPEN_KEEP_CACHE if keep_cache else base, 0)

    def encode_create(answer: tuple[Entry, Opened]) -> bytes:
        entry, opened = answer
        return pack_entry(entry) + encode_open(entry.node, opened)

    def open_(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        flags, open_flags = wire.OPEN_IN.unpack_from(body)
        answer = op_open(
            node, flags, _caller((uid, gid, pid)), bool(open_flags & wire.OPEN_KILL_SUIDGID)
        )
        if isinstance(answer, Later):
            return Deferred(answer, lambda opened: encode_open(node, opened))
        return encode_open(node, answer)

    def create(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        flags, mode, umask, _ = wire.CREATE_IN.unpack_from(body)
        answer = op_create(node, body[16:-1], mode, flags, umask, _caller((uid, gid, pid)))
        if isinstance(answer, Later):
            return Deferred(answer, encode_create)
        return encode_create(answer)

    def tmpfile(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        flags, mode, umask, _ = wire.CREATE_IN.unpack_from(body)
        answer = op_tmpfile(node, mode, flags, umask, _caller((uid, gid, pid)))
        if isinstance(answer, Later):
            return Deferred(answer, encode_create)
        return encode_create(answer)

    def read(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        handle, offset, size, _, _, _, _ = read_in(body)
        return op_read(handle, offset, size)

    def write(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        handle, offset, size, flags, _, _, _ = write_in(body)
        return write_out(op_write(handle, offset, body[40 : 40 + size], bool(flags & 4)), 0)

    def release(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        handle = wire.RELEASE_IN.unpack_from(body)[0]
        if backing_ids is not None:
            backing_ids.release(handle)
        op_release(handle)
        return b""

    def flush(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        op_flush(wire.FLUSH_IN.unpack_from(body)[0])
        return b""

    def fsync(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        handle, flags, _ = wire.FSYNC_IN.unpack_from(body)
        return _done(op_fsync(handle, bool(flags & wire.FSYNC_FDATASYNC)))

    def syncfs(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        return _done(op_syncfs())

    def fallocate(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        handle, offset, length, mode, _ = wire.FALLOCATE_IN.unpack_from(body)
        return _done(op_fallocate(handle, mode, offset, length, _caller((uid, gid, pid))))

    def lseek(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        handle, offset, whence, _ = wire.LSEEK_IN.unpack_from(body)
        return wire.LSEEK_OUT.pack(op_lseek(handle, offset, whence))

    def copied(length: int) -> bytes:
        return write_out(length, 0)

    def copy_file_range(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        source, offset, _, target, to_offset, length, _ = wire.COPY_FILE_RANGE_IN.unpack_from(body)
        caller = _caller((uid, gid, pid))
        answer = op_copy(source, offset, target, to_offset, min(length, 0x7FFFF000), caller)
        return Deferred(answer, copied) if isinstance(answer, Later) else write_out(answer, 0)

    def copy_file_range_64(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        source, offset, _, target, to_offset, length, _ = wire.COPY_FILE_RANGE_IN.unpack_from(body)
        answer = op_copy(source, offset, target, to_offset, length, _caller((uid, gid, pid)))
        if isinstance(answer, Later):
            return Deferred(answer, wire.COPY_FILE_RANGE_OUT.pack)
        return wire.COPY_FILE_RANGE_OUT.pack(answer)

    part: Part = {
        Opcode.OPEN: open_,
        Opcode.CREATE: create,
        Opcode.TMPFILE: tmpfile,
        Opcode.READ: read,
        Opcode.WRITE: write,
        Opcode.RELEASE: release,
        Opcode.FSYNC: fsync,
        Opcode.SYNCFS: syncfs,
        Opcode.FALLOCATE: fallocate,
        Opcode.COPY_FILE_RANGE: copy_file_range,
        Opcode.COPY_FILE_RANGE_64: copy_file_range_64,
    }
    if features.flush:
        part[Opcode.FLUSH] = flush
    if not features.writeback:
        # With write-back the kernel doesn't write its dirty pages before it asks, and the answer
        # would miss them; after ENOSYS it answers itself: data up to the end, one hole there.
        part[Opcode.LSEEK] = lseek
    return part


def _directories(operations: Operations, features: Features) -> Part:
    """Directories, which have no handles."""
    op_readdir, op_readdirplus = operations.readdir, operations.readdirplus
    op_fsyncdir = operations.fsyncdir
    pack_dirent, pack_direntplus = wire.pack_dirent, wire.pack_direntplus

    may_cache, may_spare = operations.caches_directory, operations.spares_opendir
    cached = wire.FOPEN_CACHE_DIR | wire.FOPEN_KEEP_CACHE

    def opendir(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        if features.no_opendir and may_spare():
            # After this Linux opens directories by itself, as if we had answered `cached`.
            return errno.ENOSYS
        return wire.OPEN_OUT.pack(0, cached if may_cache(node) else 0, 0)

    def readdir(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        _, offset, room, _, _, _, _ = wire.READ_IN.unpack_from(body)
        page = []
        for entry in op_readdir(node, offset):
            room -= (31 + len(entry.name)) & ~7
            if room < 0:
                break
            page.append(pack_dirent(entry))
        return b"".join(page)

    def readdirplus(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        _, offset, room, _, _, _, _ = wire.READ_IN.unpack_from(body)
        page = []
        for entry, found in op_readdirplus(node, offset, _caller((uid, gid, pid))):
            room -= (159 + len(entry.name)) & ~7
            if room < 0:
                if found.node:
                    forget_each(operations, [(found.node, 1)])
                break
            page.append(pack_direntplus(entry, found))
        return b"".join(page)

    def releasedir(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        return b""

    def fsyncdir(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        _, flags, _ = wire.FSYNC_IN.unpack_from(body)
        return _done(op_fsyncdir(node, bool(flags & wire.FSYNC_FDATASYNC)))

    return {
        Opcode.OPENDIR: opendir,
        Opcode.READDIR: readdir,
        Opcode.READDIRPLUS: readdirplus,
        Opcode.RELEASEDIR: releasedir,
        Opcode.FSYNCDIR: fsyncdir,
    }


def _xattrs(operations: Operations, features: Features) -> Part:
    """Extended attributes, ACLs among them."""
    op_set, op_get = operations.setxattr, operations.getxattr
    op_list, op_remove = operations.listxattr, operations.removexattr
    extended = features.setxattr_ext

    def sized(value: bytes, size: int) -> bytes:
        if size == 0:
            return wire.GETXATTR_OUT.pack(len(value), 0)
        if len(value) > size:
            raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
        return value

    def set_(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        if extended:
            size, flags, more, _ = wire.SETXATTR_IN.unpack_from(body)
            start = wire.SETXATTR_IN.size
        else:
            size, flags = wire.SETXATTR_IN_COMPAT.unpack_from(body)
            more, start = 0, wire.SETXATTR_IN_COMPAT.size
        end = body.index(b"\0", start)
        name, value = body[start:end], body[end + 1 : end + 1 + size]
        kill = bool(more & wire.SETXATTR_ACL_KILL_SGID)
        return _done(op_set(node, name, value, flags, _caller((uid, gid, pid)), kill))

    def get(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        size, _ = _PAIR.unpack_from(body)
        return sized(op_get(node, body[8:-1], _caller((uid, gid, pid))), size)

    def list_(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        size, _ = _PAIR.unpack_from(body)
        names = op_list(node, _caller((uid, gid, pid)))
        return sized(b"".join([name + b"\0" for name in names]), size)

    def remove(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        return _done(op_remove(node, body[:-1], _caller((uid, gid, pid))))

    return {
        Opcode.SETXATTR: set_,
        Opcode.GETXATTR: get,
        Opcode.LISTXATTR: list_,
        Opcode.REMOVEXATTR: remove,
    }


def _control(interrupt: Callable[[int], None]) -> Part:
    """What the kernel says about the connection and about other requests."""

    def interrupted(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        interrupt(wire.INTERRUPT_IN.unpack_from(body)[0])
        return None

    def reply(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        return None  # what the kernel sends when it is asked for pages, which we never do

    def destroy(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
        return b""

    return {
        Opcode.INTERRUPT: interrupted,
        Opcode.NOTIFY_REPLY: reply,
        Opcode.DESTROY: destroy,
    }
