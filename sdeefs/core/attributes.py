"""What stat tells, and changing it: ids, modes, times and sizes of what is in upper by then."""

from __future__ import annotations

import ctypes
import errno
import os
import stat

from sdeefs.core.api import NOW, Attributes, Caller, Entry, SetAttributes
from sdeefs.core.formats import fd_path, get_xattr, parse_nlink
from sdeefs.core.ids import OVERRIDE_STAT, format_override, parse_override
from sdeefs.core.layers import INDEX_NLINK
from sdeefs.core.lookup import Found, Lookup
from sdeefs.core.nodes import DEAD, UPPER, Directory, Node

_new = tuple.__new__
_libc = ctypes.PyDLL(None, use_errno=True)
_UTIME_NOW = (1 << 30) - 1
_UTIME_OMIT = (1 << 30) - 2
_AT_SYMLINK_NOFOLLOW = 0x100
NEGATIVE_NODE = 0


class _Times(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("as_", "an", "ms", "mn")]


def set_times(fd: int, name: bytes, atime_ns: int | None, mtime_ns: int | None) -> None:
    """utimensat(2), where None leaves a time alone and NOW is the clock."""
    times = _Times()
    times.as_, times.an = _timespec(atime_ns)
    times.ms, times.mn = _timespec(mtime_ns)
    if name:
        failed = _libc.utimensat(fd, name, ctypes.byref(times), _AT_SYMLINK_NOFOLLOW)
    else:
        failed = _libc.utimensat(-100, fd_path(fd), ctypes.byref(times), 0)
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def is_privileged(mode: int) -> bool:
    """Whether a write takes setuid, or setgid of a program, away."""
    return bool(mode & stat.S_ISUID) or mode & 0o2010 == 0o2010


def _timespec(value: int | None) -> tuple[int, int]:
    if value is None:
        return 0, _UTIME_OMIT
    if value == NOW:
        return 0, _UTIME_NOW
    return divmod(value, 1_000_000_000)


