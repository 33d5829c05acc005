"""FORGET, in a thread of its own: nobody waits for it, and closing a removed object's last descriptor
frees its blocks. Readers that are bound to their caller's CPU would take that time from the caller.
"""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from sdeefs.transports.requests import Handler
from sdeefs.transports.scheduling import Scheduling

log = logging.getLogger(__name__)

#: Seconds between two looks at what came: each wake-up would take a CPU from those who work.
PAUSE = 0.01


class Source(Protocol):
    """Where the readers leave what is to be forgotten, as long as that is wanted (`_device.Device`)."""

    def keep_forgets(self, wanted: bool, /) -> None: ...

    def wait_for_forgets(self, pause: float, /) -> bytes | None: ...


class Forgetter:
    """Sees to the requests that have no answer."""

    def __init__(
        self, source: Source, batch_forget: Handler, scheduling: Scheduling | None = None
    ) -> None:
        self._source = source
        self._handler = batch_forget
        self._scheduling = scheduling or Scheduling.here()
        self._thread = threading.Thread(target=self._work, name="forgetter", daemon=True)

    def start(self) -> None:
        """From now on the thread does it. Where none can be started (a limit of processes), readers
        go on doing it."""
        self._source.keep_forgets(True)
        try:
            self._thread.start()
        except RuntimeError:
            self._source.keep_forgets(False)

    def end(self, timeout: float = 5.0) -> None:
        """End the thread, if it does in so many seconds; what waits is dropped with the connection."""
        self._source.keep_forgets(False)
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _work(self) -> None:
        self._scheduling.take()
        while (body := self._source.wait_for_forgets(PAUSE)) is not None:
            try:
                self._handler(0, body, 0, 0, 0)
            except OSError as error:
                log.debug("forgetting: %s", error)
            except Exception:
                log.exception("a request failed")
