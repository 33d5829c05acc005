"""A small filesystem for the transports' tests: it shows one directory as it is, and counts.

It is `sdeefs.core.api.Operations` in the plainest way: each node is an O_PATH descriptor, each
handle an open one. Some names do odd things, so that tests can ask for them: see `lookup`.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Iterator

from sdeefs.core.api import (
    NOW,
    ROOT_NODE,
    Attributes,
    Caller,
    DirectoryEntry,
    Entry,
    Io,
    Kernel,
    Later,
    Opened,
    SetAttributes,
    StatFs,
)


class Mirror:
    """`timeout`: how long the kernel may believe what it is told."""

    def __init__(self, source: str, timeout: float = 0.0, io: Io | None = None) -> None:
        self.kernel: Kernel | None = None
        self.passthrough = self.writeback = self.killpriv = False
        self.timeout = timeout
        self.io = io
        self.lock = threading.RLock()
        root = os.open(source, os.O_PATH | os.O_DIRECTORY)
        self.nodes = {ROOT_NODE: root}
        self.lookups = {ROOT_NODE: 1}
        self.by_inode: dict[tuple[int, int], int] = {}
        self.next_node = 2
        self.handles: dict[int, int] = {}
        self.next_handle = 1
        self.gate = ""  # a path: what is slow waits until it is there
        self.calls: list[tuple[object, ...]] = []

    # helpers

    def _path(self, node: int) -> str:
        return f"/proc/self/fd/{self.nodes[node]}"

    def _attributes(self, fd: int) -> Attributes:
        st = os.stat(fd)
        return Attributes(
            st.st_ino, st.st_mode, st.st_nlink, st.st_uid, st.st_gid, st.st_rdev, st.st_size,
            st.st_blocks, st.st_blksize, st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns,
        )  # fmt: skip

    def _entry(self, parent: int, name: bytes) -> Entry:
        with self.lock:
            try:
                fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self.nodes[parent])
            except FileNotFoundError:
                return Entry(0, None, self.timeout, 0)
            st = os.stat(fd)
            key = (st.st_dev, st.st_ino)
            node = self.by_inode.get(key)
            if node is None:
                node, self.next_node = self.next_node, self.next_node + 1
                self.by_inode[key], self.nodes[node], self.lookups[node] = node, fd, 0
            else:
                os.close(fd)
            self.lookups[node] += 1
            return Entry(node, self._attributes(self.nodes[node]), self.timeout, self.timeout)

    def _opened(self, fd: int) -> Opened:
        with self.lock:
            handle, self.next_handle = self.next_handle, self.next_handle + 1
            self.handles[handle] = fd
        # Of a setuid file the kernel must ask at each write, as the real core has it.
        passes = self.passthrough and not os.fstat(fd).st_mode & 0o6000
        io = self.io or (Io.PASSTHROUGH if passes else Io.CACHED)
        return Opened(handle, io, fd, False)

    def _own(self, fd: int, caller: Caller) -> None:
        os.chown(f"/proc/self/fd/{fd}", caller.uid, caller.gid)

    # Operations

    def lookup(self, parent: int, name: bytes, caller: Caller) -> Entry:
        if name == b"crash":
            raise ValueError("a fault of the core")
        if name == b"odd-errno":
            raise OSError(100000, "no such errno")
        return self._entry(parent, name)

    def forget(self, node: int, count: int) -> None:
        with self.lock:
            self.lookups[node] -= count
            assert self.lookups[node] >= 0
            if self.lookups[node] == 0 and node != ROOT_NODE:
                fd = self.nodes.pop(node)
                st = os.stat(fd)
                self.by_inode.pop((st.st_dev, st.st_ino), None)
                del self.lookups[node]
                os.close(fd)

    def getattr(self, node: int, handle: int = 0) -> tuple[Attributes, float]:
        return self._attributes(self.nodes[node]), self.timeout

    def birth_time(self, node: int) -> int | None:
        return 1_000_000_000_000_000_123

    def setattr(
        self, node: int, change: SetAttributes, handle: int, caller: Caller
    ) -> tuple[Attributes, float] | Later[tuple[Attributes, float]]:
        self.calls.append(("setattr", change))

        def work() -> tuple[Attributes, float]:
            path = self._path(node)
            if change.mode is not None:
                os.chmod(path, change.mode)
            if change.uid is not None or change.gid is not None:
                os.chown(
                    path,
                    -1 if change.uid is None else change.uid,
                    -1 if change.gid is None else change.gid,
                )
            if change.size is not None:
                os.truncate(path, change.size)
            if change.atime_ns is not None or change.mtime_ns is not None:
                st, now = os.stat(path), time.time_ns()
                a = st.st_atime_ns if change.atime_ns is None else change.atime_ns
                m = st.st_mtime_ns if change.mtime_ns is None else change.mtime_ns
                os.utime(path, ns=(now if a == NOW else a, now if m == NOW else m))
            return self.getattr(node)

        if change.mode == 0o707:  # a slow one, for the tests of what takes long

            def slow() -> tuple[Attributes, float]:
                end = time.monotonic() + 60
                while self.gate and not os.path.exists(self.gate) and time.monotonic() < end:
                    time.sleep(0.01)
                return work()

            return Later(slow)
        return work()

    def readlink(self, node: int) -> bytes:
        return os.readlink(b"", dir_fd=self.nodes[node])

    def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, umask: int, caller: Caller
    ) -> Entry | Later[Entry]:
        os.mknod(name, mode & ~umask, rdev, dir_fd=self.nodes[parent])
        return self._made(parent, name, caller)

    def _made(self, parent: int, name: bytes, caller: Caller) -> Entry:
        os.chown(name, caller.uid, caller.gid, dir_fd=self.nodes[parent], follow_symlinks=False)
        return self._entry(parent, name)

    def mkdir(
        self, parent: int, name: bytes, mode: int, umask: int, caller: Caller
    ) -> Entry | Later[Entry]:
        os.mkdir(name, mode & ~umask, dir_fd=self.nodes[parent])
        return self._made(parent, name, caller)

    def symlink(
        self, parent: int, name: bytes, target: bytes, caller: Caller
    ) -> Entry | Later[Entry]:
        os.symlink(target, name, dir_fd=self.nodes[parent])
        return self._made(parent, name, caller)

    def link(self, node: int, parent: int, name: bytes, caller: Caller) -> Entry | Later[Entry]:
        os.link(self._path(node), name, dst_dir_fd=self.nodes[parent], follow_symlinks=True)
        return self._entry(parent, name)

    def unlink(self, parent: int, name: bytes, caller: Caller) -> None | Later[None]:
        os.unlink(name, dir_fd=self.nodes[parent])
        return None

    def rmdir(self, parent: int, name: bytes, caller: Caller) -> None | Later[None]:
        return Later(lambda: os.rmdir(name, dir_fd=self.nodes[parent]))

    def rename(
        self, parent: int, name: bytes, to_parent: int, to_name: bytes, flags: int, caller: Caller
    ) -> None | Later[None]:
        from mount_helpers import syscalls

        syscalls.renameat2(self.nodes[parent], name, self.nodes[to_parent], to_name, flags)
        return None

    def open(
        self, node: int, flags: int, caller: Caller, kill_suid_sgid: bool = False
    ) -> Opened | Later[Opened]:
        flags &= ~(os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL)
        if self.writeback:
            flags &= ~os.O_APPEND
            if flags & os.O_ACCMODE == os.O_WRONLY:
                flags = flags & ~os.O_ACCMODE | os.O_RDWR
        return self._opened(os.open(self._path(node), flags))

    def create(
        self, parent: int, name: bytes, mode: int, flags: int, umask: int, caller: Caller
    ) -> tuple[Entry, Opened] | Later[tuple[Entry, Opened]]:
        flags = flags & ~os.O_ACCMODE & ~os.O_APPEND | os.O_RDWR | os.O_CREAT
        fd = os.open(name, flags, mode & ~umask & 0o7777, dir_fd=self.nodes[parent])
        self._own(fd, caller)
        return self._entry(parent, name), self._opened(fd)

    def tmpfile(
        self, parent: int, mode: int, flags: int, umask: int, caller: Caller
    ) -> tuple[Entry, Opened] | Later[tuple[Entry, Opened]]:
        fd = os.open(self._path(parent), os.O_TMPFILE | os.O_RDWR, mode & ~umask & 0o7777)
        with self.lock:
            node, self.next_node = self.next_node, self.next_node + 1
            self.nodes[node] = os.open(f"/proc/self/fd/{fd}", os.O_PATH)
            self.lookups[node] = 1
        return Entry(node, self._attributes(fd), 0, 0), self._opened(fd)

    def read(self, handle: int, offset: int, size: int) -> bytes:
        return os.pread(self.handles[handle], size, offset)

    def write(
        self, handle: int, offset: int, data: bytes | memoryview, kill_suid_sgid: bool
    ) -> int:
        fd = self.handles[handle]
        if kill_suid_sgid:
            os.chmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) & 0o1777)
        return os.pwrite(fd, data, offset)

    def flush(self, handle: int) -> None:
        self.calls.append(("flush", handle))

    def fsync(self, handle: int, datasync: bool) -> None | Later[None]:
        self.calls.append(("fsync", datasync))
        return Later(lambda: os.fsync(self.handles[handle]))

    def fsyncdir(self, node: int, datasync: bool) -> None | Later[None]:
        self.calls.append(("fsyncdir", datasync))
        return None

    def syncfs(self) -> None | Later[None]:
        return None

    def release(self, handle: int) -> None:
        os.close(self.handles.pop(handle))

    def caches_directory(self, node: int) -> bool:
        return False

    def spares_opendir(self) -> bool:
        return False

    def _names(self, node: int) -> list[bytes]:
        return [b".", b"..", *sorted(os.fsencode(n) for n in os.listdir(self._path(node)))]

    def readdir(self, node: int, offset: int) -> Iterator[DirectoryEntry]:
        for i, name in enumerate(self._names(node)[offset:], offset + 1):
            try:
                st = os.stat(
                    os.path.join(os.fsencode(self._path(node)), name), follow_symlinks=False
                )
            except FileNotFoundError:
                continue
            yield DirectoryEntry(name, st.st_ino, stat.S_IFMT(st.st_mode), i)

    def readdirplus(
        self, node: int, offset: int, caller: Caller | None = None
    ) -> Iterator[tuple[DirectoryEntry, Entry]]:
        for entry in self.readdir(node, offset):
            if entry.name in (b".", b".."):
                yield entry, Entry(0, None, 0, 0)
            else:
                yield entry, self._entry(node, entry.name)

    def setxattr(
        self,
        node: int,
        name: bytes,
        value: bytes,
        flags: int,
        caller: Caller,
        kill_sgid: bool = False,
    ) -> None | Later[None]:
        os.setxattr(self._path(node), name, value, flags)
        return None

    def getxattr(self, node: int, name: bytes, caller: Caller) -> bytes:
        return os.getxattr(self._path(node), name)

    def listxattr(self, node: int, caller: Caller) -> list[bytes]:
        return [os.fsencode(name) for name in os.listxattr(self._path(node))]

    def removexattr(self, node: int, name: bytes, caller: Caller) -> None | Later[None]:
        os.removexattr(self._path(node), name)
        return None

    def statfs(self) -> StatFs:
        s = os.statvfs(self.nodes[ROOT_NODE])
        return StatFs(
            s.f_bsize, s.f_frsize, s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree,
            s.f_favail, s.f_namemax,
        )  # fmt: skip

    def lseek(self, handle: int, offset: int, whence: int) -> int:
        return os.lseek(self.handles[handle], offset, whence)

    def fallocate(
        self, handle: int, mode: int, offset: int, length: int, caller: Caller
    ) -> None | Later[None]:
        if mode:
            raise OSError(errno.EOPNOTSUPP, "only plain allocation")
        return Later(lambda: os.posix_fallocate(self.handles[handle], offset, length))

    def copy_file_range(
        self,
        handle_in: int,
        offset_in: int,
        handle_out: int,
        offset_out: int,
        length: int,
        caller: Caller,
    ) -> int | Later[int]:
        self.calls.append(("copy_file_range", length))
        return Later(
            lambda: os.copy_file_range(
                self.handles[handle_in], self.handles[handle_out], length, offset_in, offset_out
            )
        )

    def close(self) -> None:
        for fd in [*self.nodes.values(), *self.handles.values()]:
            os.close(fd)
        self.nodes.clear()
        self.handles.clear()
