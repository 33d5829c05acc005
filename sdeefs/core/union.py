"""The state that all rooms of the core share: settings, layers, nodes, and directory descriptors.

The rooms build on each other (look-up, attributes, copy-up, ...), each a class over the one below;
`filesystem.Filesystem` is the whole. All methods with a leading underscore run under `self.lock`.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import deque
from typing import Protocol

from sdeefs.core.api import ROOT_NODE, Kernel
from sdeefs.core.formats import OverlayNames, fd_path, get_xattr, xattr_path
from sdeefs.core.ids import Owners
from sdeefs.core.layers import Layer, Upper, discard, give_file_system_ids, open_lower
from sdeefs.core.nodes import DEAD, IMPURE, XWHITEOUTS, Directory, Node, NodeTable
from sdeefs.core.settings import RedirectDir, Settings, WhiteoutForm

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: Above this bit stands the file system's number in composed inode numbers.
_FSID_SHIFT = 56


def stale() -> OSError:
    """The object is no longer what it was: the kernel looks it up again."""
    return OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def read_only() -> OSError:
    """There is no upper to write to."""
    return OSError(errno.EROFS, os.strerror(errno.EROFS))


class Watcher(Protocol):
    """Who is told, under the lock, which directories with lowers the kernel holds."""

    def add(self, directory: Directory) -> None: ...

    def forget(self, directory: Directory) -> None: ...


class Union:
    """Layers, nodes and descriptors of one mount."""

    kernel: Kernel | None = None
    passthrough = False
    writeback = False
    killpriv = False
    watch: Watcher | None = None

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.lock = threading.RLock()
        self.names = OverlayNames(settings.userxattr)
        self.table = NodeTable()
        self.upper: Upper | None = None
        self.layers: dict[int, Layer] = {}
        if settings.upper is not None:
            self.upper = Upper(settings, self.names)
            self.layers[0] = self.upper.layer
        for index, path in enumerate(settings.lowers, 1):
            self.layers[index] = open_lower(index, path)
        if not self.layers:
            raise OSError(errno.EINVAL, "a mount needs at least one lower or an upper")
        self.name_max = max(os.fstatvfs(layer.fd).f_namemax for layer in self.layers.values())
        give_file_system_ids(list(self.layers.values()))
        self.layers[max(self.layers)].last = True
        self.writable = self.upper is not None and not self.upper.read_only
        self.prefixes = (
            settings.read_prefixes
            or settings.whiteouts is WhiteoutForm.PREFIX
            or (self.upper is not None and self.upper.whiteouts is WhiteoutForm.PREFIX)
        )
        self.follow_redirects = settings.redirect_dir is not RedirectDir.NOFOLLOW and not (
            settings.userxattr and settings.redirect_dir is RedirectDir.OFF
        )
        self.upper_owners = Owners(settings.uid_upper, settings.gid_upper)
        self.lower_owners = Owners(settings.uid_lower, settings.gid_lower, settings.squash_overflow)
        self.unmapped = settings.unmapped_lowers
        self.override = settings.override_stat is True or (
            self.upper is not None and self.upper.override
        )
        self.index_on = settings.index and self.upper is not None and self.upper.index >= 0
        self.secrets: tuple[int, frozenset[int]] | None = None
        if settings.secrets is not None:
            self.secrets = (settings.secrets[0], frozenset(settings.secrets[1:]))
        self.lower_timeout = settings.lower_timeout
        self.upper_timeout = settings.upper_timeout
        self.open_directories = 0
        self._directories: deque[tuple[Directory, int, int]] = deque()
        self.root = self._make_root()

    def owners_of(self, layer: int) -> Owners:
        """How the ids of a layer's objects are shown."""
        return self.upper_owners if layer <= self.unmapped else self.lower_owners

    def _make_root(self) -> Directory:
        lowers = []
        for index in sorted(self.layers):
            if index == 0:
                continue
            lowers.append((index, b""))
            layer = self.layers[index]
            opaque = get_xattr(fd_path(layer.fd), self.names.opaque, follow=True)
            layer.xwhiteouts = opaque == b"x"
        top = self.layers[0] if self.upper is not None else self.layers[1]
        ino = os.fstat(top.fd).st_ino
        first = self.layers[1] if lowers else top
        shown = self.compose(os.fstat(first.fd).st_ino, first)
        root = Directory(ROOT_NODE, None, b"", stat.S_IFDIR, top.index, ino, shown, tuple(lowers))
        root.count = 1
        if self.upper is not None:
            path = fd_path(top.fd)
            if get_xattr(path, self.names.impure, follow=True) == b"y":
                root.flags |= IMPURE
            opaque = get_xattr(path, self.names.opaque, follow=True)
            if opaque == b"x":
                root.flags |= XWHITEOUTS
        self.table.nodes[ROOT_NODE] = root
        return root

    def compose(self, ino: int, layer: Layer) -> int:
        """st_ino of an object of a layer: unique over all file systems below, and lasting."""
        fsid = layer.fsid
        return ino if fsid == 0 else ino ^ (fsid << _FSID_SHIFT)

    # nodes

    def _node(self, number: int) -> Node:
        try:
            return self.table.nodes[number]
        except KeyError:
            raise stale() from None

    def _directory(self, number: int) -> Directory:
        node = self.table.nodes.get(number)
        if node is None:
            raise stale()
        if not isinstance(node, Directory):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return node

    # descriptors of directories

    def _upper_fd(self, directory: Directory) -> int:
        """An O_PATH descriptor of a directory in upper, kept until it is crowded out."""
        fd = directory.upper_fd
        if fd >= 0:
            return fd
        parent = directory.parent
        if parent is None:
            assert self.upper is not None
            return self.upper.layer.fd
        if directory.flags & DEAD:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        fd = os.open(directory.name, _DIRECTORY, dir_fd=self._upper_fd(parent))
        directory.upper_fd = fd
        self._remember(directory, -1, fd)
        return fd

    def _lower_fd(self, directory: Directory, position: int) -> int:
        """The same for one of its lowers (by the position in `directory.lowers`)."""
        fds = directory.lower_fds
        if fds is not None and fds[position] >= 0:
            return fds[position]
        index, path = directory.lowers[position]
        layer = self.layers[index]
        if not path:
            return layer.fd
        try:
            fd = layer.open_directory(path)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise stale() from error
            raise
        if fds is None:
            fds = directory.lower_fds = [-1] * len(directory.lowers)
        fds[position] = fd
        self._remember(directory, position, fd)
        return fd

    def _remember(self, directory: Directory, position: int, fd: int) -> None:
        self._directories.append((directory, position, fd))
        self.open_directories += 1

    def _trim(self) -> None:
        """Close the oldest directory descriptors; called between requests only."""
        limit = self.settings.max_directories
        keep = limit - limit // 8
        queue = self._directories
        live = 0
        for directory, position, fd in queue:
            live += self._holds(directory, position) == fd
        while queue and live > keep:
            directory, position, fd = queue.popleft()
            if self._holds(directory, position) == fd and not directory.flags & DEAD:
                self._release_fd(directory, position)
                os.close(fd)
                live -= 1
        if len(queue) > 2 * max(live, 16):
            fresh = [entry for entry in queue if self._holds(entry[0], entry[1]) == entry[2]]
            queue.clear()
            queue.extend(fresh)
        self.open_directories = live

    @staticmethod
    def _holds(directory: Directory, position: int) -> int:
        if position < 0:
            return directory.upper_fd
        fds = directory.lower_fds
        return fds[position] if fds is not None and position < len(fds) else -1

    @staticmethod
    def _release_fd(directory: Directory, position: int) -> None:
        if position < 0:
            directory.upper_fd = -1
        elif directory.lower_fds is not None:
            directory.lower_fds[position] = -1

    def _close_lower_fds(self, directory: Directory) -> None:
        watch = self.watch
        if watch is not None and directory.lowers:
            watch.forget(directory)
        fds = directory.lower_fds
        directory.lower_fds = None
        if fds is not None:
            for fd in fds:
                if fd >= 0:
                    os.close(fd)

    def _close_dropped(self) -> None:
        for fd in self._take_dropped():
            os.close(fd)

    def _take_dropped(self) -> list[int]:
        """What is left of nodes that are gone, but for these descriptors: the caller closes them,
        best without the lock. The last one of a removed object's frees its blocks."""
        watch = self.watch
        gone = self.table.dropped_directories
        while gone:
            directory = gone.pop()
            if watch is not None and directory.lowers:
                watch.forget(directory)
            directory.close_fds(self.table.dropped)
        names = self.table.dropped_names
        while names:
            name = names.pop()
            if self.upper is not None and self.upper.work >= 0:
                discard(self.upper.work, name)
        dropped, self.table.dropped = self.table.dropped, []
        return dropped

    # where an object is

    def _place(self, node: Node) -> tuple[int, bytes]:
        """(directory descriptor, name) of a node; an empty name: the descriptor is the object."""
        extra = node.extra
        if extra is not None:
            if extra.fd >= 0:
                return extra.fd, b""
            if extra.index is not None and node.layer == 0:
                assert self.upper is not None
                return self.upper.index, extra.index
        parent = node.parent
        if isinstance(node, Directory):
            if node.layer != 0:
                return self._lower_fd(node, 0), b""
            if parent is None or node.upper_fd >= 0:
                return self._upper_fd(node), b""
        assert parent is not None
        layer = node.layer
        if layer == 0:
            return self._upper_fd(parent), node.name
        for position, (index, _) in enumerate(parent.lowers):
            if index == layer:
                return self._lower_fd(parent, position), node.name
        raise stale()

    def _stat(self, node: Node) -> os.stat_result:
        """stat of a node where its data is; ESTALE where another object has its place."""
        fd, name = self._place(node)
        try:
            st = os.stat(name, dir_fd=fd, follow_symlinks=False) if name else os.fstat(fd)
        except FileNotFoundError:
            raise stale() from None
        if not node.is_of(st):
            raise stale()
        return st

    def _xattr_place(self, node: Node) -> tuple[bytes, bool]:
        """(path, follow) for the xattr calls."""
        fd, name = self._place(node)
        return (xattr_path(fd, name), False) if name else (fd_path(fd), True)

    def counts(self) -> dict[str, int]:
        """What is held: nodes, directory descriptors."""
        with self.lock:
            live = sum(1 for d, p, fd in self._directories if self._holds(d, p) == fd)
            return {"nodes": len(self.table.nodes), "directories": live}
