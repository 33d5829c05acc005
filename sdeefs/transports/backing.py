"""Backing ids: the kernel's names for files that it reads and writes itself (FUSE passthrough).

The kernel allows one backing file per inode at a time, and no mixture of it with the page cache. So
an id is registered with the first handle of a node and serves all others until the last is
released; and a node whose first handle goes through the page cache, because the core says so or
the file was refused (its filesystem is stacked too deep), stays with it until then.
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


class _Use:
    __slots__ = ("backing_id", "handles")

    def __init__(self, backing_id: int) -> None:
        self.backing_id = backing_id
        self.handles = 1


class BackingIds:
    """Of one connection. Handles that never acquired one may be released, too."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._uses: dict[int, _Use] = {}
        self._node_of: dict[int, int] = {}
        self._refused: set[int] = set()

    def acquire(self, node: int, handle: int, backing: int | None) -> int:
        """The id for one more handle of a node, or CACHED. `backing` None: CACHED is wanted."""
        with self._lock:
            use = self._uses.get(node)
            if use is None:
                backing_id = CACHED if backing is None else self._register(backing)
                use = self._uses[node] = _Use(backing_id)
            elif backing is None and use.backing_id != CACHED:
                return CACHED  # the kernel refuses this open (EIO): never another file's data
            else:
                use.handles += 1
            self._node_of[handle] = node
            return use.backing_id

    def release(self, handle: int) -> None:
        """A handle is closed."""
        if handle not in self._node_of:
            return
        with self._lock:
            node = self._node_of.pop(handle)
            use = self._uses[node]
            use.handles -= 1
            if use.handles:
                return
            del self._uses[node]
            if use.backing_id != CACHED:
                self._close(use.backing_id)

    def forget_all(self) -> None:
        """The connection is gone, and the ids with it."""
        with self._lock:
            self._uses.clear()
            self._node_of.clear()

    def __len__(self) -> int:
        return len(self._uses)

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
