"""Copy-up: an object of lower becomes one of upper, before its first change.

Prepared in the work directory with everything it has, then moved into place with one rename; its
parents come first. Data that takes long is copied outside the lock, by a worker thread.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from sdeefs.core import credentials
from sdeefs.core.api import Later
from sdeefs.core.attributes import AttributesRoom, set_times
from sdeefs.core.formats import PREFIX_OPAQUE, fd_path, get_xattr, index_name, xattr_path
from sdeefs.core.ids import ACL_NAMES, OVERRIDE_STAT, Owners, format_override
from sdeefs.core.layers import FICLONE, INDEX_NLINK, Upper, discard
from sdeefs.core.nodes import (
    DEAD,
    HIDDEN,
    IMPURE,
    OPAQUE,
    UPPER,
    Directory,
    Node,
)
from sdeefs.core.union import read_only, stale

T = TypeVar("T")

#: Above this the data of a file is copied by a worker even where nothing has to reach the disk.
LARGE = 1 << 20
_CHUNK = 1 << 20
_ALL = 1 << 63


class SlowCopyUp(Exception):
    """The request goes on after the data of this file was copied up by a worker thread."""

    def __init__(self, node: Node, size: int) -> None:
        super().__init__("a copy-up takes long")
        self.node = node
        self.size = size


class Prepared(NamedTuple):
    """A copy in the work directory, not yet in its place."""

    name: bytes
    fd: int
    source: os.stat_result
    origin: bytes | None
    in_index: bytes | None


class CopyUp(AttributesRoom):
    """The room of copy-up."""

    def __init__(self, settings: object) -> None:
        super().__init__(settings)  # type: ignore[arg-type]
        self._copying: dict[int, threading.Lock] = {}

    def _writable(self) -> Upper:
        upper = self.upper
        if upper is None or not self.writable:
            raise read_only()
        return upper

    def _copy_up(self, node: Node, size: int = _ALL) -> None:
        """Bring an object into upper (`size`: how much of its data is wanted). May raise SlowCopyUp."""
        if node.layer == UPPER:
            return
        self._writable()
        if isinstance(node, Directory):
            self._copy_up_directory(node)
            return
        self._copy_up_parent(node)
        self._review(node)
        extra = node.extra
        if extra is not None and extra.secret:
            size = 0
        if node.kind == stat.S_IFREG:
            self._copy_up_file(node, size)
        else:
            self._copy_up_other(node)

    def _copy_up_parent(self, node: Node) -> None:
        parent = node.parent
        if parent is not None and not self._is_orphan(node):
            self._copy_up_directory(parent)

    @staticmethod
    def _is_orphan(node: Node) -> bool:
        extra = node.extra
        return extra is not None and extra.fd >= 0

    def _in_upper(self, directory: Directory) -> int:
        """The descriptor in upper of a directory that is about to change."""
        if directory.layer != UPPER:
            self._copy_up_directory(directory)
        return self._upper_fd(directory)

    # directories

    def _copy_up_directory(self, directory: Directory) -> None:
        if directory.layer == UPPER:
            return
        upper = self._writable()
        parent = directory.parent
        if directory.flags & DEAD or parent is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        self._copy_up_directory(parent)
        credentials.settle()
        source_fd = self._lower_fd(directory, 0)
        source = os.fstat(source_fd)
        layer = self.layers[directory.lowers[0][0]]
        name = upper.temporary()
        os.mkdir(name, 0o700, dir_fd=upper.work)
        try:
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=upper.work)  # fmt: skip
            try:
                self._dress(fd, source, fd_path(source_fd), self.owners_of(directory.layer))
                self._set_origin(fd_path(fd), True, layer.handle(source_fd, b""))
                if directory.flags & HIDDEN:
                    self._set_opaque(upper.work, name, must=True)
                set_times(fd, b"", source.st_atime_ns, source.st_mtime_ns)
                made = os.fstat(fd)
            finally:
                os.close(fd)
            parent_fd = self._upper_fd(parent)
            with self._parent_times(parent, parent_fd):
                self._set_impure(parent, parent_fd)
                os.rename(name, directory.name, src_dir_fd=upper.work, dst_dir_fd=parent_fd)
        except BaseException:
            discard(upper.work, name)
            raise
        directory.layer = UPPER
        directory.ino = made.st_ino
        if directory.flags & HIDDEN:
            directory.flags = (directory.flags & ~HIDDEN) | OPAQUE
            self._close_lower_fds(directory)
            directory.lowers = ()
            directory.shown = self.compose(directory.ino, self.layers[UPPER])
        self._drop_prefix_whiteout(parent_fd, directory.name)

    # files

    def _copy_up_file(self, node: Node, size: int) -> None:
        source_fd = self._reopen_lower(node)
        try:
            source = os.fstat(source_fd)
            if not node.is_of(source):
                raise stale()
            amount = min(size, source.st_size)
            if amount and not self.settings.volatile:
                raise SlowCopyUp(node, size)  # the data has to reach the disk first
            prepared = self._prepare(node, source_fd, source)
            try:
                if amount and (amount < source.st_size or not _clone(source_fd, prepared.fd)):
                    if amount > LARGE:
                        raise SlowCopyUp(node, size)
                    copy_data(source_fd, prepared.fd, amount)
                self._install(node, prepared, source_fd)
            except BaseException:
                self._discard(prepared)
                raise
            os.close(prepared.fd)
        finally:
            os.close(source_fd)

    def copy_up_slowly(self, node: Node, size: int) -> None:
        """The copy-up of a file's data without holding the lock; by a worker thread."""
        with self.lock:
            mine = self._copying.setdefault(node.number, threading.Lock())
        with mine:
            try:
                with self.lock:
                    if node.layer == UPPER:
                        return
                    self._copy_up_parent(node)
                    source_fd = self._reopen_lower(node)
                    try:
                        source = os.fstat(source_fd)
                        if not node.is_of(source):
                            raise stale()
                        prepared = self._prepare(node, source_fd, source)
                    except BaseException:
                        os.close(source_fd)
                        raise
                try:
                    amount = min(size, source.st_size)
                    if amount < source.st_size or not _clone(source_fd, prepared.fd):
                        copy_data(source_fd, prepared.fd, amount)
                    if not self.settings.volatile:
                        os.fsync(prepared.fd)
                    with self.lock:
                        self._install(node, prepared, source_fd)
                except BaseException:
                    with self.lock:
                        self._discard(prepared)
                    raise
                finally:
                    os.close(source_fd)
                os.close(prepared.fd)
            finally:
                with self.lock:
                    self._copying.pop(node.number, None)

    def after_copy_up(self, slow: SlowCopyUp, request: Callable[..., T], *arguments: object) -> T:
        """The rest of a request that met a SlowCopyUp: copy, then ask again from the start."""
        while True:
            self.copy_up_slowly(slow.node, slow.size)
            try:
                with self.lock:
                    return request(*arguments)
            except SlowCopyUp as again:
                slow = again

    def _later(self, slow: SlowCopyUp, request: Callable[..., T], *arguments: object) -> Later[T]:
        return Later(lambda: self.after_copy_up(slow, request, *arguments))

    def _reopen_lower(self, node: Node) -> int:
        where, name = self._place(node)
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            if name:
                return os.open(name, flags | os.O_NOFOLLOW, dir_fd=where)
            return os.open(fd_path(where), flags)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
                raise stale() from error
            raise

    def _prepare(self, node: Node, source_fd: int, source: os.stat_result) -> Prepared:
        """An empty file in the work directory, and what will be said of its origin."""
        upper = self._writable()
        credentials.settle()
        origin = index = None
        if source.st_nlink == 1 or self.index_on:
            origin = self.layers[node.layer].handle(source_fd, b"")
            if origin is None:
                origin = b""
            if source.st_nlink > 1:
                if origin and not self._is_orphan(node):
                    index = index_name(origin)
                else:
                    origin = None
        name = upper.temporary()
        fd = os.open(
            name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=upper.work
        )
        return Prepared(name, fd, source, origin, index)

    def _discard(self, prepared: Prepared) -> None:
        upper = self._writable()
        os.close(prepared.fd)
        discard(upper.work, prepared.name)

    def _install(self, node: Node, prepared: Prepared, source_fd: int) -> None:
        """Give the copy the rest of what its source has, and put it into its place."""
        if node.layer == UPPER:
            raise stale()
        fd, source = prepared.fd, prepared.source
        extra = node.extra
        secret = extra is not None and extra.secret
        self._dress(fd, source, fd_path(source_fd), self.owners_of(node.layer))
        self._set_origin(fd_path(fd), True, prepared.origin)
        if secret:
            self._mark(fd_path(fd), self.names.secret, b"y", must=True)
        if os.fstat(fd).st_size == source.st_size:  # else it is cut off: changed, from the first
            set_times(fd, b"", source.st_atime_ns, source.st_mtime_ns)
        self._put_in_place(node, prepared.name, os.fstat(fd), prepared)
        if extra is not None and extra.handles:
            for handle in extra.handles:
                handle.follow_copy_up(fd)

    def _put_in_place(
        self, node: Node, name: bytes, made: os.stat_result, prepared: Prepared
    ) -> None:
        upper = self._writable()
        if self._is_orphan(node):
            extra = node.more()
            flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
            held = os.open(name, flags, dir_fd=upper.work)
            os.unlink(name, dir_fd=upper.work)
            os.close(extra.fd)
            extra.fd = held
            node.layer, node.ino, node.stamp = UPPER, made.st_ino, 0
            return
        parent = node.parent
        assert parent is not None
        if prepared.in_index is not None:
            self._into_index(node, name, made, prepared)
            self._link_up(node, parent, node.name)
            return
        parent_fd = self._upper_fd(parent)
        with self._parent_times(parent, parent_fd):
            if prepared.origin is not None:
                self._set_impure(parent, parent_fd)
            os.rename(name, node.name, src_dir_fd=upper.work, dst_dir_fd=parent_fd)
        if not prepared.origin or not self._keeps_origin(node):
            node.shown = self.compose(made.st_ino, self.layers[0])  # as after a remount
            if self.kernel is not None:  # what it has cached tells of the old number and links
                self.kernel.invalidate_inode(parent.number)
                self.kernel.invalidate_inode(node.number, True)
        node.layer, node.ino, node.stamp = UPPER, made.st_ino, 0
        self.table.set_key(node, None)
        self._drop_prefix_whiteout(parent_fd, node.name)

    def _copy_up_other(self, node: Node) -> None:
        """Links, devices, pipes and sockets."""
        upper = self._writable()
        credentials.settle()
        where, old = self._place(node)
        source = os.stat(old, dir_fd=where, follow_symlinks=False) if old else os.fstat(where)
        if not node.is_of(source):
            raise stale()
        name = upper.temporary()
        if node.kind == stat.S_IFLNK:
            os.symlink(os.readlink(old, dir_fd=where), name, dir_fd=upper.work)
        else:
            os.mknod(name, node.kind | 0o600, source.st_rdev, dir_fd=upper.work)
        try:
            origin = index = None
            if source.st_nlink == 1 or self.index_on:
                origin = self.layers[node.layer].handle(where, old) or b""
                if source.st_nlink > 1:
                    index = index_name(origin) if origin else None
                    origin = origin or None
            owners = self.owners_of(node.layer)
            uid, gid = self._kept_owner(source, owners)
            os.chown(name, uid, gid, dir_fd=upper.work, follow_symlinks=False)
            target = xattr_path(upper.work, name)
            if node.kind != stat.S_IFLNK:
                os.chmod(target, stat.S_IMODE(source.st_mode))
            there = xattr_path(where, old) if old else fd_path(where)
            self._copy_xattrs(there, not old, target, False, owners)
            self._set_origin(target, False, origin)
            set_times(upper.work, name, source.st_atime_ns, source.st_mtime_ns)
            made = os.stat(name, dir_fd=upper.work, follow_symlinks=False)
            self._put_in_place(node, name, made, Prepared(name, -1, source, origin, index))
        except BaseException:
            discard(upper.work, name)
            raise

    # the index: one inode in upper for all names of one in lower

    def _into_index(
        self, node: Node, name: bytes, made: os.stat_result, prepared: Prepared
    ) -> None:
        upper = self._writable()
        index = prepared.in_index
        assert index is not None
        extra = node.more()
        extra.lower_nlink = prepared.source.st_nlink
        links = b"U%+d" % (prepared.source.st_nlink - 1)
        if upper.xattrs:
            self._mark(xattr_path(upper.work, name), self.names.nlink, links, must=True)
        else:
            self._link_nlink(upper, index, links)
            upper.index_inodes[made.st_ino] = index
        os.rename(name, index, src_dir_fd=upper.work, dst_dir_fd=upper.index)
        upper.index_names.add(index)
        extra.index = index
        node.layer, node.ino, node.stamp = UPPER, made.st_ino, 0
        self.table.set_key(node, (UPPER, made.st_ino))

    def _link_up(self, node: Node, parent: Directory, name: bytes) -> None:
        """A name of an inode in the index gets its hard link in upper, if it hasn't one yet."""
        extra = node.extra
        if extra is None or extra.index is None:
            return
        upper = self._writable()
        parent_fd = self._in_upper(parent)
        try:
            there = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
            if there.st_ino == node.ino:
                return
        except FileNotFoundError:
            pass
        self._save_nlink(node, relative_to_lower=True)
        with self._parent_times(parent, parent_fd):
            self._set_impure(parent, parent_fd)
            os.link(extra.index, name, src_dir_fd=upper.index, dst_dir_fd=parent_fd, follow_symlinks=False)  # fmt: skip

    def _save_nlink(self, node: Node, relative_to_lower: bool = False) -> None:
        """Write the links of merged in a way that survives the change that follows."""
        extra = node.extra
        if extra is None or extra.index is None:
            return
        st = self._stat(node)
        shown = self._indexed_nlink(node, st.st_nlink)
        if relative_to_lower and extra.lower_nlink:
            value = b"L%+d" % (shown - extra.lower_nlink)
        else:
            value = b"U%+d" % (shown - st.st_nlink)
        upper = self._writable()
        if not upper.xattrs:
            self._link_nlink(upper, extra.index, value)
            return
        path, follow = self._xattr_place(node)
        self._mark(path, self.names.nlink, value, must=True, follow=follow)

    @staticmethod
    def _link_nlink(upper: Upper, index: bytes, value: bytes) -> None:
        name = upper.temporary()
        os.symlink(value, name, dir_fd=upper.work)
        os.rename(name, index + INDEX_NLINK, src_dir_fd=upper.work, dst_dir_fd=upper.index)

    # what a copy has of its source

    def _kept_owner(self, source: os.stat_result, owners: Owners) -> tuple[int, int]:
        """The owner of a copy, in upper's ids."""
        uid, gid = source.st_uid, source.st_gid
        if not owners.identity:
            uid, gid = owners.shown(uid, gid)
        if not self.upper_owners.identity:
            uid, gid = self.upper_owners.stored_uid(uid), self.upper_owners.stored_gid(gid)
        return uid, gid

    def _dress(self, fd: int, source: os.stat_result, source_path: bytes, owners: Owners) -> None:
        """Owner, mode and xattrs."""
        uid, gid = self._kept_owner(source, owners)
        mode = stat.S_IMODE(source.st_mode)
        if self.override:
            text = format_override(uid, gid, mode, 0, source.st_mode)
            os.setxattr(fd_path(fd), OVERRIDE_STAT, text)
            os.fchmod(fd, mode & 0o777 | 0o600)
        else:
            os.fchown(fd, uid, gid)
            os.fchmod(fd, mode)
        self._copy_xattrs(source_path, True, fd_path(fd), True, owners)

    def _copy_xattrs(
        self, source: bytes, follow: bool, target: bytes, target_follow: bool, owners: Owners
    ) -> None:
        try:
            present = os.listxattr(source, follow_symlinks=follow)
        except OSError:
            return
        mapped = not (self.upper_owners.identity and owners.identity)
        for word in present:
            name = os.fsencode(word)
            if self.names.is_private(name) or (self.override and name == OVERRIDE_STAT):
                continue
            try:
                value = os.getxattr(source, name, follow_symlinks=follow)
            except OSError as error:
                if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
                    continue
                raise
            if mapped and name in ACL_NAMES:
                value = self.upper_owners.acl_stored(owners.acl_shown(value))
            try:
                os.setxattr(target, name, value, follow_symlinks=target_follow)
            except OSError as error:
                must = name in ACL_NAMES or name.startswith(b"security.")
                if error.errno not in (errno.EOPNOTSUPP, errno.EPERM) or (
                    must and error.errno != errno.EPERM
                ):
                    raise

    def _set_origin(self, path: bytes, follow: bool, origin: bytes | None) -> None:
        if origin is not None:
            self._mark(path, self.names.origin, origin, must=False, follow=follow)

    def _keeps_origin(self, node: Node) -> bool:
        """Whether upper can say of a file where it was copied up from (user.* isn't for all kinds)."""
        if self.upper is None or not self.upper.xattrs:
            return False
        return not self.settings.userxattr or node.kind == stat.S_IFREG

    def _mark(
        self, path: bytes, name: bytes, value: bytes, must: bool, follow: bool = False
    ) -> None:
        """Set an overlay xattr; where upper has none, only `must` makes that an error."""
        if path.startswith(b"/proc/self/fd/") and path.count(b"/") == 4:
            follow = True
        if self.upper is None or not self.upper.xattrs:
            if must:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            return
        try:
            os.setxattr(path, name, value, follow_symlinks=follow)
        except OSError as error:
            if must or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise

    def _set_opaque(self, dir_fd: int, name: bytes, must: bool) -> None:
        """A directory of upper hides what the lowers have of its name."""
        if self.prefixes:
            flags = os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(name + b"/" + PREFIX_OPAQUE, flags, 0o600, dir_fd=dir_fd))
            return
        self._mark(xattr_path(dir_fd, name), self.names.opaque, b"y", must=must)

    def _set_impure(self, parent: Directory, parent_fd: int) -> None:
        """Upper's directory now holds something whose inode number is its origin's."""
        if not parent.flags & IMPURE:
            self._mark(fd_path(parent_fd), self.names.impure, b"y", must=False)
            parent.flags |= IMPURE

    def _parent_times(self, parent: Directory, parent_fd: int) -> _ParentTimes:
        return _ParentTimes(parent_fd)

    def _drop_prefix_whiteout(self, parent_fd: int, name: bytes) -> None:
        if self.prefixes:
            try:
                os.unlink(b".wh." + name, dir_fd=parent_fd)
            except OSError:
                pass

    def _origin_value(self, node: Node) -> bytes | None:
        path, follow = self._xattr_place(node)
        return get_xattr(path, self.names.origin, follow)


