"""Changes of lower under a live mount: fanotify marks on the lower directories that the kernel holds.

With a mark on each of them every change is told of, so what comes from lower may be believed for
long: an event turns into invalidations of the name or the inode in the kernel. Where marks are
refused (by the kernel, the filesystem, or a limit) the watch ends itself, and what comes from lower
is believed for `lower_timeout` seconds from then on.

Marks aren't evictable: an inode that the kernel drops under memory pressure would take its mark
along, and the changes after that would be missed. So their number has a limit.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections import deque
from typing import TYPE_CHECKING

from mount_helpers import fanotify, syscalls
from sdeefs.core.api import Kernel

if TYPE_CHECKING:
    from sdeefs.core.filesystem import Filesystem
    from sdeefs.core.nodes import Directory, Node

logger = logging.getLogger("sdeefs.watch")

#: Directories of lower that are watched at the same time (each pins an inode, about 1 KiB).
LIMIT = 100_000
#: An answer that was under way when a change was told of may still reach the kernel after the
#: invalidation: it is made once more, after so many seconds.
AGAIN = 0.3

_AT_HANDLE_FID = 0x200

_Word = tuple[int, bytes | None, bool]  # node, name (None: the inode itself), attributes only


class Watch:
    """The marks of one mount. The core calls `add` and `forget` with its lock held."""

    def __init__(self, filesystem: Filesystem, group: fanotify.Group) -> None:
        self.kernel: Kernel | None = None
        self._filesystem = filesystem
        self._group = group
        self._nodes: dict[bytes, int] = {}  # handle of a lower directory -> node
        self._handles: dict[int, list[bytes]] = {}
        self._again: deque[tuple[float, _Word]] = deque()
        self._short = filesystem.lower_timeout
        self.working = True

    @classmethod
    def open(cls, filesystem: Filesystem) -> Watch:
        """Watch from the roots on. Raises OSError where marks or handles are refused."""
        _refuse_remote(filesystem)
        watch = cls(filesystem, fanotify.Group())
        try:
            watch._mark_all(filesystem.root)
        except OSError:
            watch.close()
            raise
        filesystem.lower_timeout = filesystem.upper_timeout
        filesystem.watch = watch
        return watch

    @property
    def fd(self) -> int:
        """Readable when there are events."""
        return self._group.fd

    def __len__(self) -> int:
        return len(self._nodes)

    def close(self) -> None:
        """Drop all marks."""
        self.working = False
        self._group.close()

    # --- what the core tells ---------------------------------------------------------------------

    def add(self, directory: Directory) -> None:
        """The kernel is about to learn of a directory that has lowers (or has other ones now)."""
        if not self.working:
            return
        try:
            self._mark_all(directory)
        except OSError as error:
            self._give_up(error)

    def forget(self, directory: Directory) -> None:
        """The kernel holds a directory no more."""
        for handle in self._handles.pop(directory.number, ()):
            if self._nodes.get(handle) == directory.number:
                del self._nodes[handle]
        if not self.working:
            return
        for position, (index, path) in enumerate(directory.lowers):
            fds = directory.lower_fds
            try:
                if fds is not None and fds[position] >= 0:
                    self._group.unmark(fds[position])
                    continue
                fd = self._filesystem.layers[index].open_directory(path)
                try:
                    self._group.unmark(fd)
                finally:
                    os.close(fd)
            except OSError:
                continue  # moved away: its events name a handle that nobody knows

    def _mark_all(self, directory: Directory) -> None:
        if len(self._nodes) >= LIMIT:
            raise OSError(errno.ENOSPC, f"more than {LIMIT} directories")
        handles = []
        for position in range(len(directory.lowers)):
            try:
                fd = self._filesystem._lower_fd(directory, position)
            except OSError:
                continue  # it is gone, or another mount's place: nothing of it is shown
            try:
                self._group.mark(fd)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.ENOENT):
                    continue  # we can't list it: its names come from nowhere else
                raise
            handles.append(_handle(fd))
        for handle in self._handles.get(directory.number, ()):
            if handle not in handles and self._nodes.get(handle) == directory.number:
                del self._nodes[handle]
        self._handles[directory.number] = handles
        for handle in handles:
            self._nodes[handle] = directory.number

    def group_with_room(self) -> int:
        """The queue's descriptor, for who marks a new directory itself and says so to `marked`; -1:
        that is for `add`."""
        return self._group.fd if self.working and len(self._nodes) < LIMIT else -1

    def marked(self, number: int, handle: bytes) -> None:
        """A directory that is new, and that one lower has, is watched (with `fanotify.WATCHED`)."""
        self._handles[number] = [handle]
        self._nodes[handle] = number

    def _give_up(self, error: OSError) -> None:
        """What was promised stays watched; nothing new is believed for long."""
        if self._filesystem.lower_timeout != self._short:
            logger.info("lower is watched no further: %s", error.strerror)
            self._filesystem.lower_timeout = self._short

    # --- what fanotify tells ---------------------------------------------------------------------

    def read(self) -> None:
        """Take all events and tell the kernel what they are about."""
        while True:
            events = self._group.read()
            if not events:
                return
            words: dict[_Word, None] = {}
            for event in events:
                if event.overflow:
                    self._all_changed(words)
                    continue
                self._words(event, words)
            due = time.monotonic() + AGAIN
            for word in words:
                self._tell(word)
                self._again.append((due, word))

    def repeat(self) -> float | None:
        """Make the invalidations that are due again; returns when the next one is, in seconds."""
        now = time.monotonic()
        while self._again:
            due, word = self._again[0]
            if due > now:
                return due - now
            self._again.popleft()
            self._tell(word)
        return None

    def _words(self, event: fanotify.Event, words: dict[_Word, None]) -> None:
        number = self._nodes.get(event.directory)
        if number is None:
            return
        if event.name in (b"", b"."):
            words[(number, None, True)] = None
            self._look_up_again(self._node(number), words)
            return
        if event.mask & fanotify.NAMES:
            words[(number, event.name, False)] = None
            words[(number, None, False)] = None
        child = self._child(number, event.name)
        if child is not None:
            only = not event.mask & syscalls.FAN_MODIFY
            words[(child.number, None, only)] = None
            if not only and self._filesystem.writeback:
                words[(number, event.name, False)] = None  # the kernel has to look it up again
            self._look_up_again(child, words)

    def _look_up_again(self, node: Node | None, words: dict[_Word, None]) -> None:
        """Under the secrets rule a change of its mode may hide a directory, or show it: the kernel
        drops the name with all that it knows below, and asks."""
        if self._filesystem.secrets is None or node is None or node.kind != stat.S_IFDIR:
            return
        parent = node.parent
        if parent is not None:
            words[(node.number, None, False)] = None  # its entries are cached, too
            words[(parent.number, node.name, False)] = None

    def _node(self, number: int) -> Node | None:
        with self._filesystem.lock:
            return self._filesystem.table.nodes.get(number)

    def _child(self, number: int, name: bytes) -> Node | None:
        with self._filesystem.lock:
            directory = self._filesystem.table.nodes.get(number)
            children = getattr(directory, "children", None)
            child: Node | None = None if children is None else children.get(name)
            # What upper has isn't changed by lower.
            return None if child is None or child.layer == 0 else child

    def _all_changed(self, words: dict[_Word, None]) -> None:
        logger.warning("events of lower were lost: everything from it is looked up anew")
        with self._filesystem.lock:
            for node in list(self._filesystem.table.nodes.values()):
                if node.layer != 0:
                    words[(node.number, None, False)] = None
                    if node.parent is not None:
                        words[(node.parent.number, node.name, False)] = None
        self._give_up(OSError(errno.EOVERFLOW, "events were lost"))

    def _tell(self, word: _Word) -> None:
        if self.kernel is None:
            return
        node, name, attributes_only = word
        if name is None:
            self.kernel.invalidate_inode(node, attributes_only)
        else:
            self.kernel.invalidate_entry(node, name)


def _handle(fd: int) -> bytes:
    """The handle by which events name a directory."""
    try:
        return syscalls.name_to_handle_at(fd, b"", syscalls.AT_EMPTY_PATH)[0]
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    # Linux >= 6.5: what can't be opened by its handle (overlayfs) has one for events all the same.
    return syscalls.name_to_handle_at(fd, b"", syscalls.AT_EMPTY_PATH | _AT_HANDLE_FID)[0]


def _refuse_remote(filesystem: Filesystem) -> None:
    """Changes made by other hosts are told to nobody here: there, time-outs do."""
    from mount_helpers.mountinfo import is_remote, read_mounts

    devices = {layer.dev for number, layer in filesystem.layers.items() if number}
    for mount in read_mounts():
        if is_remote(mount.fstype) and os.makedev(*mount.device) in devices:
            raise OSError(errno.EOPNOTSUPP, f"{mount.fstype} tells nothing of other hosts' changes")
