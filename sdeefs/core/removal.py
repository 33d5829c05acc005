"""Removing names: unlink and rmdir, with a whiteout where a lower has the name too."""

from __future__ import annotations

import errno
import os
import stat

from mount_helpers import syscalls
from sdeefs.core import credentials
from sdeefs.core.creation import Creation
from sdeefs.core.formats import PREFIX, fd_path
from sdeefs.core.layers import INDEX_NLINK, Upper, discard, names_in
from sdeefs.core.lookup import Found
from sdeefs.core.nodes import DEAD, OPAQUE, UPPER, XWHITEOUTS, Directory, Node
from sdeefs.core.settings import WhiteoutForm


class Removal(Creation):
    """The room of removals."""

    def _unlink(self, parent: Directory, name: bytes) -> None:
        upper = self._writable()
        node, found = self._find_node(parent, name)
        if isinstance(node, Directory):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        in_upper = self._before_removal(node, found, parent, name)
        hide = not in_upper or self._hides_lower(parent, name)
        parent_fd = self._in_upper(parent)
        credentials.settle()
        self._hold(node)
        try:
            if hide:
                self._whiteout(upper, parent, parent_fd, name, in_upper, directory=False)
            else:
                os.unlink(name, dir_fd=parent_fd)
        except BaseException:
            self._let_go(node)
            raise
        self._after_removal(node, parent, name)

    def _before_removal(self, node: Node, found: Found, parent: Directory, name: bytes) -> bool:
        """Keep count of hard links before a name goes; whether upper has an object of this name."""
        if node.layer != UPPER and self.index_on and found.st.st_nlink > 1:
            self._copy_up(node)  # the links that remain are counted on the inode in upper
        extra = node.extra
        if extra is not None and extra.index is not None:
            self._link_up(node, parent, name)
            self._save_nlink(node)
        return node.layer == UPPER

    def _hold(self, node: Node) -> None:
        """An object whose last known name goes lives on by descriptor while the kernel holds it."""
        extra = node.extra
        if extra is not None and (
            extra.fd >= 0 or extra.names or (extra.index is not None and node.layer == UPPER)
        ):
            return
        where, name = self._place(node)
        try:
            flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, dir_fd=where) if name else os.dup(where)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                return
            raise
        node.more().fd = fd

    def _let_go(self, node: Node) -> None:
        """The name did not go after all."""
        extra, parent = node.extra, node.parent
        if extra is None or extra.fd < 0 or parent is None:
            return
        if parent.children.get(node.name) is node:
            os.close(extra.fd)
            extra.fd = -1

    def _after_removal(self, node: Node, parent: Directory, name: bytes) -> None:
        extra = node.extra
        if extra is not None and extra.index is not None and node.layer == UPPER:
            self._clean_index(node)
        self.table.remove_name(node, parent, name)
        if node.count <= 0:
            self.table.drop(node)
            self._close_dropped()

    def _clean_index(self, node: Node) -> None:
        """The last link of merged is gone: so is the inode's name in the index."""
        extra = node.extra
        assert extra is not None and extra.index is not None and self.upper is not None
        st = self._stat(node)
        try:
            value = self._read_nlink(node) or b""
            links = (st.st_nlink if value[:1] == b"U" else extra.lower_nlink) + int(value[1:])
        except (OSError, ValueError):
            links = st.st_nlink - 1
        if links > 0:
            return
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        held = os.open(extra.index, flags, dir_fd=self.upper.index)
        os.unlink(extra.index, dir_fd=self.upper.index)
        self.upper.index_names.discard(extra.index)
        if not self.upper.xattrs:
            self.upper.index_inodes.pop(node.ino, None)
            discard(self.upper.index, extra.index + INDEX_NLINK)
        extra.index = None
        extra.fd = held

    def _rmdir(self, parent: Directory, name: bytes) -> None:
        upper = self._writable()
        node, _ = self._find_node(parent, name)
        if not isinstance(node, Directory):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        in_upper = node.layer == UPPER
        hide = not in_upper or self._hides_lower(parent, name)
        if in_upper:
            self._upper_fd(node)  # it stays reachable while the kernel holds it
        if not hide and not node.lowers and self._removed_at_once(parent, name):
            self._bury(node, parent, name)
            return
        if not self._is_empty(node):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        parent_fd = self._in_upper(parent)
        credentials.settle()
        if hide:
            self._whiteout(upper, parent, parent_fd, name, in_upper, directory=True)
        else:
            self._remove_directory(upper, parent_fd, name)
        self._bury(node, parent, name)

    def _removed_at_once(self, parent: Directory, name: bytes) -> bool:
        """Remove a directory that upper alone has, unless something is in it (whiteouts, perhaps)."""
        credentials.settle()
        try:
            os.rmdir(name, dir_fd=self._upper_fd(parent))
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
        return True

    def _bury(self, node: Directory, parent: Directory, name: bytes) -> None:
        node.flags |= DEAD
        self.table.remove_name(node, parent, name)
        if node.count <= 0:
            self.table.drop(node)
            self._close_dropped()

    @staticmethod
    def _remove_directory(upper: Upper, parent_fd: int, name: bytes) -> None:
        """A directory of upper that merged shows as empty: there may be whiteouts in it."""
        try:
            os.rmdir(name, dir_fd=parent_fd)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            temporary = upper.temporary()
            os.rename(name, temporary, src_dir_fd=parent_fd, dst_dir_fd=upper.work)
            discard(upper.work, temporary)

    def _whiteout(
        self,
        upper: Upper,
        parent: Directory,
        parent_fd: int,
        name: bytes,
        in_upper: bool,
        directory: bool,
    ) -> None:
        """Hide lower's object of this name, in the place of upper's if it has one."""
        if upper.whiteouts is WhiteoutForm.PREFIX:
            flags = os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(PREFIX + name, flags, 0o600, dir_fd=parent_fd))
            if in_upper and directory:
                self._remove_directory(upper, parent_fd, name)
            elif in_upper:
                os.unlink(name, dir_fd=parent_fd)
            return
        self._allow_xattr_whiteouts(upper, parent, parent_fd)
        if not in_upper:
            self._link_whiteout(upper, parent_fd, name)
            return
        temporary = upper.temporary()
        self._link_whiteout(upper, upper.work, temporary)
        try:
            if directory:
                syscalls.renameat2(upper.work, temporary, parent_fd, name, syscalls.RENAME_EXCHANGE)
            else:
                os.rename(temporary, name, src_dir_fd=upper.work, dst_dir_fd=parent_fd)
        except BaseException:
            discard(upper.work, temporary)
            raise
        if directory:
            discard(upper.work, temporary)

    def _allow_xattr_whiteouts(self, upper: Upper, parent: Directory, parent_fd: int) -> None:
        """Whiteouts in xattrs are looked for only in directories that say so (opaque=x)."""
        if upper.whiteouts is not WhiteoutForm.XATTR or parent.flags & (XWHITEOUTS | OPAQUE):
            return
        self._mark(fd_path(parent_fd), self.names.opaque, b"x", must=True)
        parent.flags |= XWHITEOUTS

    @staticmethod
    def _link_whiteout(upper: Upper, dir_fd: int, name: bytes) -> None:
        """One more link of the work directory's whiteout; a new one where that has too many."""
        for attempt in range(3):
            spare = upper.whiteout_to_link()
            try:
                os.link(
                    spare, name, src_dir_fd=upper.work, dst_dir_fd=dir_fd, follow_symlinks=False
                )
                return
            except OSError as error:
                if error.errno in (errno.EMLINK, errno.ENOENT) and attempt < 2:
                    upper.renew_whiteout()
                    continue
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                    raise
                break
        made = upper.make_whiteout()  # no hard links here
        try:
            os.rename(made, name, src_dir_fd=upper.work, dst_dir_fd=dir_fd)
        except BaseException:
            discard(upper.work, made)
            raise

    def _clear_of_whiteouts(self, upper: Upper, node: Directory) -> None:
        """Before another directory is renamed over one that only merged shows as empty."""
        fd = self._upper_fd(node)
        if not names_in(fd):
            return
        parent = node.parent
        assert parent is not None
        st = os.fstat(fd)
        temporary = upper.temporary()
        os.mkdir(temporary, 0o700, dir_fd=upper.work)
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            fresh = os.open(temporary, flags, dir_fd=upper.work)
            try:
                os.fchown(fresh, st.st_uid, st.st_gid)
                os.fchmod(fresh, stat.S_IMODE(st.st_mode))
                if not self.prefixes:  # that form's mark is a file: the directory must be empty
                    self._set_opaque(upper.work, temporary, must=bool(node.lowers))
            finally:
                os.close(fresh)
            syscalls.renameat2(
                upper.work, temporary, self._upper_fd(parent), node.name, syscalls.RENAME_EXCHANGE
            )
        except BaseException:
            discard(upper.work, temporary)
            raise
        discard(upper.work, temporary)
