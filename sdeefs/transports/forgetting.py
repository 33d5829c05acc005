"""FORGET, in a thread of its own: nobody waits for it, and closing a removed object's last descriptor
frees its blocks. Readers that are bound to their caller's CPU would take that time from the caller.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from sdeefs.transports.requests import Body, Handler, Reply
from sdeefs.transports.scheduling import Scheduling

log = logging.getLogger(__name__)

#: Seconds between two looks at what came: each wake-up would take a CPU from those who work.
PAUSE = 0.01
#: So many requests may wait; beyond, their reader sees to them itself.
_LIMIT = 4096


class Forgetter:
    """Takes over requests that have no answer; the thread starts with the first one."""

    def __init__(self, scheduling: Scheduling | None = None) -> None:
        self._scheduling = scheduling or Scheduling.here()
        self._jobs: deque[Callable[[], Reply]] = deque()
        self._some = threading.Event()
        self._ended = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def instead_of(self, handler: Handler) -> Handler:
        """A handler that has `handler` called by the thread."""
        jobs, some = self._jobs, self._some

        def take(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
            if len(jobs) >= _LIMIT or self._ended.is_set():
                return handler(node, body, uid, gid, pid)
            jobs.append(lambda: handler(node, body, uid, gid, pid))
            if not some.is_set():
                some.set()
                if self._thread is None:
                    self._start()
            return None

        return take

    def end(self, timeout: float = 5.0) -> bool:
        """End the thread; what waits is dropped with the connection. False: it is stuck."""
        self._ended.set()
        self._some.set()
        thread = self._thread
        if thread is None:
            return True
        thread.join(timeout)
        return not thread.is_alive()

    def _start(self) -> None:
        with self._starting:
            if self._thread is not None:
                return
            thread = threading.Thread(target=self._work, name="forgetter", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads: the readers do it all
                self._ended.set()
                self._drain()
                return
            self._thread = thread

    def _work(self) -> None:
        self._scheduling.take()
        while True:
            self._some.wait()
            if self._ended.wait(PAUSE):
                return
            self._some.clear()
            self._drain()

    def _drain(self) -> None:
        jobs = self._jobs
        while jobs and not (self._thread is not None and self._ended.is_set()):
            job = jobs.popleft()
            try:
                job()
            except OSError as error:
                log.debug("forgetting: %s", error)
            except Exception:
                log.exception("a request failed")
