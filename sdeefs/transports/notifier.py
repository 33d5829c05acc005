"""Notifications to the kernel, in a thread of their own.

Invalidating a name takes the lock of its directory in the kernel, which a request under way may
hold: the thread that serves that request must never wait for it. So whoever asks only leaves word
here. What is asked twice before it was done is done once.

If the server is killed while this thread waits so, in an uninterruptible sleep, the process can't end
and its mount hangs until the connection is aborted (`umount --force`, `sdeefs umount`).
"""

from __future__ import annotations

import errno
import logging
import os
import threading

from sdeefs.transports import wire
from sdeefs.transports.scheduling import Scheduling

log = logging.getLogger(__name__)

_Key = tuple[int, bytes | None, bool]


class Notifier:
    """Writes invalidations to the device; the thread starts with the first one."""

    def __init__(self, device: int, scheduling: Scheduling | None = None) -> None:
        self._scheduling = scheduling or Scheduling.here()
        self.device = device
        self._waiting: dict[_Key, None] = {}
        self._changed = threading.Condition(threading.Lock())
        self._thread: threading.Thread | None = None
        self._ended = False

    def invalidate_inode(self, node: int, attributes_only: bool = False) -> None:
        self._add((node, None, attributes_only))

    def invalidate_entry(self, parent: int, name: bytes) -> None:
        self._add((parent, name, False))

    def write_back(self, node: int) -> None:
        """Have the kernel write back (and drop) a file's pages, and wait for it: only for worker
        threads, since the writes are requests of this mount."""
        self._write(wire.inval_inode(node, 0, 0))

    def end(self, timeout: float = 5.0) -> bool:
        """Drop what waits and end the thread; the connection must be gone by now, or a
        notification that waits for a request would be waited for here. False: it is stuck."""
        with self._changed:
            self._ended = True
            self._waiting.clear()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)
            return not thread.is_alive()
        return True

    def _add(self, key: _Key) -> None:
        with self._changed:
            if self._ended:
                return
            self._waiting[key] = None
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="notifier", daemon=True)
                self._thread.start()
            else:
                self._changed.notify()

    def _work(self) -> None:
        self._scheduling.take()
        # Who has its answer may ask again at once, and must not be told what the kernel had cached.
        self._scheduling.answer_callers()
        while True:
            with self._changed:
                while not self._waiting:
                    if self._ended:
                        return
                    self._changed.wait()
                key = next(iter(self._waiting))
                del self._waiting[key]
            node, name, attributes_only = key
            if name is None:
                self._write(wire.inval_inode(node, -1 if attributes_only else 0, 0))
            else:
                self._write(wire.inval_entry(node, name))

    def _write(self, message: bytes) -> None:
        try:
            os.write(self.device, message)
        except OSError as error:
            # ENOENT: the kernel doesn't know it. ENODEV and ENOTCONN: the mount is gone.
            # ENOTDIR, ENOTEMPTY, EBUSY: something is mounted there or it has become another thing.
            if error.errno not in (
                errno.ENOENT, errno.ENODEV, errno.ENOTCONN, errno.ECONNABORTED,
                errno.ENOTDIR, errno.ENOTEMPTY, errno.EBUSY, errno.EPERM, errno.EBADF,
            ):  # fmt: skip
                log.warning("the kernel refused an invalidation: %s", error.strerror)
