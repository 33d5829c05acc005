"""Reading directories: the names of all layers as one list, taken when a handle begins to read.

An open directory keeps its list, so offsets are stable while names come and go (rewinddir takes a
new one). Entries are (name, inode number, kind); of those whose st_ino needs a look-up (copied up, or
merged) the number is found when the entry is read.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

from sdeefs.core.api import ROOT_NODE, Caller, DirectoryEntry, Entry
from sdeefs.core.copyup import CopyUp
from sdeefs.core.formats import PREFIX, get_xattr, xattr_path
from sdeefs.core.lookers import Lookers
from sdeefs.core.nodes import DEAD, HIDDEN, IMPURE, UPPER, Directory, Node

_new = tuple.__new__
Snapshot = list[tuple[bytes, int, int]]
#: The inode number has to be looked up when the entry is read.
UNKNOWN = 0


class OpenDirectory:
    """A directory handle."""

    __slots__ = ("entries", "latest", "node")

    def __init__(self, node: Directory, latest: Snapshot | None = None) -> None:
        self.node = node
        self.entries: Snapshot | None = None
        # What the kernel's cache of the directory was filled from, if it was: a reader that began
        # there and is sent on to us goes on in it.
        self.latest = latest


class Latest:
    """The lists that were last taken of the directories read last: some of them, by node."""

    LIMIT = 50_000  # entries in all

    def __init__(self) -> None:
        self.lists: dict[int, Snapshot] = {}
        self._entries = 0

    def get(self, node: int) -> Snapshot | None:
        return self.lists.get(node)

    def keep(self, node: int, entries: Snapshot) -> None:
        self._entries += len(entries) - len(self.lists.pop(node, ()))
        self.lists[node] = entries
        while self._entries > self.LIMIT:
            oldest = next(iter(self.lists))
            self._entries -= len(self.lists.pop(oldest))


class Listing(CopyUp):
    """The room of directory contents."""

    def __init__(self, settings: object) -> None:
        super().__init__(settings)
        self._latest = Latest()
        self.lookers = Lookers()

    def _scan(
        self, layer_number: int, dir_fd: int, unknown: bool
    ) -> Iterator[tuple[bytes, int, int, bool]]:
        """(name, st_ino or UNKNOWN, kind, whether a whiteout) of one layer's directory."""
        layer = self.layers[layer_number]
        fsid = layer.fsid
        fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    name = os.fsencode(entry.name)
                    if self.prefixes and name.startswith(PREFIX):
                        yield name[len(PREFIX) :], 0, 0, True
                        continue
                    ino = entry.inode()
                    if entry.is_dir(follow_symlinks=False):
                        kind = stat.S_IFDIR
                    elif entry.is_file(follow_symlinks=False):
                        kind = stat.S_IFREG
                        if layer.xwhiteouts and self._is_xattr_whiteout(dir_fd, name):
                            yield name, 0, 0, True
                            continue
                    elif entry.is_symlink():
                        kind = stat.S_IFLNK
                    else:
                        try:
                            st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
                        except FileNotFoundError:
                            continue
                        kind = st.st_mode & 0o170000
                        if kind == stat.S_IFCHR and st.st_rdev == 0:
                            yield name, 0, 0, True
                            continue
                    if unknown:
                        ino = UNKNOWN
                    elif fsid:
                        ino = self.compose(ino, layer)
                    yield name, ino, kind, False
        finally:
            os.close(fd)

    def _is_xattr_whiteout(self, dir_fd: int, name: bytes) -> bool:
        try:
            st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        except OSError:
            return False
        return st.st_size == 0 and (
            get_xattr(xattr_path(dir_fd, name), self.names.whiteout) is not None
        )

    def _snapshot(self, directory: Directory) -> Snapshot:
        """All entries of a directory of merged, "." and ".." first."""
        parent = directory.parent or directory
        entries: Snapshot = [
            (b".", directory.shown, stat.S_IFDIR),
            (b"..", parent.shown, stat.S_IFDIR),
        ]
        if directory.flags & DEAD:
            return entries
        lowers = () if directory.flags & HIDDEN else directory.lowers
        several = len(lowers) + (directory.layer == UPPER) > 1
        seen: set[bytes] = set()
        if directory.layer == UPPER:
            unknown = bool(lowers) or bool(directory.flags & IMPURE)
            if self.upper is not None and self.upper.index_inodes:
                unknown = True
            for name, ino, kind, whiteout in self._scan(0, self._upper_fd(directory), unknown):
                if several:
                    seen.add(name)
                if not whiteout:
                    entries.append((name, ino, kind))
        for position, (index, _) in enumerate(lowers):
            try:
                fd = self._lower_fd(directory, position)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EXDEV, errno.ESTALE):
                    continue
                raise
            for name, ino, kind, whiteout in self._scan(index, fd, False):
                if several:
                    if name in seen:
                        continue
                    seen.add(name)
                if not whiteout:
                    entries.append((name, ino, kind))
        return entries

    def _is_empty(self, directory: Directory) -> bool:
        """Whether merged shows nothing in it."""
        return len(self._snapshot(directory)) == 2

    def _inode_number(self, directory: Directory, name: bytes) -> int:
        """st_ino of an entry, without giving it a node; 0 where it is gone."""
        child = directory.children.get(name)
        if child is not None:
            return child.shown
        try:
            found = self._find(directory, name)
        except OSError:
            return 0
        return 0 if isinstance(found, bool) else found.shown

    def _entries(self, handle: OpenDirectory, offset: int) -> Snapshot:
        if handle.entries is None and offset and handle.latest is not None:
            handle.entries = handle.latest
        if handle.entries is None or offset == 0:
            handle.entries = self._snapshot(handle.node)
            self._latest.keep(handle.node.number, handle.entries)
        return handle.entries

    def _plain_entries(
        self, handle: OpenDirectory, entries: Snapshot, offset: int
    ) -> Iterator[DirectoryEntry]:
        directory = handle.node
        for position in range(offset, len(entries)):
            name, ino, kind = entries[position]
            if ino == UNKNOWN:
                with self.lock:
                    ino = self._inode_number(directory, name)
                if ino == 0:
                    continue
            yield _new(DirectoryEntry, (name, ino, kind, position + 1))

    def _entries_plus(
        self, handle: OpenDirectory, entries: Snapshot, offset: int, caller: Caller | None
    ) -> Iterator[tuple[DirectoryEntry, Entry]]:
        directory = handle.node
        bare = _new(Entry, (0, None, 0.0, 0.0))
        for position in range(offset, len(entries)):
            name, ino, kind = entries[position]
            try:
                with self.lock:
                    if position < 2:
                        node: Node = directory
                        if position == 1 and directory.number != ROOT_NODE:
                            node = directory.parent or directory
                        entry = _new(Entry, (0, self._attributes(node, self._stat(node)), 0.0, 0.0))
                    elif caller and ino != UNKNOWN and not self.lookers.wants(caller.pid, kind):
                        directory.lister = caller.pid
                        entry = bare
                    else:
                        entry = self._lookup(directory, name)
                        if entry.attributes is None:
                            continue  # removed since
                        ino, kind = entry.attributes.ino, entry.attributes.mode & 0o170000
            except OSError:
                if ino == UNKNOWN:
                    continue
                entry = bare
            yield _new(DirectoryEntry, (name, ino, kind, position + 1)), entry
