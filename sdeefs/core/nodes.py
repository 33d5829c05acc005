"""The objects that the kernel holds: small records, found by number and by name in their directory.

A record knows where its object is: the directory and the name for upper and for files of lower, the
paths in the lowers for directories. Objects with several names, open files or other rare things
carry them in an `Extra`, so that a million plain files stay small.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from sdeefs.core.api import ROOT_NODE

if TYPE_CHECKING:
    from sdeefs.core.handles import OpenFile

UPPER = 0

# Directory.flags
IMPURE = 1  # upper holds objects that were copied up: their inode numbers are their origin's
OPAQUE = 2  # upper hides the lowers
HIDDEN = 4  # the secrets rule: what lower has in it is not shown
DEAD = 8  # removed, but still held
ACL_KNOWN = 16  # whether there is a default ACL has been looked up
ACL_DEFAULT = 32  # ... and there is one
XWHITEOUTS = 64  # upper: marked opaque=x

LinkKey = tuple[int, int]  # layer, inode number


class Extra:
    """What few objects have."""

    __slots__ = (
        "fd", "handles", "index", "key", "lower_nlink", "names", "opened", "privileged", "secret", "work_name"
    )  # fmt: skip

    def __init__(self) -> None:
        self.names: set[tuple[Directory, bytes]] | None = None  # beside the first name
        self.key: LinkKey | None = None  # under which `NodeTable.linked` has it
        self.fd = -1  # O_PATH, where no name leads to the object any more
        self.index: bytes | None = None  # its name in work/index
        self.lower_nlink = 0
        self.handles: list[OpenFile] = []
        self.opened: tuple[int, int] | None = None  # mtime_ns and size that the page cache is of
        self.secret = False
        self.work_name: bytes | None = None  # of a nameless file where there is no O_TMPFILE
        self.privileged: int | None = None  # mtime_ns when setuid or setgid was set beside writers


class Node:
    """An object that is not a directory; `Directory` is the other kind."""

    __slots__ = (
        "count", "extra", "ino", "kind", "layer", "name", "number", "parent", "shown", "stamp"
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        parent: Directory | None,
        name: bytes,
        kind: int,
        layer: int,
        ino: int,
        shown: int,
    ) -> None:
        self.number = number
        self.count = 0  # look-ups that the kernel hasn't forgotten
        self.parent = parent
        self.name = name
        self.kind = kind  # S_IFMT bits
        self.layer = layer  # where its data is: UPPER, or the number of a lower
        self.ino = ino  # its inode number there
        self.shown = shown  # st_ino in merged
        self.extra: Extra | None = None
        self.stamp = 0  # of a file of lower under write-back: the size and time that were told

    def is_of(self, st: os.stat_result) -> bool:
        """Whether it stands for the object that was found: file systems use inode numbers again."""
        return st.st_ino == self.ino and st.st_mode & 0o170000 == self.kind

    def more(self) -> Extra:
        """The Extra, made when first needed."""
        extra = self.extra
        if extra is None:
            extra = self.extra = Extra()
        return extra


class Directory(Node):
    """A directory: in upper, in some lowers, or in both."""

    __slots__ = ("children", "flags", "lister", "lower_fds", "lowers", "redirect", "upper_fd")

    def __init__(
        self,
        number: int,
        parent: Directory | None,
        name: bytes,
        kind: int,
        layer: int,
        ino: int,
        shown: int,
        lowers: tuple[tuple[int, bytes], ...],
        flags: int = 0,
        redirect: bytes | None = None,
    ) -> None:
        super().__init__(number, parent, name, kind, layer, ino, shown)
        self.children: dict[bytes, Node] = {}
        self.lowers = lowers  # (layer, path from its root), topmost first
        self.flags = flags
        self.redirect = redirect
        self.upper_fd = -1
        self.lower_fds: list[int] | None = None
        self.lister = -1  # the process that was last told names of it without attributes

    def close_fds(self, to: list[int]) -> None:
        """Hand the descriptors over to be closed."""
        if self.upper_fd >= 0:
            to.append(self.upper_fd)
            self.upper_fd = -1
        if self.lower_fds is not None:
            to.extend(fd for fd in self.lower_fds if fd >= 0)
            self.lower_fds = None


class NodeTable:
    """All nodes by number, and those with several names by (layer, inode number)."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.linked: dict[LinkKey, Node] = {}
        self._next = ROOT_NODE + 1
        self.dropped: list[int] = []  # descriptors to close
        self.dropped_names: list[bytes] = []  # in the work directory, to remove
        self.dropped_directories: list[Directory] = []

    def number(self) -> int:
        """A number that no node has had."""
        number = self._next
        self._next = number + 1
        return number

    def add(self, node: Node) -> None:
        """A new node takes its place in its directory; who had the name before loses it."""
        parent = node.parent
        assert parent is not None
        other = parent.children.get(node.name)
        if other is not None:
            self.remove_name(other, parent, node.name)
        parent.children[node.name] = node
        self.nodes[node.number] = node

    def add_name(self, node: Node, parent: Directory, name: bytes) -> None:
        """One more name of a node."""
        other = parent.children.get(name)
        if other is node:
            return
        if other is not None:
            self.remove_name(other, parent, name)
        parent.children[name] = node
        if node.parent is parent and node.name == name:
            return
        extra = node.more()
        if extra.names is None:
            extra.names = set()
        extra.names.add((parent, name))

    def remove_name(self, node: Node, parent: Directory, name: bytes) -> bool:
        """A name of a node is gone; True if another one known took its place as the first."""
        if parent.children.get(name) is node:
            del parent.children[name]
        extra = node.extra
        names = extra.names if extra is not None else None
        moved = True
        if node.parent is parent and node.name == name:
            if names:
                node.parent, node.name = names.pop()
            else:
                moved = False
        elif names:
            names.discard((parent, name))
        if parent is not node.parent:
            self._drop_idle(parent)
        return moved

    def set_key(self, node: Node, key: LinkKey | None) -> None:
        """The key under which other names of the same inode find this node."""
        extra = node.extra
        if extra is not None and extra.key is not None and self.linked.get(extra.key) is node:
            del self.linked[extra.key]
        if key is not None:
            self.linked[key] = node
            node.more().key = key
        elif extra is not None:
            extra.key = None

    def forget(self, number: int, count: int) -> None:
        """The kernel drops so many look-ups of a node."""
        node = self.nodes.get(number)
        if node is None or number == ROOT_NODE:
            return
        node.count -= count
        if node.count <= 0:
            node.count = 0
            self.drop(node)

    def drop(self, node: Node) -> None:
        """Take a node out, unless something below it or an open file still needs it."""
        if node.number == ROOT_NODE or node.count > 0:
            return
        extra = node.extra
        if extra is not None and extra.handles:
            return
        if isinstance(node, Directory) and node.children:
            return
        if self.nodes.pop(node.number, None) is None:
            return
        if isinstance(node, Directory):
            self.dropped_directories.append(node)
        parents = []
        parent = node.parent
        if parent is not None:
            if parent.children.get(node.name) is node:
                del parent.children[node.name]
            parents.append(parent)
        if extra is not None:
            if extra.names:
                for other, name in extra.names:
                    if other.children.get(name) is node:
                        del other.children[name]
                    parents.append(other)
            if extra.key is not None and self.linked.get(extra.key) is node:
                del self.linked[extra.key]
            if extra.fd >= 0:
                self.dropped.append(extra.fd)
                extra.fd = -1
            if extra.work_name is not None:
                self.dropped_names.append(extra.work_name)
                extra.work_name = None
        for parent in parents:
            self._drop_idle(parent)

    def _drop_idle(self, parent: Directory) -> None:
        if parent.count <= 0 and not parent.children:
            self.drop(parent)
