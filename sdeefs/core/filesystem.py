"""The union file system as transports call it: each request under the lock, slow work as a `Later`."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any, overload

from mount_helpers import syscalls
from sdeefs.core import credentials
from sdeefs.core.api import (
    Attributes,
    Caller,
    DirectoryEntry,
    Entry,
    Later,
    Opened,
    SetAttributes,
    StatFs,
)
from sdeefs.core.copyup import LARGE, SlowCopyUp
from sdeefs.core.listing import Snapshot
from sdeefs.core.nodes import UPPER, Directory, Node
from sdeefs.core.settings import Settings
from sdeefs.core.union import stale
from sdeefs.core.xattrs import CAPABILITY, Xattrs


class _Open:
    """`Filesystem.open(settings)` opens a mount's layers; `filesystem.open(node, ...)` is open(2)."""

    @overload
    def __get__(self, instance: None, owner: type[Filesystem]) -> type[Filesystem]: ...

    @overload
    def __get__(
        self, instance: Filesystem, owner: type[Filesystem]
    ) -> Callable[..., Opened | Later[Opened]]: ...

    def __get__(self, instance: Filesystem | None, owner: type[Filesystem]) -> Any:
        return owner if instance is None else instance.open_node


class Filesystem(Xattrs):
    """One mount's layers, ready to be asked. Any number of threads may call."""

    def __init__(self, settings: Settings) -> None:
        os.umask(0)  # modes are the callers', their umasks come with the requests
        super().__init__(settings)

    # names

    def lookup(self, parent: int, name: bytes, caller: Caller) -> Entry:
        """The object of a name, with everything stat tells."""
        with self.lock:
            if self.open_directories > self.settings.max_directories:
                self._trim()
            directory = self._directory(parent)
            entry = self._lookup(directory, name)
            if directory.lister == caller.pid and entry.attributes is not None:
                self.lookers.note(caller.pid, stat.S_IFMT(entry.attributes.mode))
            return entry

    def forget(self, node: int, count: int) -> None:
        """The kernel drops `count` look-ups of a node."""
        dropped = []
        with self.lock:
            self.table.forget(node, count)
            if self.table.dropped or self.table.dropped_directories:
                dropped = self._take_dropped()
        for fd in dropped:
            os.close(fd)

    # attributes

    def getattr(self, node: int, handle: int = 0) -> tuple[Attributes, float]:
        """stat(2)."""
        with self.lock:
            found = self._node(node)
            try:
                extra = found.extra
                if extra is not None and extra.privileged is not None:
                    self._check_privileges(found)
                return self._answer(found)
            except OSError as error:
                file = self._files.get(handle)
                if file is None or error.errno != errno.ESTALE:
                    raise
                return self._attributes(found, os.fstat(file.fd)), 0.0

    def birth_time(self, node: int) -> int | None:
        """When an object was made, in nanoseconds; None where its layer's file system doesn't know."""
        with self.lock:
            return syscalls.birth_time(*self._place(self._node(node)))

    def setattr(
        self, node: int, change: SetAttributes, handle: int, caller: Caller
    ) -> tuple[Attributes, float] | Later[tuple[Attributes, float]]:
        """chmod, chown, truncate, utimens."""
        try:
            with self.lock:
                return self._setattr(node, change, handle)
        except SlowCopyUp as slow:
            return self._later(slow, self._setattr, node, change, handle)

    def _setattr(self, number: int, change: SetAttributes, handle: int) -> tuple[Attributes, float]:
        node = self._node(number)
        if change[:6] == (None,) * 6 and not change.kill_suid_sgid:
            return self._answer(node)  # ctime alone: upper keeps its own
        if self._only_repeats(node, change):
            return self._answer(node)
        self._writable()
        self._review(node)
        extra = node.extra
        secret = extra is not None and extra.secret
        if secret and change.size:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if node.layer != UPPER:
            self._copy_up(node, 1 << 63 if change.size is None else change.size)
        credentials.settle()
        file = self._files.get(handle)
        self._change(node, change, file.fd if file is not None and file.node is node else -1)
        if secret and change.size == 0:
            self._reveal(node)
        if extra is not None and extra.handles:
            self._note_privileges(node, change)
        return self._answer(node)

    def _only_repeats(self, node: Node, change: SetAttributes) -> bool:
        """With write-back the kernel tells the times of a file whose name has just gone. Of one in
        lower they are what they were, and nobody is left for whom it would be copied up."""
        return (
            node.layer != UPPER
            and self._is_orphan(node)
            and change[:5] == (None,) * 5
            and not change.kill_suid_sgid
            and change.mtime_ns == self._stat(node).st_mtime_ns
        )

    def readlink(self, node: int) -> bytes:
        """The target of a symbolic link."""
        with self.lock:
            found = self._node(node)
            where, name = self._place(found)
            return os.readlink(name, dir_fd=where)

    # new objects

    def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, umask: int, caller: Caller
    ) -> Entry | Later[Entry]:
        """A file, device, pipe or socket."""
        with self.lock:
            if not stat.S_IFMT(mode):
                mode |= stat.S_IFREG
            return self._make(self._directory(parent), name, mode, umask, caller, rdev)

    def mkdir(
        self, parent: int, name: bytes, mode: int, umask: int, caller: Caller
    ) -> Entry | Later[Entry]:
        """A directory."""
        with self.lock:
            mode = stat.S_IMODE(mode) | stat.S_IFDIR
            return self._make(self._directory(parent), name, mode, umask, caller)

    def symlink(
        self, parent: int, name: bytes, target: bytes, caller: Caller
    ) -> Entry | Later[Entry]:
        """A symbolic link."""
        with self.lock:
            mode = stat.S_IFLNK | 0o777
            return self._make(self._directory(parent), name, mode, 0, caller, 0, target)

    def link(self, node: int, parent: int, name: bytes, caller: Caller) -> Entry | Later[Entry]:
        """A hard link."""
        try:
            with self.lock:
                return self._link_number(node, parent, name)
        except SlowCopyUp as slow:
            return self._later(slow, self._link_number, node, parent, name)

    def _link_number(self, node: int, parent: int, name: bytes) -> Entry:
        return self._link(self._node(node), self._directory(parent), name)

    def create(
        self, parent: int, name: bytes, mode: int, flags: int, umask: int, caller: Caller
    ) -> tuple[Entry, Opened] | Later[tuple[Entry, Opened]]:
        """open(2) with O_CREAT of a name that doesn't exist."""
        try:
            with self.lock:
                if self.open_directories > self.settings.max_directories:
                    self._trim()
                return self._create(self._directory(parent), name, mode, flags, umask, caller)
        except SlowCopyUp as slow:
            return self._later(slow, self._create_number, parent, name, mode, flags, umask, caller)

    def _create_number(
        self, parent: int, name: bytes, mode: int, flags: int, umask: int, caller: Caller
    ) -> tuple[Entry, Opened]:
        return self._create(self._directory(parent), name, mode, flags, umask, caller)

    def tmpfile(
        self, parent: int, mode: int, flags: int, umask: int, caller: Caller
    ) -> tuple[Entry, Opened] | Later[tuple[Entry, Opened]]:
        """open(2) with O_TMPFILE."""
        with self.lock:
            return self._tmpfile(self._directory(parent), mode, flags, umask, caller)

    # removals and renames

    def unlink(self, parent: int, name: bytes, caller: Caller) -> None | Later[None]:
        """Remove a name of what isn't a directory."""
        try:
            with self.lock:
                self._unlink(self._directory(parent), name)
                return None
        except SlowCopyUp as slow:
            return self._later(slow, self._unlink_number, parent, name)

    def _unlink_number(self, parent: int, name: bytes) -> None:
        self._unlink(self._directory(parent), name)

    def rmdir(self, parent: int, name: bytes, caller: Caller) -> None | Later[None]:
        """Remove a directory that merged shows as empty."""
        with self.lock:
            self._rmdir(self._directory(parent), name)
            return None

    def rename(
        self, parent: int, name: bytes, to_parent: int, to_name: bytes, flags: int, caller: Caller
    ) -> None | Later[None]:
        """renameat2(2)."""
        try:
            with self.lock:
                self._rename_number(parent, name, to_parent, to_name, flags)
                return None
        except SlowCopyUp as slow:
            return self._later(slow, self._rename_number, parent, name, to_parent, to_name, flags)

    def _rename_number(
        self, parent: int, name: bytes, to_parent: int, to_name: bytes, flags: int
    ) -> None:
        self._rename(self._directory(parent), name, self._directory(to_parent), to_name, flags)

    # open files

    open = _Open()

    def open_node(
        self, node: int, flags: int, caller: Caller, kill_suid_sgid: bool = False
    ) -> Opened | Later[Opened]:
        """open(2) of a file that exists."""
        if not self.killpriv and caller.uid != 0:
            kill_suid_sgid = True  # the kernel doesn't say it, and does nothing with O_TRUNC itself
        try:
            with self.lock:
                if self.open_directories > self.settings.max_directories:
                    self._trim()
                return self._open_number(node, flags, kill_suid_sgid)
        except SlowCopyUp as slow:
            return self._later(slow, self._open_number, node, flags, kill_suid_sgid)

    def _open_number(self, node: int, flags: int, kill_suid_sgid: bool) -> Opened:
        return self._open_file(self._node(node), flags, kill_suid_sgid)

    def flush(self, handle: int) -> None:
        """close(2): everything is in the layer's file already."""

    def fsync(self, handle: int, datasync: bool) -> None | Later[None]:
        """fsync(2); nothing with `volatile`, nor for files of lower."""
        file = self._file(handle)
        if self.settings.volatile or file.lower or not self.writable:
            return None
        call = os.fdatasync if datasync else os.fsync
        fd = file.fd
        return Later(lambda: call(fd))

    def fsyncdir(self, node: int, datasync: bool) -> None | Later[None]:
        """fsync(2) of a directory."""
        directory = self._directory(node)
        if self.settings.volatile or directory.layer != UPPER or not self.writable:
            return None
        return Later(lambda: self._sync_directory(directory))

    def _sync_directory(self, node: Directory) -> None:
        with self.lock:
            fd = os.open(
                b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._upper_fd(node)
            )
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def syncfs(self) -> None | Later[None]:
        """syncfs(2) of upper's file system."""
        if self.settings.volatile or not self.writable:
            return None
        return Later(self._sync_all)

    def _sync_all(self) -> None:
        fd = os.open(
            b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.layers[UPPER].fd
        )
        try:
            syscalls.syncfs(fd)
        finally:
            os.close(fd)

    def release(self, handle: int) -> None:
        """The last descriptor of an open file is closed."""
        with self.lock:
            self._release(handle)

    def fallocate(
        self, handle: int, mode: int, offset: int, length: int, caller: Caller
    ) -> None | Later[None]:
        """fallocate(2)."""
        self._writer(handle)
        return Later(lambda: self._fallocate(handle, mode, offset, length, caller))

    def copy_file_range(
        self,
        handle_in: int,
        offset_in: int,
        handle_out: int,
        offset_out: int,
        length: int,
        caller: Caller,
    ) -> int | Later[int]:
        """copy_file_range(2) between two files of this mount."""
        source, target = self._file(handle_in), self._writer(handle_out)

        def copy() -> int:
            credentials.settle()
            self._before_write(target, caller)
            return os.copy_file_range(source.fd, target.fd, length, offset_in, offset_out)

        return Later(copy) if length > LARGE else copy()

    # directories

    def readdir(self, node: int, offset: int) -> Iterator[DirectoryEntry]:
        """The entries of a directory behind an offset."""
        return self._plain_entries(*self._list_from(node, offset))

    def readdirplus(
        self, node: int, offset: int, caller: Caller | None = None
    ) -> Iterator[tuple[DirectoryEntry, Entry]]:
        """The entries behind an offset, with their look-ups where the caller wants them."""
        return self._entries_plus(*self._list_from(node, offset), caller)

    def _list_from(self, node: int, offset: int) -> tuple[Directory, Snapshot, range]:
        with self.lock:
            if self.open_directories > self.settings.max_directories:
                self._trim()
            directory = self._directory(node)
            entries = self._entries(directory, offset)
            return directory, entries, self._rest(directory, entries, offset)

    # extended attributes

    def setxattr(
        self,
        node: int,
        name: bytes,
        value: bytes,
        flags: int,
        caller: Caller,
        kill_sgid: bool = False,
    ) -> None | Later[None]:
        """setxattr(2)."""
        if name == CAPABILITY and self.writeback and self._is_written(node):
            return Later(lambda: self._set_capability(node, value, flags))
        try:
            with self.lock:
                self._setxattr(self._node(node), name, value, flags, kill_sgid)
                return None
        except SlowCopyUp as slow:
            return self._later(slow, self._setxattr, slow.node, name, value, flags, kill_sgid)

    def _is_written(self, node: int) -> bool:
        found = self.table.nodes.get(node)
        extra = found.extra if found is not None else None
        return extra is not None and any(file.writable for file in extra.handles)

    def _set_capability(self, node: int, value: bytes, flags: int) -> None:
        """What the kernel has yet to write back comes first: each write takes capabilities away."""
        write_back = getattr(self.kernel, "write_back", None)
        if write_back is not None:
            write_back(node)
        with self.lock:
            self._setxattr(self._node(node), CAPABILITY, value, flags, False)

    def getxattr(self, node: int, name: bytes, caller: Caller) -> bytes:
        """getxattr(2)."""
        with self.lock:
            return self._getxattr(self._node(node), name)

    def listxattr(self, node: int, caller: Caller) -> list[bytes]:
        """listxattr(2)."""
        with self.lock:
            return self._listxattr(self._node(node), caller)

    def removexattr(self, node: int, name: bytes, caller: Caller) -> None | Later[None]:
        """removexattr(2)."""
        try:
            with self.lock:
                self._removexattr(self._node(node), name)
                return None
        except SlowCopyUp as slow:
            return self._later(slow, self._removexattr, slow.node, name)

    # the whole

    def statfs(self) -> StatFs:
        """statvfs of upper, or of the topmost lower."""
        layer = self.layers[UPPER] if UPPER in self.layers else self.layers[1]
        st = os.fstatvfs(layer.fd)
        return StatFs(
            st.f_bsize, st.f_frsize, st.f_blocks, st.f_bfree, st.f_bavail,
            st.f_files, st.f_ffree, st.f_favail, st.f_namemax,
        )  # fmt: skip

    def counts(self) -> dict[str, int]:
        """What is held: nodes, open files and directories, directory descriptors."""
        with self.lock:
            held = super().counts()
            held["files"] = len(self._files)
            return held

    def close(self) -> None:
        """Give back every descriptor; upper's work directory is left empty."""
        with self.lock:
            for handle in list(self._files):
                self._release(handle)
            self._lists.clear()
            for directory, position, fd in self._directories:
                if self._holds(directory, position) == fd:
                    self._release_fd(directory, position)
                    os.close(fd)
            self._directories.clear()
            for node in self.table.nodes.values():
                extra = node.extra
                if extra is not None and extra.fd >= 0:
                    os.close(extra.fd)
                    extra.fd = -1
            self._close_dropped()
            self.table.nodes.clear()
            if self.upper is not None:
                self.upper.close()
            for layer in self.layers.values():
                layer.close()
            credentials.restore()


__all__ = ["Filesystem", "Node", "stale"]