class AttributesRoom(Lookup):
    """The room of attributes."""

    def _attributes(self, node: Node, st: os.stat_result) -> Attributes:
        uid, gid, mode, nlink, rdev = st.st_uid, st.st_gid, st.st_mode, st.st_nlink, st.st_rdev
        if self.override:
            changed = self._overridden(node, mode)
            if changed is not None:
                uid, gid, mode, device = changed
                rdev = device or rdev
        owners = self.owners_of(node.layer)
        if not owners.identity:
            uid, gid = owners.shown(uid, gid)
        extra = node.extra
        if node.kind == stat.S_IFDIR:
            assert isinstance(node, Directory)
            if node.flags & DEAD:
                nlink = 0
            elif node.lowers and (node.layer == UPPER or len(node.lowers) > 1):
                nlink = 1
        elif extra is not None and extra.work_name is not None:
            nlink -= 1
        elif extra is not None and extra.index is not None:
            nlink = self._indexed_nlink(node, nlink)
        return _new(
            Attributes,
            (
                node.shown, mode, nlink, uid, gid, rdev, st.st_size, st.st_blocks, st.st_blksize,
                st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns,
            ),
        )  # fmt: skip

    def _overridden(self, node: Node, mode: int) -> tuple[int, int, int, int] | None:
        if node.kind == stat.S_IFLNK:
            return None
        try:
            path, follow = self._xattr_place(node)
        except OSError as error:
            if error.errno != errno.EXDEV or node.layer == UPPER:
                raise
            return None  # something is mounted on it in lower: what lies below can't be asked
        value = get_xattr(path, OVERRIDE_STAT, follow)
        return None if value is None else parse_override(value, mode)

    def _indexed_nlink(self, node: Node, nlink: int) -> int:
        """The links in merged of an inode of the index: overlay.nlink is relative to one side."""
        extra = node.extra
        assert extra is not None and extra.index is not None
        value = self._read_nlink(node)
        links = parse_nlink(value, nlink, extra.lower_nlink) if value is not None else None
        return links if links is not None else max(nlink - 1, 1)

    def _read_nlink(self, node: Node) -> bytes | None:
        """overlay.nlink of an inode of the index."""
        upper, extra = self.upper, node.extra
        assert upper is not None and extra is not None and extra.index is not None
        if not upper.xattrs:
            try:
                return os.readlink(extra.index + INDEX_NLINK, dir_fd=upper.index)
            except OSError:
                return None
        path, follow = self._xattr_place(node)
        return get_xattr(path, self.names.nlink, follow)

    # answers

    def _entry(self, node: Node, st: os.stat_result) -> Entry:
        """The answer to a look-up; the kernel holds the node once more."""
        node.count += 1
        upper = self.upper_timeout
        if node.layer == UPPER:
            return _new(Entry, (node.number, self._attributes(node, st), upper, upper))
        lower = self.lower_timeout
        return _new(Entry, (node.number, self._attributes(node, st), lower, lower))

    def _negative(self, parent: Directory, whiteout: bool) -> Entry:
        """A cacheable "no such name"."""
        timeout = self.upper_timeout
        if not whiteout and parent.lowers:
            timeout = self.lower_timeout
        return _new(Entry, (NEGATIVE_NODE, None, timeout, 0.0))

    def _lookup(self, parent: Directory, name: bytes) -> Entry:
        if name in (b".", b".."):
            return self._lookup_dot(parent, name)
        found = self._find(parent, name)
        if isinstance(found, bool):
            child = parent.children.get(name)
            if child is not None:
                self.table.remove_name(child, parent, name)
                self._strand(child)
            return self._negative(parent, found)
        return self._entry(self._bind(parent, name, found), found.st)

    def _lookup_dot(self, directory: Directory, name: bytes) -> Entry:
        node: Node = directory
        if name == b".." and directory.parent is not None:
            node = directory.parent
        return self._entry(node, self._stat(node))

    def _find_node(self, parent: Directory, name: bytes) -> tuple[Node, Found]:
        """The object of a name that a request is about; ENOENT where there is none."""
        found = self._find(parent, name)
        if isinstance(found, bool):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return self._bind(parent, name, found), found

    def _answer(self, node: Node) -> tuple[Attributes, float]:
        timeout = self.upper_timeout if node.layer == UPPER else self.lower_timeout
        return self._attributes(node, self._stat(node)), timeout

    # changes of what is in upper

    def _change(self, node: Node, change: SetAttributes, fd: int) -> None:
        """Apply a SETATTR to an object of upper; `fd` is an open descriptor of it, or -1."""
        if change.size is not None:
            self._truncate(node, change.size, fd)
        if change.uid is not None or change.gid is not None:
            self._chown(node, change.uid, change.gid)
        if change.mode is not None:
            self._chmod(node, change.mode, fd)
        if change.kill_suid_sgid:
            self._strip_privileges(node, fd)
        if change.atime_ns is not None or change.mtime_ns is not None:
            if fd >= 0:
                set_times(fd, b"", change.atime_ns, change.mtime_ns)
            else:
                where, name = self._place(node)
                set_times(where, name, change.atime_ns, change.mtime_ns)

    def _truncate(self, node: Node, size: int, fd: int) -> None:
        if fd >= 0:
            try:
                os.ftruncate(fd, size)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:  # a descriptor for reading
                    raise
        fd = self._reopen(node, os.O_WRONLY)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)

    def _reopen(self, node: Node, flags: int) -> int:
        """A new descriptor of an object's data; the caller closes it."""
        where, name = self._place(node)
        flags |= os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        if name:
            fd = os.open(name, flags | os.O_NOFOLLOW, dir_fd=where)
        else:
            fd = os.open(fd_path(where), flags)
        return fd

    def _chown(self, node: Node, uid: int | None, gid: int | None) -> None:
        owners = self.upper_owners
        stored_uid = -1 if uid is None else owners.stored_uid(uid)
        stored_gid = -1 if gid is None else owners.stored_gid(gid)
        if self.override and self._override(node, uid=stored_uid, gid=stored_gid):
            return
        where, name = self._place(node)
        if name:
            os.chown(name, stored_uid, stored_gid, dir_fd=where, follow_symlinks=False)
        else:
            os.chown(fd_path(where), stored_uid, stored_gid)

    def _chmod(self, node: Node, mode: int, fd: int) -> None:
        mode = stat.S_IMODE(mode)
        if self.override and self._override(node, mode=mode):
            return
        if fd >= 0:
            os.fchmod(fd, mode)
            return
        where, name = self._place(node)
        if not name:
            os.chmod(fd_path(where), mode)
            return
        if node.kind == stat.S_IFLNK:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        held = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=where)
        try:
            os.chmod(fd_path(held), mode)
        finally:
            os.close(held)

    def _override(self, node: Node, uid: int = -1, gid: int = -1, mode: int = -1) -> bool:
        """Keep what can't be set on disk in the xattr; False for links, which have none."""
        if node.kind == stat.S_IFLNK:
            return True
        st = self._stat(node)
        path, follow = self._xattr_place(node)
        value = get_xattr(path, OVERRIDE_STAT, follow)
        old = parse_override(value, st.st_mode) if value is not None else None
        now = old if old is not None else (st.st_uid, st.st_gid, st.st_mode, 0)
        new_uid = now[0] if uid < 0 else uid
        new_gid = now[1] if gid < 0 else gid
        new_mode = now[2] if mode < 0 else stat.S_IFMT(now[2]) | mode
        if mode < 0 and node.kind != stat.S_IFDIR:  # chown clears the privilege bits
            new_mode &= ~stat.S_ISUID
            if new_mode & stat.S_IXGRP:
                new_mode &= ~stat.S_ISGID
        text = format_override(new_uid, new_gid, new_mode, now[3], st.st_mode)
        os.setxattr(path, OVERRIDE_STAT, text, follow_symlinks=follow)
        return True

    def _strip_privileges(self, node: Node, fd: int) -> None:
        """What a write takes away: setuid, setgid of programs, file capabilities."""
        if node.kind != stat.S_IFREG:
            return
        st = os.fstat(fd) if fd >= 0 else self._stat(node)
        mode = st.st_mode
        if is_privileged(mode):
            mode &= ~stat.S_ISUID
            if mode & stat.S_IXGRP:
                mode &= ~stat.S_ISGID
            self._chmod(node, mode, fd)
        self._strip_capability(node, fd)

    def _strip_capability(self, node: Node, fd: int) -> None:
        path, follow = (fd_path(fd), True) if fd >= 0 else self._xattr_place(node)
        try:
            os.removexattr(path, b"security.capability", follow_symlinks=follow)
        except OSError:
            pass

    def _stored(self, caller: Caller) -> tuple[int, int]:
        """The caller's ids as upper stores them."""
        owners = self.upper_owners
        if owners.identity:
            return caller.uid, caller.gid
        return owners.stored_uid(caller.uid), owners.stored_gid(caller.gid)
