"""From a name in a directory to the object: upper first, then the lowers, as ovl_lookup() does it."""

from __future__ import annotations

import errno
import os
import stat
from typing import NamedTuple

from mount_helpers import syscalls
from sdeefs.core.formats import (
    PREFIX,
    PREFIX_OPAQUE,
    decode_handle,
    fd_path,
    get_xattr,
    index_name,
    inode_of_handle,
    valid_redirect,
    xattr_path,
)
from sdeefs.core.layers import Layer
from sdeefs.core.nodes import (
    DEAD,
    HIDDEN,
    IMPURE,
    OPAQUE,
    UPPER,
    XWHITEOUTS,
    Directory,
    Node,
)
from sdeefs.core.secrets import Secrets

_new = tuple.__new__
Lowers = tuple[tuple[int, bytes], ...]


class Found(NamedTuple):
    """An object of merged, before it has a node."""

    st: os.stat_result
    layer: int
    shown: int
    lowers: Lowers = ()
    flags: int = 0
    redirect: bytes | None = None
    in_index: bytes | None = None  # a file of upper that its name in the index leads to
    secret: bool = False
    lower_nlink: int = 0


def _failed(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Lookup(Secrets):
    """The room of names."""

    def _find(self, parent: Directory, name: bytes) -> Found | bool:
        """What a name stands for; False: nothing; True: nothing, since a whiteout of upper hides it."""
        if self.prefixes and name.startswith(PREFIX):
            return False
        if parent.layer == UPPER:
            fd = parent.upper_fd
            if fd < 0:
                fd = self._upper_fd(parent)
            try:
                st = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                if self.prefixes and self._has_prefix_whiteout(fd, name):
                    return True
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG or len(name) > self.name_max:
                    raise
            else:
                mode = st.st_mode
                if mode & 0o170000 == stat.S_IFDIR:
                    return self._find_upper_directory(parent, name, fd, st)
                if self._is_whiteout(self.layers[0], fd, name, st):
                    return True
                return self._find_upper_file(parent, name, fd, st)
        if not parent.lowers or parent.flags & HIDDEN:
            return False
        return self._find_lower(parent, name)

    # upper

    def _is_whiteout(self, layer: Layer, fd: int, name: bytes, st: os.stat_result) -> bool:
        mode = st.st_mode
        if st.st_size == 0 and mode & 0o170000 in (stat.S_IFCHR, stat.S_IFREG):
            if mode & 0o170000 == stat.S_IFCHR:
                return st.st_rdev == 0
            if layer.xwhiteouts:
                return get_xattr(xattr_path(fd, name), self.names.whiteout) is not None
        return False

    @staticmethod
    def _has_prefix_whiteout(fd: int, name: bytes) -> bool:
        try:
            os.stat(PREFIX + name, dir_fd=fd, follow_symlinks=False)
        except OSError:
            return False
        return True

    def _overlay_xattrs(self, path: bytes) -> list[str]:
        """The names of all xattrs; nothing where there can't be any."""
        if self.settings.noxattr:
            return []
        try:
            return os.listxattr(path, follow_symlinks=False)
        except OSError:
            return []

    def _directory_marks(self, fd: int, name: bytes, layer: Layer) -> tuple[int, bytes | None]:
        """(flags, redirect) of a directory of a layer, from its xattrs."""
        flags, redirect = 0, None
        path = xattr_path(fd, name)
        present = self._overlay_xattrs(path)
        if present:
            names = self.names
            words = {os.fsencode(word) for word in present}
            if names.opaque in words:
                value = get_xattr(path, names.opaque)
                if value == b"y":
                    flags |= OPAQUE
                elif value == b"x":
                    flags |= XWHITEOUTS
                    layer.xwhiteouts = True
            if names.redirect in words:
                redirect = get_xattr(path, names.redirect)
            if names.impure in words:
                flags |= IMPURE
        if self.prefixes:
            try:
                os.stat(name + b"/" + PREFIX_OPAQUE, dir_fd=fd, follow_symlinks=False)
                flags |= OPAQUE
            except OSError:
                pass
        return flags, redirect

    def _check_redirect(self, redirect: bytes | None) -> None:
        if redirect is None:
            return
        if not self.follow_redirects:
            raise _failed(errno.EPERM)
        if not valid_redirect(redirect):
            raise _failed(errno.EIO)

    def _find_upper_directory(
        self, parent: Directory, name: bytes, fd: int, st: os.stat_result
    ) -> Found:
        layer = self.layers[0]
        flags, redirect = self._directory_marks(fd, name, layer)
        lowers: Lowers = ()
        shown = 0
        if flags & OPAQUE:
            redirect = None
        elif redirect is not None or (parent.lowers and not parent.flags & HIDDEN):
            self._check_redirect(redirect)
            base = parent.lowers
            wanted = name
            if redirect is not None:
                wanted = redirect
                if redirect.startswith(b"/"):
                    base = self.root.lowers
            below = self._stack(base, wanted, above_directory=True) if base else None
            if below is not None:
                first, lowers = below
                shown = self.compose(first.st_ino, self.layers[lowers[0][0]])
        return Found(st, UPPER, shown or self.compose(st.st_ino, layer), lowers, flags, redirect)

    def _find_upper_file(
        self, parent: Directory, name: bytes, fd: int, st: os.stat_result
    ) -> Found:
        shown = 0
        secret = False
        lower_nlink = 0
        index = None
        layer = self.layers[0]
        if self.upper is not None and self.upper.index_inodes and st.st_nlink > 1:
            index = self.upper.index_inodes.get(st.st_ino)
            if index is not None:
                shown, lower_nlink, _ = self._origin(bytes.fromhex(index.decode()), st)
        elif parent.lowers or parent.flags & IMPURE or st.st_nlink > 1:
            path = xattr_path(fd, name)
            present = self._overlay_xattrs(path)
            if present:
                words = {os.fsencode(word) for word in present}
                secret = self.names.secret in words
                if self.names.origin in words:
                    value = get_xattr(path, self.names.origin)
                    shown, lower_nlink, index = self._origin(value or b"", st)
        shown = shown or self.compose(st.st_ino, layer)
        return _new(Found, (st, UPPER, shown, (), 0, None, index, secret, lower_nlink))

    def _origin(self, value: bytes, st: os.stat_result) -> tuple[int, int, bytes | None]:
        """(st_ino, links in lower, name in the index) of what an object was copied up from."""
        decoded = decode_handle(value)
        if decoded is None:
            return 0, 0, None
        uuid, handle = decoded
        index = None
        if self.index_on and st.st_nlink > 1 and stat.S_IFMT(st.st_mode) != stat.S_IFDIR:
            name = index_name(value)
            assert self.upper is not None
            if name in self.upper.index_names:
                try:
                    there = os.stat(name, dir_fd=self.upper.index, follow_symlinks=False)
                    if there.st_ino == st.st_ino:
                        index = name
                except OSError:
                    pass
        for number, layer in self.layers.items():
            if number == UPPER or layer.uuid != uuid:
                continue
            try:
                fd = syscalls.open_by_handle_at(layer.readable, handle, os.O_PATH)
            except OSError as error:
                ino = inode_of_handle(handle)
                if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EBADF) or ino is None:
                    continue
                return self.compose(ino, layer), 0, index
            try:
                there = os.fstat(fd)
            finally:
                os.close(fd)
            if stat.S_IFMT(there.st_mode) != stat.S_IFMT(st.st_mode):
                continue
            if there.st_nlink > 1 and index is None and not stat.S_ISDIR(there.st_mode):
                return 0, 0, None  # broken links must not share an inode number
            return self.compose(there.st_ino, layer), there.st_nlink, index
        return 0, 0, index

    # lowers

    def _find_lower(self, parent: Directory, name: bytes) -> Found | bool:
        """A name that upper says nothing about."""
        for position, (index, path) in enumerate(parent.lowers):
            layer = self.layers[index]
            try:
                fd = self._lower_fd(parent, position)
                st = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                if self.prefixes and self._has_prefix_whiteout(fd, name):
                    return False
                continue
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG and len(name) <= self.name_max:
                    continue
                if error.errno in (errno.EXDEV, errno.ESTALE):
                    continue  # another mount's place, or replaced under us: nothing is there
                raise
            kind = st.st_mode & 0o170000
            if kind != stat.S_IFDIR:
                if (kind == stat.S_IFCHR or layer.xwhiteouts) and self._is_whiteout(
                    layer, fd, name, st
                ):
                    return False
                return self._found_lower_file(fd, name, st, layer)
            rest = parent.lowers[position:]
            if len(rest) == 1:  # nothing below: its marks mean nothing
                lowers: Lowers = ((index, path + b"/" + name if path else name),)
                if self.prefixes or layer.xwhiteouts:
                    self._directory_marks(fd, name, layer)
            else:
                below = self._stack(rest, name, above_directory=False)
                if below is None:
                    return False
                st, lowers = below
            flags = 0
            if self._hides(lowers[0][0]) and self._is_secret(st, fd, name):
                flags |= HIDDEN
            return Found(st, lowers[0][0], self.compose(st.st_ino, layer), lowers, flags)
        return False

    def _found_lower_file(self, fd: int, name: bytes, st: os.stat_result, layer: Layer) -> Found:
        shown = self.compose(st.st_ino, layer)
        secret = self._hides(layer.index) and self._is_secret(st, fd, name)
        if st.st_nlink > 1 and self.index_on:
            assert self.upper is not None
            if self.upper.index_names:
                origin = layer.handle(fd, name)
                if origin is not None and (index := index_name(origin)) in self.upper.index_names:
                    there = self._stat_index(index)
                    if there is not None:
                        if secret:
                            path = xattr_path(self.upper.index, index)
                            secret = get_xattr(path, self.names.secret) is not None
                        return Found(
                            there, UPPER, shown,
                            in_index=index, secret=secret, lower_nlink=st.st_nlink,
                        )  # fmt: skip
        return _new(Found, (st, layer.index, shown, (), 0, None, None, secret, st.st_nlink))

    def _stat_index(self, index: bytes) -> os.stat_result | None:
        assert self.upper is not None
        try:
            st = os.stat(index, dir_fd=self.upper.index, follow_symlinks=False)
        except OSError:
            return None
        return None if stat.S_ISCHR(st.st_mode) and st.st_rdev == 0 else st

    def _stack(
        self, base: Lowers, name: bytes, above_directory: bool
    ) -> tuple[os.stat_result, Lowers] | None:
        """The directories of the lowers that make one directory of merged.

        `name` is a name below `base`, or an absolute redirect. None where there is no directory.
        """
        found: list[tuple[int, bytes]] = []
        first: os.stat_result | None = None
        position = 0
        while position < len(base):
            index, path = base[position]
            position += 1
            layer = self.layers[index]
            absolute = name.startswith(b"/")
            parts = name[1:].split(b"/") if absolute else [name]
            at = b"" if absolute else path
            result = self._walk_layer(layer, at, parts)
            if result is None:
                continue
            st, where, flags, redirect, stop = result
            if st is not None:
                secret = self._hides(index) and self._is_secret(st, layer.fd, where)
                if secret and (above_directory or first is not None):
                    break
                if first is None:
                    first = st
                found.append((index, where))
                if secret:
                    break
            if stop or flags & OPAQUE:
                break
            if redirect is not None:
                self._check_redirect(redirect)
                if redirect.startswith(b"/") and not absolute:
                    base = self.root.lowers
                    position = next((n for n, (i, _) in enumerate(base) if i > index), len(base))
                name = redirect
        if first is None:
            return None
        return first, tuple(found)

    def _walk_layer(
        self, layer: Layer, at: bytes, parts: list[bytes]
    ) -> tuple[os.stat_result | None, bytes, int, bytes | None, bool] | None:
        """One layer's part of a stack: (stat, path, flags, redirect for the next layers, stop)."""
        try:
            fd = layer.open_directory(at)
        except OSError:
            return None
        try:
            where, redirect = at, None
            for number, part in enumerate(parts):
                last = number == len(parts) - 1
                try:
                    st = os.stat(part, dir_fd=fd, follow_symlinks=False)
                except FileNotFoundError:
                    if self.prefixes and self._has_prefix_whiteout(fd, part):
                        return None, where, 0, None, True
                    return None if redirect is None else (None, where, 0, redirect, False)
                if stat.S_IFMT(st.st_mode) != stat.S_IFDIR:
                    return None, where, 0, None, True  # a whiteout or a file ends the stack
                flags, found = (
                    (0, None) if layer.last and not self.prefixes
                    else self._directory_marks(fd, part, layer)
                )  # fmt: skip
                where = where + b"/" + part if where else part
                if found is not None and not flags & OPAQUE:
                    rest = b"".join(b"/" + p for p in parts[number + 1 :])
                    if found.startswith(b"/"):
                        redirect = found + rest
                    else:
                        before = b"".join(b"/" + p for p in parts[:number])
                        redirect = before + b"/" + found + rest if len(parts) > 1 else found
                if last:
                    return st, where, flags, redirect, False
                below = layer_open(layer, fd, part)
                os.close(fd)
                fd = below
                if flags & OPAQUE:
                    # what is below here hides the layers beneath
                    result = self._finish_opaque(layer, fd, where, parts[number + 1 :])
                    fd = -1
                    return result
            return None
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.ELOOP, errno.ENOTDIR):
                return None
            raise
        finally:
            if fd >= 0:
                os.close(fd)

    def _finish_opaque(
        self, layer: Layer, fd: int, where: bytes, rest: list[bytes]
    ) -> tuple[os.stat_result | None, bytes, int, bytes | None, bool]:
        os.close(fd)
        below = self._walk_layer(layer, where, rest)
        if below is None:
            return None, where, 0, None, True
        return below[0], below[1], below[2], None, True

    # nodes

    def _bind(self, parent: Directory, name: bytes, found: Found) -> Node:
        """The node of what was found; the same one as before where it is the same object."""
        st, layer = found.st, found.layer
        kind = st.st_mode & 0o170000
        # With write-back the kernel believes no new size of a file it knows: a file of lower that
        # was changed in place is another node to it.
        stamp = 0
        if self.writeback and layer != UPPER and kind == stat.S_IFREG:
            stamp = hash((st.st_size, st.st_mtime_ns))
        child = parent.children.get(name)
        if child is not None:
            if (
                child.ino == st.st_ino
                and child.layer == layer
                and child.kind == kind
                and child.stamp == stamp
            ):
                if isinstance(child, Directory):
                    self._update_directory(child, found)
                return child
            self.table.remove_name(child, parent, name)
            self._strand(child)
        if kind == stat.S_IFDIR:
            redirect = found.redirect
            made = Directory(
                self.table.number(), parent, name, kind, layer, st.st_ino, found.shown,
                found.lowers, found.flags, redirect,
            )  # fmt: skip
            self.table.add(made)
            if self.watch is not None and found.lowers:
                self.watch.add(made)
            return made
        key = None
        if (st.st_nlink > 1 or found.in_index is not None) and (
            layer == UPPER or self.index_on or not self.writable
        ):
            key = (layer, st.st_ino)
            known = self.table.linked.get(key)
            if known is not None and known.kind == kind and known.stamp == stamp:
                self.table.add_name(known, parent, name)
                if known.parent is None or (known.extra is not None and known.extra.fd >= 0):
                    self._settle_at(known, parent, name)
                return known
        shown = found.shown
        if shown == st.st_ino:
            shown = st.st_ino
        node = Node(self.table.number(), parent, name, kind, layer, st.st_ino, shown)
        node.stamp = stamp
        self.table.add(node)
        if key is not None:
            self.table.set_key(node, key)
        if found.in_index is not None or found.secret or (key is not None and found.lower_nlink):
            extra = node.more()
            extra.index = found.in_index
            extra.secret = found.secret
            extra.lower_nlink = found.lower_nlink
        return node

    def _settle_at(self, node: Node, parent: Directory, name: bytes) -> None:
        """A node that was held by descriptor has a name again."""
        extra = node.extra
        assert extra is not None
        if extra.fd >= 0:
            os.close(extra.fd)
            extra.fd = -1
        if extra.names is not None:
            extra.names.discard((parent, name))
        node.parent, node.name = parent, name

    def _update_directory(self, node: Directory, found: Found) -> None:
        """A lower may have got or lost a directory of this name under the live mount."""
        if node.lowers != found.lowers:
            self._close_lower_fds(node)
            node.lowers = found.lowers
            node.shown = found.shown
            if self.watch is not None and found.lowers:
                self.watch.add(node)
        keep = node.flags & ~(IMPURE | OPAQUE | HIDDEN | XWHITEOUTS)
        node.flags = keep | found.flags
        node.redirect = found.redirect

    def _strand(self, node: Node) -> None:
        """Another object has its name: nodes below a replaced directory find nothing any more."""
        if isinstance(node, Directory):
            node.flags |= DEAD


def layer_open(layer: Layer, fd: int, name: bytes) -> int:
    """One step down in a layer."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    below = os.open(name, flags, dir_fd=fd)
    if not layer.private and os.fstat(below).st_dev != layer.dev:
        os.close(below)
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    return below


__all__ = ["Found", "Lookup", "fd_path", "layer_open"]
