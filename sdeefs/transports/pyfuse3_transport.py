"""The pyfuse3 transport: the same core behind pyfuse3 and trio, used plainly.

It runs wherever libfuse3 does and is the yardstick for the others. What pyfuse3 has no word for
fails cleanly: fallocate (EOPNOTSUPP), O_TMPFILE (EOPNOTSUPP); SEEK_HOLE and copy_file_range are
done by the kernel without us; a parent's default ACL is applied after the caller's umask.

pyfuse3 gives a node one number for both, the kernel's name of it and st_ino. So here the kernel's
names are the inode numbers, and a table leads back to the core's nodes.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pyfuse3
import trio

from sdeefs.core.api import (
    ROOT_NODE,
    Attributes,
    Caller,
    Entry,
    Io,
    Later,
    Opened,
    Operations,
    SetAttributes,
)
from sdeefs.transports.connection import abort_connection, error_number
from sdeefs.transports.notifier import Notifier
from sdeefs.transports.requests import forget_each
from sdeefs.transports.transport import PLAIN, WRITEBACK, TransportOptions

log = logging.getLogger(__name__)


class Numbers:
    """Inode number <-> node. One number may stand for several nodes of the same file in turn.

    `distinct`: not at the same time. With write-back the kernel believes no size and no time that
    it is told of an inode it holds, so where the core gives a changed file another node, it has to
    be another one for the kernel, at the price of another st_ino.
    """

    def __init__(self, distinct: bool = False) -> None:
        self._distinct = distinct
        self._nodes: dict[int, dict[int, int]] = {}  # number -> node -> look-ups, oldest first
        self._number_of: dict[int, int] = {ROOT_NODE: ROOT_NODE}

    def seen(self, node: int, ino: int) -> int:
        """A look-up is answered: the number for it."""
        if node == ROOT_NODE:
            return ROOT_NODE
        number = self._number_of.get(node)
        if number is None:
            number = ino
            if ino <= ROOT_NODE or (self._distinct and ino in self._nodes):
                number = node | 1 << 63
            self._number_of[node] = number
        nodes = self._nodes.setdefault(number, {})
        nodes[node] = nodes.pop(node, 0) + 1
        return number

    def node(self, number: int) -> int:
        """The newest node of a number."""
        if number == ROOT_NODE:
            return ROOT_NODE
        nodes = self._nodes.get(number)
        if not nodes:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return next(reversed(nodes))

    def number(self, node: int) -> int | None:
        return self._number_of.get(node)

    def forget(self, number: int, count: int) -> list[tuple[int, int]]:
        """What to tell the core: (node, look-ups) for this many look-ups of a number."""
        if number == ROOT_NODE:
            return [(ROOT_NODE, count)]
        nodes = self._nodes.get(number, {})
        told = []
        for node, held in list(nodes.items()):
            if count <= 0:
                break
            part = min(held, count)
            count -= part
            told.append((node, part))
            if part == held:
                del nodes[node]
                self._number_of.pop(node, None)
            else:
                nodes[node] = held - part
        if not nodes:
            self._nodes.pop(number, None)
        return told


class _Handlers(pyfuse3.Operations):
    """pyfuse3's view of the core."""

    supports_dot_lookup = False

    def __init__(self, operations: Operations, options: TransportOptions) -> None:
        super().__init__()
        self.enable_writeback_cache = options.writeback
        self.enable_acl = options.acl
        self.core = operations
        self.flushes = options.flush
        self.numbers = Numbers(distinct=options.writeback)
        self.counts: dict[str, int] = {}
        # pyfuse3 doesn't say through which handle fstat(2) asks; any of the file's will do, and is
        # all there is of a file whose name has gone.
        self.open_handles: dict[int, list[int]] = {}
        self.number_of_handle: dict[int, int] = {}

    # Helpers

    def _count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1

    async def _call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the core; what takes long goes to a thread."""
        self.counts[name] = self.counts.get(name, 0) + 1
        try:
            answer = function(*arguments)
            if isinstance(answer, Later):
                answer = await trio.to_thread.run_sync(answer.finish)
            return answer
        except OSError as error:
            raise pyfuse3.FUSEError(error_number(error)) from None
        except Exception:
            log.exception("request %s failed", name)
            raise pyfuse3.FUSEError(errno.EIO) from None

    def _node(self, number: int) -> int:
        try:
            return self.numbers.node(number)
        except OSError as error:
            raise pyfuse3.FUSEError(error_number(error)) from None

    @staticmethod
    def _fill(entry: Any, attributes: Attributes, attr_timeout: float) -> Any:
        entry.st_mode, entry.st_nlink = attributes.mode, attributes.nlink
        entry.st_uid, entry.st_gid, entry.st_rdev = attributes.uid, attributes.gid, attributes.rdev
        entry.st_size, entry.st_blocks = attributes.size, attributes.blocks
        entry.st_blksize = attributes.blksize
        entry.st_atime_ns, entry.st_mtime_ns = attributes.atime_ns, attributes.mtime_ns
        entry.st_ctime_ns = attributes.ctime_ns
        entry.attr_timeout = attr_timeout
        return entry

    def _entry(self, answer: Entry) -> Any:
        entry = pyfuse3.EntryAttributes()
        entry.entry_timeout = answer.entry_timeout
        if answer.attributes is None:
            entry.st_ino = 0
            return entry
        entry.st_ino = self.numbers.seen(answer.node, answer.attributes.ino)
        return self._fill(entry, answer.attributes, answer.attr_timeout)

    def _attributes(self, number: int, answer: tuple[Attributes, float]) -> Any:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = number
        return self._fill(entry, *answer)

    def _opened(self, number: int, opened: Opened) -> Any:
        self.open_handles.setdefault(number, []).append(opened.handle)
        self.number_of_handle[opened.handle] = number
        return pyfuse3.FileInfo(
            fh=opened.handle, direct_io=opened.io is Io.DIRECT, keep_cache=opened.keep_cache
        )

    # Names

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> Any:
        return self._entry(
            await self._call(
                "lookup", self.core.lookup, self._node(parent_inode), name, _caller(ctx)
            )
        )

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for number, count in inode_list:
            self._count("forget")
            forget_each(self.core, self.numbers.forget(number, count))

    async def readlink(self, inode: int, ctx: Any) -> Any:
        return await self._call("readlink", self.core.readlink, self._node(inode))

    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: Any) -> Any:
        return self._entry(
            await self._call(
                "mknod", self.core.mknod, self._node(parent_inode), name, mode, rdev, ctx.umask,
                _caller(ctx),
            )
        )  # fmt: skip

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> Any:
        return self._entry(
            await self._call(
                "mkdir", self.core.mkdir, self._node(parent_inode), name, mode, ctx.umask,
                _caller(ctx),
            )
        )  # fmt: skip

    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: Any) -> Any:
        return self._entry(
            await self._call(
                "symlink", self.core.symlink, self._node(parent_inode), name, target, _caller(ctx)
            )
        )

    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: Any) -> Any:
        return self._entry(
            await self._call(
                "link", self.core.link, self._node(inode), self._node(new_parent_inode), new_name,
                _caller(ctx),
            )
        )  # fmt: skip

    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        await self._call("unlink", self.core.unlink, self._node(parent_inode), name, _caller(ctx))

    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        await self._call("rmdir", self.core.rmdir, self._node(parent_inode), name, _caller(ctx))

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: Any,
    ) -> None:
        await self._call(
            "rename2", self.core.rename, self._node(parent_inode_old), name_old,
            self._node(parent_inode_new), name_new, flags, _caller(ctx),
        )  # fmt: skip

    # Attributes

    async def getattr(self, inode: int, ctx: Any) -> Any:
        handle = self.open_handles.get(inode, (0,))[0]
        return self._attributes(
            inode, await self._call("getattr", self.core.getattr, self._node(inode), handle)
        )

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> Any:
        change = SetAttributes(
            attr.st_mode & 0o7777 if fields.update_mode else None,
            attr.st_uid if fields.update_uid else None,
            attr.st_gid if fields.update_gid else None,
            attr.st_size if fields.update_size else None,
            attr.st_atime_ns if fields.update_atime else None,
            attr.st_mtime_ns if fields.update_mtime else None,
            attr.st_ctime_ns if fields.update_ctime else None,
        )
        return self._attributes(
            inode,
            await self._call(
                "setattr", self.core.setattr, self._node(inode), change, fh or 0, _caller(ctx)
            ),
        )

    async def statfs(self, ctx: Any) -> Any:
        answer = await self._call("statfs", self.core.statfs)
        data = pyfuse3.StatvfsData()
        data.f_bsize, data.f_frsize, data.f_blocks = answer.bsize, answer.frsize, answer.blocks
        data.f_bfree, data.f_bavail = answer.bfree, answer.bavail
        data.f_files, data.f_ffree, data.f_favail = answer.files, answer.ffree, answer.favail
        data.f_namemax = answer.namemax
        return data

    # Files

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        return self._opened(
            inode, await self._call("open", self.core.open, self._node(inode), flags, _caller(ctx))
        )

    async def create(self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        entry, opened = await self._call(
            "create", self.core.create, self._node(parent_inode), name, mode, flags, ctx.umask,
            _caller(ctx),
        )  # fmt: skip
        made = self._entry(entry)
        return self._opened(made.st_ino, opened), made

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return await self._call("read", self.core.read, fh, off, size)  # type: ignore[no-any-return]

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await self._call("write", self.core.write, fh, off, buf, False)  # type: ignore[no-any-return]

    async def flush(self, fh: int) -> None:
        if not self.flushes:
            raise pyfuse3.FUSEError(errno.ENOSYS)
        await self._call("flush", self.core.flush, fh)

    async def release(self, fh: int) -> None:
        number = self.number_of_handle.pop(fh)
        self.open_handles[number].remove(fh)
        if not self.open_handles[number]:
            del self.open_handles[number]
        await self._call("release", self.core.release, fh)

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._call("fsync", self.core.fsync, fh, datasync)

    # Directories

    async def opendir(self, inode: int, ctx: Any) -> int:
        return self._node(inode)  # the core's directories have no handles

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        await self._call("readdirplus", self._fill_page, fh, start_id, token)

    def _fill_page(self, fh: int, start_id: int, token: Any) -> None:
        for item, found in self.core.readdirplus(fh, start_id):
            if found.node == 0 or found.attributes is None:
                # "." and "..", and what vanished meanwhile: no look-up.
                entry = pyfuse3.EntryAttributes()
                entry.st_ino, entry.st_mode = item.ino, item.kind
                entry.entry_timeout = entry.attr_timeout = 0
                if item.name not in (b".", b".."):
                    continue
                if not pyfuse3.readdir_reply(token, item.name, entry, item.next_offset):
                    return
                continue
            entry = self._entry(found)
            if not pyfuse3.readdir_reply(token, item.name, entry, item.next_offset):
                forget_each(self.core, self.numbers.forget(entry.st_ino, 1))
                return

    async def releasedir(self, fh: int) -> None:
        pass

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._call("fsyncdir", self.core.fsyncdir, fh, datasync)

    # Extended attributes

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: Any) -> None:
        await self._call(
            "setxattr", self.core.setxattr, self._node(inode), name, value, 0, _caller(ctx)
        )

    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        return await self._call(  # type: ignore[no-any-return]
            "getxattr", self.core.getxattr, self._node(inode), name, _caller(ctx)
        )

    async def listxattr(self, inode: int, ctx: Any) -> Sequence[bytes]:
        return await self._call(  # type: ignore[no-any-return]
            "listxattr", self.core.listxattr, self._node(inode), _caller(ctx)
        )

    async def removexattr(self, inode: int, name: bytes, ctx: Any) -> None:
        await self._call(
            "removexattr", self.core.removexattr, self._node(inode), name, _caller(ctx)
        )


def _caller(ctx: Any) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.pid)


class Pyfuse3Transport:
    """See the module; the methods are those of `transport.Transport`. One at a time in a process."""

    name = "pyfuse3"
    _in_use = threading.Lock()

    def __init__(
        self, operations: Operations, fuse_fd: int, options: TransportOptions | None = None
    ) -> None:
        self._options = options or TransportOptions()
        self._operations = operations
        self._fd = fuse_fd
        self._handlers = _Handlers(operations, self._options)
        self._notifier: Notifier | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._stopping = False
        self._connected = False
        self._lock = threading.Lock()

    @property
    def data_path(self) -> str:
        return WRITEBACK if self._options.writeback else PLAIN

    def negotiate(self) -> None:
        """libfuse answers INIT in `run()`; here the core is told what comes of it."""
        if self._connected:
            return
        operations = self._operations
        operations.kernel = self
        operations.passthrough = False
        operations.writeback = self._options.writeback
        operations.killpriv = False  # the kernel clears the bits itself, by chmod
        if not Pyfuse3Transport._in_use.acquire(blocking=False):
            raise OSError(errno.EBUSY, "pyfuse3 serves one mount per process")
        self._notifier = Notifier(os.dup(self._fd))
        # The device is open and mounted already: libfuse takes it by this name.
        pyfuse3.init(self._handlers, f"/dev/fd/{self._fd}", {"fsname=sdeefs"})
        self._connected = True

    def run(self) -> None:
        self.negotiate()
        assert self._notifier is not None
        try:
            trio.run(self._serve)
        finally:
            self._connected = False
            abort_connection(self._fd)
            pyfuse3.close(unmount=False)
            self._notifier.end()
            os.close(self._notifier.device)
            Pyfuse3Transport._in_use.release()

    async def _serve(self) -> None:
        with self._lock:
            self._token = trio.lowlevel.current_trio_token()
            if self._stopping:
                return
        try:
            await pyfuse3.main()
        finally:
            with self._lock:
                self._token = None

    def stop(self) -> None:
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            if self._token is not None:
                self._token.run_sync_soon(pyfuse3.terminate)

    def connected(self) -> bool:
        return self._connected

    def counters(self) -> dict[str, int]:
        return dict(self._handlers.counts)

    def invalidate_inode(self, node: int, attributes_only: bool = False) -> None:
        number = self._handlers.numbers.number(node)
        if number is not None and self._notifier is not None:
            self._notifier.invalidate_inode(number, attributes_only)

    def invalidate_entry(self, parent: int, name: bytes) -> None:
        number = self._handlers.numbers.number(parent)
        if number is not None and self._notifier is not None:
            self._notifier.invalidate_entry(number, name)
