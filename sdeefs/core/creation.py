"""New objects of upper: files, directories, links, devices, and names for what exists already.

Where nothing has the name in upper, an object is made in its place at once, with its owner's ids.
Over a whiteout it is prepared in the work directory and exchanged with it.
"""

from __future__ import annotations

import errno
import os
import stat

from mount_helpers import syscalls
from sdeefs.core import credentials
from sdeefs.core.api import Caller, Entry
from sdeefs.core.formats import fd_path, get_xattr, xattr_path
from sdeefs.core.ids import (
    ACL_ACCESS,
    ACL_DEFAULT,
    OVERRIDE_STAT,
    format_override,
    inherited_acl,
)
from sdeefs.core.layers import Upper, discard
from sdeefs.core.listing import Listing
from sdeefs.core.nodes import (
    ACL_DEFAULT as HAS_DEFAULT_ACL,
)
from sdeefs.core.nodes import (
    ACL_KNOWN,
    DEAD,
    HIDDEN,
    OPAQUE,
    UPPER,
    Directory,
    Node,
)

_NAME_MAX = 255


def _is_descriptor(path: bytes) -> bool:
    """Whether a path is `/proc/self/fd/N` itself, which has to be followed."""
    return path.count(b"/") == 4


class Creation(Listing):
    """The room of new objects."""

    # what a new object gets

    def _has_default_acl(self, parent: Directory, parent_fd: int) -> bool:
        flags = parent.flags
        if not flags & ACL_KNOWN:
            flags |= ACL_KNOWN
            if get_xattr(fd_path(parent_fd), ACL_DEFAULT, follow=True) is not None:
                flags |= HAS_DEFAULT_ACL
            parent.flags = flags
        return bool(flags & HAS_DEFAULT_ACL)

    def _ready(self, parent: Directory, name: bytes, caller: Caller) -> tuple[Upper, int, int, int]:
        """(upper, its descriptor of the parent, uid, gid): all that stands before a creation."""
        upper = self._writable()
        if len(name) > _NAME_MAX:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        if parent.flags & DEAD:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if self.prefixes and name.startswith(b".wh."):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        parent_fd = parent.upper_fd
        if parent_fd < 0 or parent.layer != UPPER:
            parent_fd = self._in_upper(parent)
        uid, gid = self._stored(caller)
        return upper, parent_fd, uid, gid

    def _own(self, path: bytes, follow: bool, uid: int, gid: int, setgid: bool) -> None:
        """The owner of a new object that couldn't be made with the right ids."""
        os.chown(path, uid, -1 if setgid else gid, follow_symlinks=follow)

    def _override_new(
        self, path: bytes, uid: int, gid: int, mode: int, rdev: int, real_mode: int
    ) -> None:
        if stat.S_IFMT(real_mode) != stat.S_IFLNK:
            os.setxattr(path, OVERRIDE_STAT, format_override(uid, gid, mode, rdev, real_mode))

    def _settle_ids(self, uid: int, gid: int) -> bool:
        """Create as the caller; False: the owner has to be set afterwards."""
        if self.override:
            credentials.settle()
            return True
        return credentials.become(uid, gid)

    def _made(self, parent: Directory, name: bytes, st: os.stat_result) -> Node:
        """The node of a new object."""
        shown = self.compose(st.st_ino, self.layers[0])
        kind = st.st_mode & 0o170000
        if kind == stat.S_IFDIR:
            return self._made_directory(parent, name, st, shown)
        ino = st.st_ino
        node = Node(
            self.table.number(), parent, name, kind, UPPER, ino, ino if shown == ino else shown
        )
        self.table.add(node)
        return node

    def _made_directory(
        self, parent: Directory, name: bytes, st: os.stat_result, shown: int
    ) -> Directory:
        """A new directory, open: who makes one is about to use it."""
        node = Directory(
            self.table.number(), parent, name, stat.S_IFDIR, UPPER, st.st_ino, shown, ()
        )
        if parent.flags & (ACL_KNOWN | HAS_DEFAULT_ACL) == ACL_KNOWN:
            node.flags = ACL_KNOWN  # who has no default ACL hands none down
        if parent.lowers:
            node.flags |= OPAQUE
        self.table.add(node)
        if self.open_directories <= self.settings.max_directories:
            try:
                self._upper_fd(node)
            except OSError:
                pass  # it is tried again when it has to be open
        return node

    def _whiteout_at(self, parent_fd: int, name: bytes) -> bool:
        """Whether upper has a whiteout of this name (an object of another kind is EEXIST)."""
        try:
            st = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return self._is_whiteout(self.layers[0], parent_fd, name, st)

    def _hides_lower(self, parent: Directory, name: bytes) -> bool:
        """Whether lower has an object of this name that upper's must hide."""
        if not parent.lowers or parent.flags & HIDDEN:
            return False
        return not isinstance(self._find_lower(parent, name), bool)

    def _replace_whiteout(
        self, upper: Upper, name: bytes, parent_fd: int, to_name: bytes, directory: bool
    ) -> None:
        """Move a prepared object to where a whiteout is."""
        if not directory:
            os.rename(name, to_name, src_dir_fd=upper.work, dst_dir_fd=parent_fd)
            return
        syscalls.renameat2(upper.work, name, parent_fd, to_name, syscalls.RENAME_EXCHANGE)
        discard(upper.work, name)

    def _dress_new(
        self,
        path: bytes,
        parent: Directory,
        parent_fd: int,
        mode: int,
        rdev: int,
        uid: int,
        gid: int,
    ) -> None:
        """Owner, mode and ACLs of an object made in the work directory, as if made in its parent."""
        follow = _is_descriptor(path)
        above = os.fstat(parent_fd)
        directory = stat.S_ISDIR(mode)
        if above.st_mode & stat.S_ISGID:
            gid = above.st_gid
            if directory:
                mode |= stat.S_ISGID
        access = default = None
        if self._has_default_acl(parent, parent_fd) and not stat.S_ISLNK(mode):
            default = get_xattr(fd_path(parent_fd), ACL_DEFAULT, follow=True)
            if default is not None:
                mode, access = inherited_acl(default, mode)
        if self.override:
            real = os.stat(path, follow_symlinks=follow).st_mode
            self._override_new(path, uid, gid, mode, rdev, real)
            return
        os.chown(path, uid, gid, follow_symlinks=follow)
        if not stat.S_ISLNK(mode):
            os.chmod(path, stat.S_IMODE(mode))
        if access is not None:
            os.setxattr(path, ACL_ACCESS, access)
        if default is not None and directory:
            os.setxattr(path, ACL_DEFAULT, default)

    # the requests

    def _make(
        self,
        parent: Directory,
        name: bytes,
        mode: int,
        umask: int,
        caller: Caller,
        rdev: int = 0,
        target: bytes = b"",
    ) -> Entry:
        """mknod, mkdir and symlink."""
        upper, parent_fd, uid, gid = self._ready(parent, name, caller)
        if not self._has_default_acl(parent, parent_fd):
            mode &= ~umask
        as_caller = self._settle_ids(uid, gid)
        try:
            self._put(parent_fd, name, mode, rdev, target)
        except FileExistsError:
            if not self._whiteout_at(parent_fd, name):
                raise
            return self._make_over(upper, parent, parent_fd, name, mode, rdev, target, uid, gid)
        kind = stat.S_IFMT(mode)
        path = xattr_path(parent_fd, name)
        try:
            if self.override:
                real = os.stat(name, dir_fd=parent_fd, follow_symlinks=False).st_mode
                self._override_new(path, uid, gid, mode, rdev, real)
            elif not as_caller:
                above = os.fstat(parent_fd).st_mode
                self._own(path, False, uid, gid, bool(above & stat.S_ISGID))
            if kind == stat.S_IFDIR and parent.lowers:
                # As overlayfs: what may appear in lower later doesn't shine through.
                self._mark(path, self.names.opaque, b"y", must=False)
        except OSError:
            discard(parent_fd, name)
            raise
        if self.prefixes:
            self._forget_prefix(parent_fd, name, kind == stat.S_IFDIR)
        st = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
        return self._entry(self._made(parent, name, st), st)

    def _forget_prefix(self, parent_fd: int, name: bytes, directory: bool) -> None:
        """The new object takes the place of its `.wh.` file."""
        if not self._has_prefix_whiteout(parent_fd, name):
            return
        if directory:
            self._set_opaque(parent_fd, name, must=True)
        self._drop_prefix_whiteout(parent_fd, name)

    def _put(self, dir_fd: int, name: bytes, mode: int, rdev: int, target: bytes) -> None:
        kind = stat.S_IFMT(mode)
        if kind == stat.S_IFDIR:
            os.mkdir(name, mode & 0o7777, dir_fd=dir_fd)
        elif kind == stat.S_IFLNK:
            os.symlink(target, name, dir_fd=dir_fd)
        elif self.override and kind in (stat.S_IFCHR, stat.S_IFBLK):
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
            os.close(os.open(name, flags, 0o600, dir_fd=dir_fd))
        else:
            if kind == stat.S_IFCHR and rdev == 0:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))  # a whiteout
            os.mknod(name, mode, rdev, dir_fd=dir_fd)

    def _make_over(
        self,
        upper: Upper,
        parent: Directory,
        parent_fd: int,
        name: bytes,
        mode: int,
        rdev: int,
        target: bytes,
        uid: int,
        gid: int,
    ) -> Entry:
        """Where upper has a whiteout."""
        temporary = upper.temporary()
        directory = stat.S_IFMT(mode) == stat.S_IFDIR
        self._put(upper.work, temporary, mode, rdev, target)
        try:
            path = xattr_path(upper.work, temporary)
            self._dress_new(path, parent, parent_fd, mode, rdev, uid, gid)
            if directory:
                self._set_opaque(upper.work, temporary, must=bool(parent.lowers))
            self._replace_whiteout(upper, temporary, parent_fd, name, directory)
        except BaseException:
            discard(upper.work, temporary)
            raise
        st = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
        node = self._made(parent, name, st)
        if isinstance(node, Directory):
            node.flags |= OPAQUE
        return self._entry(node, st)

    def _create_file(
        self, parent: Directory, name: bytes, mode: int, flags: int, umask: int, caller: Caller
    ) -> tuple[Node, int, os.stat_result]:
        """An open descriptor of a new regular file. The file didn't exist (EEXIST otherwise)."""
        upper, parent_fd, uid, gid = self._ready(parent, name, caller)
        if not self._has_default_acl(parent, parent_fd):
            mode &= ~umask
        as_caller = self._settle_ids(uid, gid)
        flags |= os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        mode &= 0o7777
        try:
            # Without read permission for its owner the server itself may need to reopen it.
            fd = os.open(name, flags, mode, dir_fd=parent_fd)
        except FileExistsError:
            if not self._whiteout_at(parent_fd, name):
                raise
            fd = self._create_over(upper, parent, parent_fd, name, mode, flags, uid, gid)
        else:
            try:
                if self.override:
                    self._override_new(fd_path(fd), uid, gid, mode | stat.S_IFREG, 0, stat.S_IFREG)
                elif not as_caller:
                    above = os.fstat(parent_fd).st_mode
                    os.fchown(fd, uid, -1 if above & stat.S_ISGID else gid)
                    if mode & 0o6000:
                        os.fchmod(fd, mode)
            except OSError:
                os.close(fd)
                discard(parent_fd, name)
                raise
        if self.prefixes:
            self._drop_prefix_whiteout(parent_fd, name)
        st = os.fstat(fd)
        return self._made(parent, name, st), fd, st

    def _create_over(
        self,
        upper: Upper,
        parent: Directory,
        parent_fd: int,
        name: bytes,
        mode: int,
        flags: int,
        uid: int,
        gid: int,
    ) -> int:
        temporary = upper.temporary()
        fd = os.open(temporary, flags, 0o600, dir_fd=upper.work)
        try:
            self._dress_new(fd_path(fd), parent, parent_fd, mode | stat.S_IFREG, 0, uid, gid)
            self._replace_whiteout(upper, temporary, parent_fd, name, False)
        except BaseException:
            os.close(fd)
            discard(upper.work, temporary)
            raise
        return fd

    def _create_nameless(
        self, parent: Directory, mode: int, flags: int, umask: int, caller: Caller
    ) -> tuple[Node, int, os.stat_result]:
        """O_TMPFILE: a file that link(2) may give a name."""
        upper, parent_fd, uid, gid = self._ready(parent, b"", caller)
        if not self._has_default_acl(parent, parent_fd):
            mode &= ~umask
        as_caller = self._settle_ids(uid, gid)
        access = flags & ~(os.O_CREAT | os.O_ACCMODE)
        if flags & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        access |= os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
        work_name = None
        try:
            fd = os.open(b".", access, mode & 0o7777, dir_fd=parent_fd)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
            work_name, fd = self._stand_in(upper, access, parent, parent_fd, mode, uid, gid)
        try:
            if self.override:
                self._override_new(fd_path(fd), uid, gid, mode | stat.S_IFREG, 0, stat.S_IFREG)
            elif not as_caller:
                above = os.fstat(parent_fd).st_mode
                os.fchown(fd, uid, -1 if above & stat.S_ISGID else gid)
            st = os.fstat(fd)
            shown = self.compose(st.st_ino, self.layers[0])
            node = Node(self.table.number(), None, b"", stat.S_IFREG, UPPER, st.st_ino, shown)
            node.more().fd = os.open(fd_path(fd), os.O_PATH | os.O_CLOEXEC)
            node.more().work_name = work_name
        except OSError:
            os.close(fd)
            if work_name is not None:
                discard(upper.work, work_name)
            raise
        self.table.nodes[node.number] = node
        return node, fd, st

    def _stand_in(
        self,
        upper: Upper,
        access: int,
        parent: Directory,
        parent_fd: int,
        mode: int,
        uid: int,
        gid: int,
    ) -> tuple[bytes, int]:
        """Where there is no O_TMPFILE: a file of the work directory, removed when nobody has it."""
        name = upper.temporary()
        flags = access & ~os.O_TMPFILE | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        fd = os.open(name, flags, 0o600, dir_fd=upper.work)
        try:
            self._dress_new(
                fd_path(fd), parent, parent_fd, stat.S_IFREG | stat.S_IMODE(mode), 0, uid, gid
            )
        except OSError:
            os.close(fd)
            discard(upper.work, name)
            raise
        return name, fd

    def _link(self, node: Node, parent: Directory, name: bytes) -> Entry:
        """One more name of an object."""
        upper = self._writable()
        if isinstance(node, Directory):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        if len(name) > _NAME_MAX:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        if self.prefixes and name.startswith(b".wh."):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._copy_up(node)
        parent_fd = self._in_upper(parent)
        credentials.settle()
        self._save_nlink(node)
        if self._has_origin(node):
            self._set_impure(parent, parent_fd)
        where, old = self._place(node)
        try:
            self._link_at(where, old, parent_fd, name)
        except FileExistsError:
            if not self._whiteout_at(parent_fd, name):
                raise
            temporary = upper.temporary()
            self._link_at(where, old, upper.work, temporary)
            try:
                self._replace_whiteout(upper, temporary, parent_fd, name, False)
            except BaseException:
                discard(upper.work, temporary)
                raise
        if self.prefixes:
            self._drop_prefix_whiteout(parent_fd, name)
        st = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
        self.table.add_name(node, parent, name)
        extra = node.more()
        if node.parent is None or extra.fd >= 0:
            self._settle_at(node, parent, name)
        if extra.work_name is not None:
            discard(upper.work, extra.work_name)
            extra.work_name = None
            st = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
        if extra.key is None:
            self.table.set_key(node, (UPPER, node.ino))
        return self._entry(node, st)

    @staticmethod
    def _link_at(where: int, old: bytes, parent_fd: int, name: bytes) -> None:
        if old:
            os.link(old, name, src_dir_fd=where, dst_dir_fd=parent_fd, follow_symlinks=False)
        else:
            os.link(fd_path(where), name, dst_dir_fd=parent_fd, follow_symlinks=True)

    def _has_origin(self, node: Node) -> bool:
        """Whether an object of upper shows the inode number of what it was copied up from."""
        if node.shown != self.compose(node.ino, self.layers[0]):
            return True
        extra = node.extra
        return extra is not None and extra.index is not None
