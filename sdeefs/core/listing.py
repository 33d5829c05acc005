"""Reading directories: the names of all layers as one list, taken when somebody begins to read.

Offsets are made of the names (`cookie()`), and lists are in their order: so one stays good while names
come and go, whatever list the next page is from, and the kernel needn't open a directory with us (nor
tell who reads). Entries are (name, inode number, kind); of those whose st_ino needs a look-up (copied
up, or merged) the number is found when the entry is read.
"""

from __future__ import annotations

import errno
import os
import stat
from bisect import bisect_right
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
#: Lists of directories that somebody is reading, or began to.
_LISTS = 64
_HIGHEST = (1 << 63) - 1


def cookie(name: bytes) -> int:
    """The offset behind an entry (d_off), 3 or more: "." and ".." have 1 and 2.

    A hash of 63 bits, as ext4's and Lustre's (here FNV-1a, draft-eastlake-fnv), that two names of one
    directory will not share. Without a key: a directory is listed in the same order by every mount.
    """
    value = 0xCBF29CE484222325
    for byte in name:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return max(value & _HIGHEST, 3)


def _cookie_of(entry: tuple[bytes, int, int]) -> int:
    return cookie(entry[0])


def _behind(position: int, name: bytes) -> int:
    """The offset behind the entry at a place of a list."""
    return position + 1 if position < 2 else cookie(name)


def _following(entries: Snapshot, offset: int) -> int:
    """The place in a list of what comes after an offset."""
    return offset if offset < 2 else bisect_right(entries, offset, 2, key=_cookie_of)


class Listing(CopyUp):
    """The room of directory contents."""

    def __init__(self, settings: object) -> None:
        super().__init__(settings)
        self._lists: dict[int, Snapshot] = {}  # by node, until one has read it to its end
        self._opendir_spared = False
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
        """All entries of a directory of merged, "." and ".." first, then by their cookies."""
        entries = self._contents(directory)
        entries[2:] = sorted(entries[2:], key=_cookie_of)
        return entries

    def _contents(self, directory: Directory) -> Snapshot:
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
        return len(self._contents(directory)) == 2

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

    def caches_directory(self, node: int) -> bool:
        """Whether the kernel may keep the entries that it is told of a directory: it learns of
        every change, since all are made through it, or the directories of lower are watched."""
        return self._is_cacheable(self._directory(node))

    def _is_cacheable(self, directory: Directory) -> bool:
        if self.upper_timeout <= 0:
            return False
        return not directory.lowers or self.lower_timeout >= self.upper_timeout

    def spares_opendir(self) -> bool:
        """Whether the kernel may open directories by itself, from now on and for good.

        Then it keeps all entries; where it may not (lower can't be watched any more), it is told to
        forget them after each page.
        """
        self._opendir_spared |= 0 < self.upper_timeout <= self.lower_timeout
        return self._opendir_spared

    def _entries(self, directory: Directory, offset: int) -> Snapshot:
        """The list to go on in behind an offset; at 0 it is a new one."""
        entries = self._lists.get(directory.number) if offset else None
        if entries is None:
            entries = self._snapshot(directory)
            self._keep_list(directory, entries)
        return entries

    def _keep_list(self, directory: Directory, entries: Snapshot) -> None:
        """Keep what was just taken of a directory for the pages that follow."""
        lists = self._lists
        lists.pop(directory.number, None)
        lists[directory.number] = entries
        if len(lists) > _LISTS:
            del lists[next(iter(lists))]
        if self._opendir_spared and self.kernel is not None and not self._is_cacheable(directory):
            self.kernel.invalidate_inode(directory.number)

    def _rest(self, directory: Directory, entries: Snapshot, offset: int) -> range:
        """The places of a list behind an offset. Where there is none, the list has served."""
        places = range(_following(entries, offset), len(entries))
        if not places:
            self._lists.pop(directory.number, None)
        return places

    def _plain_entries(
        self, directory: Directory, entries: Snapshot, places: range
    ) -> Iterator[DirectoryEntry]:
        for position in places:
            name, ino, kind = entries[position]
            if ino == UNKNOWN:
                with self.lock:
                    ino = self._inode_number(directory, name)
                if ino == 0:
                    continue
            yield _new(DirectoryEntry, (name, ino, kind, _behind(position, name)))

    def _entries_plus(
        self, directory: Directory, entries: Snapshot, places: range, caller: Caller | None
    ) -> Iterator[tuple[DirectoryEntry, Entry]]:
        bare = _new(Entry, (0, None, 0.0, 0.0))
        for position in places:
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
            yield _new(DirectoryEntry, (name, ino, kind, _behind(position, name))), entry
