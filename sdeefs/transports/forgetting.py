"""FORGET, in a thread of its own: nobody waits for it, and closing a removed object's last descriptor
frees its blocks. Readers that are bound to their caller's CPU would take that time from the caller.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from sdeefs.transports import wire
from sdeefs.transports.requests import Body, Handler, Reply
from sdeefs.transports.scheduling import Scheduling

log = logging.getLogger(__name__)

#: Seconds between two looks at what came: each wake-up would take a CPU from those who work.
PAUSE = 0.01
#: So many requests may wait; beyond, their reader sees to them itself.
_LIMIT = 4096


class Forgetter:
    """Takes over the requests that have no answer."""

    def __init__(self, scheduling: Scheduling | None = None) -> None:
        self._scheduling = scheduling or Scheduling.here()
        self._jobs: deque[Callable[[], Reply]] = deque()
        self._some = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="forgetter", daemon=True)

    def take_over(self, handlers: list[Handler]) -> None:
        """From now on the thread calls those of FORGET. Where none can be started (a limit of
        processes), all stays as it is."""
        try:
            self._thread.start()
        except RuntimeError:
            return
        for opcode in (wire.Opcode.FORGET, wire.Opcode.BATCH_FORGET):
            handlers[opcode] = self._instead_of(handlers[opcode])

    def end(self, timeout: float = 5.0) -> None:
        """End the thread, if it does in so many seconds; what waits is dropped with the connection."""
        self._ended.set()
        self._some.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _instead_of(self, handler: Handler) -> Handler:
        jobs, some = self._jobs, self._some

        def take(node: int, body: Body, uid: int, gid: int, pid: int) -> Reply:
            if len(jobs) >= _LIMIT or self._ended.is_set():
                return handler(node, body, uid, gid, pid)
            jobs.append(lambda: handler(node, body, uid, gid, pid))
            if not some.is_set():
                some.set()
            return None

        return take

    def _work(self) -> None:
        self._scheduling.take()
        while True:
            self._some.wait()
            if self._ended.wait(PAUSE):
                return
            self._some.clear()
            while self._jobs and not self._ended.is_set():
                try:
                    self._jobs.popleft()()
                except OSError as error:
                    log.debug("forgetting: %s", error)
                except Exception:
                    log.exception("a request failed")
