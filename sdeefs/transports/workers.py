"""Threads for what takes long: started when first needed, a bounded number, ended together."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from sdeefs.transports.scheduling import Scheduling

log = logging.getLogger(__name__)

Job = Callable[[], None]


class Workers:
    """A pool. Jobs start in the order in which they came; one that hasn't begun can be taken back."""

    def __init__(
        self, limit: int, scheduling: Scheduling | None = None, name: str = "worker"
    ) -> None:
        self._limit = max(1, limit)
        self._name = name
        self._scheduling = scheduling or Scheduling.here()
        self._jobs: deque[tuple[int, Job]] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._idle = 0
        self._ended = False
        self._threads: list[threading.Thread] = []

    def submit(self, key: int, job: Job) -> None:
        """Have a thread call `job`, which must not raise. After `end()` it is dropped.

        Where there is no thread and none can be started (a limit of processes), it is done here.
        """
        with self._changed:
            if self._ended:
                return
            if self._idle > len(self._jobs):
                self._jobs.append((key, job))
                self._changed.notify()
                return
            if len(self._threads) >= self._limit or self._start_thread() or self._threads:
                self._jobs.append((key, job))
                return
        job()

    def _start_thread(self) -> bool:
        """One more thread, unless that is refused. The lock is held, for which it waits."""
        thread = threading.Thread(
            target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            return False
        self._threads.append(thread)
        return True

    def take_back(self, key: int) -> bool:
        """Remove a job that no thread has begun. False: it has begun, is done, or never was."""
        with self._changed:
            for item in self._jobs:
                if item[0] == key:
                    self._jobs.remove(item)
                    return True
        return False

    def end(self, timeout: float | None = None) -> bool:
        """Let what has begun finish, drop the rest. False: something didn't finish in time."""
        with self._changed:
            self._ended = True
            self._jobs.clear()
            self._changed.notify_all()
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(timeout)
        return not any(thread.is_alive() for thread in threads)

    def _work(self) -> None:
        self._scheduling.take()
        while True:
            with self._changed:
                while not self._jobs:
                    if self._ended:
                        return
                    self._idle += 1
                    self._changed.wait()
                    self._idle -= 1
                _, job = self._jobs.popleft()
            try:
                job()
            except Exception:
                log.exception("a request's rest failed")
