"""A few threads for what leaves the interpreter's lock alone: compressing, hashing, writing.

Results are brought one at a time in the order of the tasks, whichever was done first. The standard
library's executors would do, and take longer to import than most packages to write.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")
_Task = tuple[int, Callable[[bytes], T], bytes]


class Workers(Generic[T]):
    """Threads that are started when there is work for them. One thread gives tasks, and ends with
    `stop`. What a task or `bring` raises is raised by the next `wait`; no later result is brought.
    """

    def __init__(self, threads: int, bring: Callable[[T], object]) -> None:
        self._most, self._bring = threads, bring
        self._threads: list[threading.Thread] = []
        self._tasks: SimpleQueue[_Task[T] | None] = SimpleQueue()
        self._turn = threading.Condition()
        self._given = self._brought = 0
        self._error: BaseException | None = None

    def start(self, work: Callable[[bytes], T], data: bytes) -> None:
        """`work(data)` in one of the threads."""
        if len(self._threads) < self._most:
            thread = threading.Thread(target=self._run, daemon=True)
            thread.start()
            self._threads.append(thread)
        self._tasks.put((self._given, work, data))
        self._given += 1

    def wait(self, most: int = 0) -> None:
        """Until no more than `most` tasks are under way. Raises what one of them raised."""
        if self._given - self._brought <= most and self._error is None:
            return
        with self._turn:
            self._turn.wait_for(lambda: self._given - self._brought <= most or self._error)
            if self._error is not None:
                raise self._error

    def stop(self) -> None:
        """End the threads; tasks that weren't begun are dropped."""
        with self._turn:
            if self._given != self._brought and self._error is None:
                self._error = RuntimeError("stopped")
            self._turn.notify_all()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            number, work, data = task
            try:
                if self._error is None:
                    self._pass_on(number, work(data))
            except BaseException as error:  # the giver's to handle
                with self._turn:
                    self._error = self._error or error
                    self._turn.notify_all()

    def _pass_on(self, number: int, result: T) -> None:
        with self._turn:
            # Tasks are taken in order: those before this one are in other threads' hands.
            self._turn.wait_for(lambda: self._brought == number or self._error)
            if self._error is not None:
                return
        self._bring(result)  # its turn: nobody else is here
        with self._turn:
            self._brought += 1
            self._turn.notify_all()