class _ParentTimes:
    """Copy-up changes nothing that merged shows: the directory in upper keeps its times."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> None:
        self.st = os.fstat(self.fd)

    def __exit__(self, *_: object) -> None:
        try:
            set_times(self.fd, b"", self.st.st_atime_ns, self.st.st_mtime_ns)
        except OSError:
            pass  # best effort, as overlayfs


def _clone(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError:
        return False
    return True


def copy_data(source: int, target: int, size: int) -> None:
    """Copy the first `size` bytes, holes as holes."""
    position = 0
    while position < size:
        try:
            start = os.lseek(source, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole to the end
                break
            start = position  # no holes here
        if start >= size:
            break
        try:
            end = min(os.lseek(source, start, os.SEEK_HOLE), size)
        except OSError:
            end = size
        _copy_range(source, target, start, end)
        position = end
    os.ftruncate(target, size)


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    in_kernel = True
    while start < end:
        amount = min(end - start, _CHUNK * 16 if in_kernel else _CHUNK)
        if in_kernel:
            try:
                done = os.copy_file_range(source, target, amount, start, start)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
                    raise
                in_kernel = False
                continue
            if done:
                start += done
                continue
            in_kernel = False
            continue
        data = os.pread(source, amount, start)
        if not data:
            return  # it was cut while we read it
        written = 0
        while written < len(data):
            written += os.pwrite(target, data[written:], start + written)
        start += len(data)
