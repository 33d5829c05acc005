"""rename(2): in upper by one rename, with a whiteout left behind and a redirect where overlayfs needs them."""

from __future__ import annotations

import errno
import os

from mount_helpers import syscalls
from mount_helpers.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE
from sdeefs.core import credentials
from sdeefs.core.formats import PREFIX, fd_path
from sdeefs.core.layers import Upper, discard
from sdeefs.core.nodes import DEAD, HIDDEN, OPAQUE, UPPER, Directory, Node
from sdeefs.core.removal import Removal
from sdeefs.core.settings import RedirectDir, WhiteoutForm

_REDIRECT_MAX = 256


def _failed(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Renames(Removal):
    """The room of renames."""

    def _rename(
        self, parent: Directory, name: bytes, to_parent: Directory, to_name: bytes, flags: int
    ) -> None:
        upper = self._writable()
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE) or flags == (
            RENAME_NOREPLACE | RENAME_EXCHANGE
        ):
            raise _failed(errno.EINVAL)
        if len(to_name) > 255:
            raise _failed(errno.ENAMETOOLONG)
        if self.prefixes and to_name.startswith(PREFIX):
            raise _failed(errno.EINVAL)
        if to_parent.flags & DEAD:
            raise _failed(errno.ENOENT)
        exchange = bool(flags & RENAME_EXCHANGE)
        old, _ = self._find_node(parent, name)
        found = self._find(to_parent, to_name)
        new: Node | None = None
        if not isinstance(found, bool):
            new = self._bind(to_parent, to_name, found)
            if flags & RENAME_NOREPLACE:
                raise _failed(errno.EEXIST)
        elif exchange:
            raise _failed(errno.ENOENT)
        if new is old:
            return
        self._check_movable(old)
        if exchange:
            assert new is not None
            self._check_movable(new)
        self._check_kinds(old, new, exchange, to_parent)

        # Everything that changes has to be in upper.
        self._copy_up_named(old, parent, name)
        new_fd = self._in_upper(to_parent)
        old_fd = self._in_upper(parent)
        if exchange and new is not None:
            self._copy_up_named(new, to_parent, to_name)
        elif new is not None and not isinstance(new, Directory):
            assert not isinstance(found, bool)
            self._before_removal(new, found, to_parent, to_name)
            self._hold(new)
        credentials.settle()

        same = parent is to_parent
        try:
            self._mark_moved(old, parent, name, to_parent, same)
            if exchange and new is not None:
                self._mark_moved(new, to_parent, to_name, parent, same)
                syscalls.renameat2(old_fd, name, new_fd, to_name, RENAME_EXCHANGE)
                self._exchange_names(old, parent, name, new, to_parent, to_name)
                return
            if isinstance(new, Directory) and new.layer == UPPER:
                self._upper_fd(new)  # it stays reachable while the kernel holds it
                if new.lowers or self._is_empty(new):
                    self._clear_of_whiteouts(upper, new)
            self._move(upper, old, parent, old_fd, name, new_fd, to_name)
        except BaseException:
            if new is not None:
                self._let_go(new)
            raise
        if new is not None:
            if isinstance(new, Directory):
                self._bury(new, to_parent, to_name)
            else:
                self._after_removal(new, to_parent, to_name)
        self._move_name(old, parent, name, to_parent, to_name)

    def _check_kinds(
        self, old: Node, new: Node | None, exchange: bool, to_parent: Directory
    ) -> None:
        if isinstance(old, Directory):
            above: Directory | None = to_parent
            while above is not None:
                if above is old:
                    raise _failed(errno.EINVAL)
                above = above.parent
        if new is None or exchange:
            return
        if isinstance(new, Directory):
            if not isinstance(old, Directory):
                raise _failed(errno.EISDIR)
            # Of a directory that is in upper alone, its file system says (xfs: EEXIST).
            if (new.lowers or new.layer != UPPER) and not self._is_empty(new):
                raise _failed(errno.ENOTEMPTY)
        elif isinstance(old, Directory):
            raise _failed(errno.ENOTDIR)

    def _check_movable(self, node: Node) -> None:
        """A directory that lower has a part in moves only by a redirect."""
        if not isinstance(node, Directory) or not node.lowers or node.flags & HIDDEN:
            return
        if self.settings.redirect_dir is not RedirectDir.ON:
            raise _failed(errno.EXDEV)

    def _copy_up_named(self, node: Node, parent: Directory, name: bytes) -> None:
        """Into upper, under this name (an inode of the index may lack it)."""
        self._copy_up(node)
        self._link_up(node, parent, name)
        if isinstance(node, Directory) and node.lowers and not self._writable().xattrs:
            self._copy_up_tree(node)

    def _copy_up_tree(self, directory: Directory) -> None:
        """Where upper can't keep a redirect, all of a directory is copied up before it moves."""
        self._copy_up_directory(directory)
        for name, _, _ in self._contents(directory)[2:]:
            node, _ = self._find_node(directory, name)
            if isinstance(node, Directory):
                self._copy_up_tree(node)
            else:
                self._copy_up_named(node, directory, name)
        parent = directory.parent
        if directory.lowers and parent is not None:
            fd = self._upper_fd(parent)
            with self._parent_times(directory, self._upper_fd(directory)):
                self._set_opaque(fd, directory.name, must=False)
            self._close_lower_fds(directory)
            directory.lowers = ()
            directory.flags |= OPAQUE
            directory.shown = self.compose(directory.ino, self.layers[UPPER])

    # marks that must be on disk before the move

    def _mark_moved(
        self,
        node: Node,
        parent: Directory,
        name: bytes,
        to_parent: Directory,
        same: bool,
    ) -> None:
        if not isinstance(node, Directory):
            if self._has_origin(node):
                self._set_impure(to_parent, self._upper_fd(to_parent))
            return
        if node.lowers:
            self._set_redirect(node, name, same)
            self._set_impure(to_parent, self._upper_fd(to_parent))
        elif not node.flags & OPAQUE and to_parent.lowers and not to_parent.flags & HIDDEN:
            self._set_opaque(self._upper_fd(parent), name, must=True)
            node.flags |= OPAQUE

    def _set_redirect(self, node: Directory, name: bytes, same: bool) -> None:
        """Where the lowers have the directory: its name, or its path in their merged view."""
        if node.redirect is not None and (same or node.redirect.startswith(b"/")):
            return
        value = name if same else self._lower_path(node)
        if len(value) > _REDIRECT_MAX:
            raise _failed(errno.EXDEV)
        try:
            self._mark(fd_path(self._upper_fd(node)), self.names.redirect, value, must=True)
        except OSError as error:
            raise _failed(errno.EXDEV) from error  # mv(1) copies then, as overlayfs has it
        node.redirect = value

    @staticmethod
    def _lower_path(node: Directory) -> bytes:
        parts: list[bytes] = []
        at: Directory | None = node
        while at is not None and at.parent is not None:
            word = at.redirect if at.redirect is not None else at.name
            if word.startswith(b"/"):
                return word + b"".join(b"/" + part for part in reversed(parts))
            parts.append(word)
            at = at.parent
        return b"".join(b"/" + part for part in reversed(parts))

    # the move itself

    def _move(
        self,
        upper: Upper,
        old: Node,
        parent: Directory,
        old_fd: int,
        name: bytes,
        new_fd: int,
        to_name: bytes,
    ) -> None:
        leaves_lower = self._hides_lower(parent, name)
        over_whiteout = self._whiteout_at(new_fd, to_name)
        if upper.whiteouts is WhiteoutForm.PREFIX:
            if leaves_lower:
                flags = os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
                os.close(os.open(PREFIX + name, flags, 0o600, dir_fd=old_fd))
            os.rename(name, to_name, src_dir_fd=old_fd, dst_dir_fd=new_fd)
            self._drop_prefix_whiteout(new_fd, to_name)
            return
        if leaves_lower:
            self._allow_xattr_whiteouts(upper, parent, old_fd)
            if over_whiteout:
                syscalls.renameat2(old_fd, name, new_fd, to_name, RENAME_EXCHANGE)
            elif upper.rename_whiteout:
                syscalls.renameat2(old_fd, name, new_fd, to_name, syscalls.RENAME_WHITEOUT)
            else:
                self._move_and_whiteout(upper, old_fd, name, new_fd, to_name)
        elif isinstance(old, Directory) and over_whiteout:
            syscalls.renameat2(old_fd, name, new_fd, to_name, RENAME_EXCHANGE)
            discard(old_fd, name)
        else:
            os.rename(name, to_name, src_dir_fd=old_fd, dst_dir_fd=new_fd)

    def _move_and_whiteout(
        self, upper: Upper, old_fd: int, name: bytes, new_fd: int, to_name: bytes
    ) -> None:
        """Without RENAME_WHITEOUT: a whiteout goes to the new name first and changes places."""
        try:
            self._link_whiteout(upper, new_fd, to_name)
        except FileExistsError:
            os.rename(name, to_name, src_dir_fd=old_fd, dst_dir_fd=new_fd)
            self._link_whiteout(upper, old_fd, name)
            return
        syscalls.renameat2(old_fd, name, new_fd, to_name, RENAME_EXCHANGE)

    # the node table after it

    def _move_name(
        self, node: Node, parent: Directory, name: bytes, to_parent: Directory, to_name: bytes
    ) -> None:
        if parent.children.get(name) is node:
            del parent.children[name]
        extra = node.extra
        if node.parent is parent and node.name == name:
            node.parent, node.name = to_parent, to_name
        elif extra is not None and extra.names is not None:
            extra.names.discard((parent, name))
            extra.names.add((to_parent, to_name))
        to_parent.children[to_name] = node
        if parent.count <= 0 and not parent.children:
            self.table.drop(parent)

    def _exchange_names(
        self,
        old: Node,
        parent: Directory,
        name: bytes,
        new: Node,
        to_parent: Directory,
        to_name: bytes,
    ) -> None:
        del parent.children[name]
        del to_parent.children[to_name]
        for node, source, target in (
            (old, (parent, name), (to_parent, to_name)),
            (new, (to_parent, to_name), (parent, name)),
        ):
            if (node.parent, node.name) == source:
                node.parent, node.name = target
            elif node.extra is not None and node.extra.names is not None:
                node.extra.names.discard(source)
                node.extra.names.add(target)
            target[0].children[target[1]] = node
