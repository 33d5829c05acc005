"""Backing ids: the kernel's names for files that it reads and writes itself (FUSE passthrough).

The kernel allows one backing file per inode at a time, and no mixture of it with the page cache. So
an id is registered with the first handle of a node and serves all others until the last is
released; and a node whose first handle goes through the page cache, because the file was refused (its
filesystem is stacked too deep), stays with it until then. Handles for which the core says so, all of a
node's, aren't noted here. `shortcuts/files.c` does what is plain of this itself.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import threading

from sdeefs.transports import wire

log = logging.getLogger(__name__)

#: In place of an id: this node is read and written by requests while its handles are open.
CACHED = 0


class BackingIds:
    """Of one connection. Handles that never acquired one may be released, too."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._lock = threading.Lock()
        self.uses: dict[int, list[int]] = {}  # by node: the id, and how many handles have it
        self.node_of: dict[int, int] = {}  # by handle
        self._refused: set[int] = set()

    def acquire(self, node: int, handle: int, backing: int | None) -> int:
        """The id for one more handle of a node, or CACHED. `backing` None: CACHED is wanted (beside
        handles with an id the kernel refuses such an open, with EIO: never another file's data)."""
        if backing is None:
            return CACHED
        with self._lock:
            use = self.uses.get(node)
            if use is None:
                use = self.uses[node] = [self._register(backing), 0]
            use[1] += 1
            self.node_of[handle] = node
            return use[0]

    def release(self, handle: int) -> None:
        """A handle is closed."""
        if handle not in self.node_of:
            return
        with self._lock:
            node = self.node_of.pop(handle)
            use = self.uses[node]
            use[1] -= 1
            if use[1]:
                return
            del self.uses[node]
            if use[0] != CACHED:
                self._close(use[0])

    def forget_all(self) -> None:
        """The connection is gone, and the ids with it."""
        with self._lock:
            self.uses.clear()
            self.node_of.clear()

    def __len__(self) -> int:
        return len(self.uses)

    def _register(self, backing: int) -> int:
        # A mutable buffer: with it fcntl.ioctl() returns the ioctl's own value, the id.
        argument = bytearray(wire.BACKING_MAP.pack(backing, 0, 0))
        try:
            return int(fcntl.ioctl(self._device, wire.DEV_IOC_BACKING_OPEN, argument, True))
        except OSError as error:
            number = error.errno or errno.EIO
            if number not in self._refused:
                self._refused.add(number)
                log.info("no passthrough for some files: %s", error.strerror)
            return CACHED

    def _close(self, backing_id: int) -> None:
        try:
            fcntl.ioctl(self._device, wire.DEV_IOC_BACKING_CLOSE, wire.BACKING_ID.pack(backing_id))
        except OSError:
            pass  # the connection is gone
