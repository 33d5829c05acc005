"""The ring transport: FUSE over io_uring, a pinned thread for each CPU, the handlers of the device.

FORGET, INTERRUPT and what the kernel sends before the rings are ready come through the device as
ever: one classic reader stays, in no hurry.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import threading

from sdeefs.core.api import Operations
from sdeefs.transports import wire
from sdeefs.transports._ring import Ring
from sdeefs.transports.connection import GONE, Connection, error_number, finish, note_reply_failed
from sdeefs.transports.forgetting import PAUSE
from sdeefs.transports.requests import Deferred
from sdeefs.transports.ring import RingPlan, plan_here
from sdeefs.transports.transport import TransportOptions

log = logging.getLogger(__name__)

#: How a ring ends when the connection does.
_ENDS = (0, errno.ENOTCONN, errno.ECONNABORTED, errno.ENODEV, errno.ECANCELED)


class RingTransport(Connection):
    """See the module; the methods are those of `transport.Transport`."""

    name = "ring"
    _over_io_uring = True

    def __init__(
        self, operations: Operations, fuse_fd: int, options: TransportOptions | None = None
    ) -> None:
        super().__init__(operations, fuse_fd, options)
        self._max_write = self._options.ring_max_write
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._rings: list[Ring] = []
        self._failed: OSError | None = None
        self._drops: dict[int, tuple[Ring, int]] = {}  # unique -> where it waits

    def run(self) -> None:
        threads: list[threading.Thread] = []
        try:
            if self._agreement is None:
                self.negotiate()
            os.set_blocking(self._fd, False)
            for part in plan_here():
                ring = self._ring(part)
                self._rings.append(ring)
                threads.append(
                    threading.Thread(
                        target=self._serve, args=(ring,), name=f"ring-{part.cpu}", daemon=True
                    )
                )
            for thread in threads:
                thread.start()
            self._read_classic()
        finally:
            for ring in self._rings:
                ring.stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            self._wind_up()
            with self._ending:
                os.close(self._wake)
                self._wake = -1
        if self._failed is not None:
            raise self._failed

    def stop(self) -> None:
        with self._ending:
            self._stopping.set()
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def counters(self) -> dict[str, int]:
        return self._sum([*self._counts, *[ring.counts() for ring in self._rings]])

    def _ring(self, part: RingPlan) -> Ring:
        ring: Ring

        def later(index: int, unique: int, pid: int, deferred: Deferred) -> None:
            def job() -> None:
                self._waiting.pop(unique, None)
                self._drops.pop(unique, None)
                ring.answer(index, *finish(deferred))

            self._waiting[unique] = pid
            self._drops[unique] = (ring, index)
            self._workers.submit(unique, job)

        ring = Ring(
            fuse_fd=self._fd,
            cpu=part.cpu,
            queues=list(part.queues),
            depth=self._options.ring_depth,
            payload_size=max(self._max_write, wire.MIN_READ_BUFFER),
            handlers=self._handlers,
            later=later,
            fault=_log_fault,
        )
        return ring

    def _drop(self, unique: int) -> None:
        place = self._drops.pop(unique, None)
        if place is not None:
            place[0].answer(place[1], errno.EINTR, b"")

    def _serve(self, ring: Ring) -> None:
        """A ring's thread. When one ends, so does all."""
        self._scheduling.answer_callers()
        try:
            number = ring.run()
            if number not in _ENDS:
                self._failed = OSError(number, f"FUSE over io_uring: {os.strerror(number)}")
        except OSError as error:
            self._failed = OSError(error.errno, f"FUSE over io_uring: {error.strerror}")
        finally:
            self.stop()

    def _read_classic(self) -> None:
        fd = self._fd
        buffer = bytearray(max(wire.MIN_READ_BUFFER, self._max_write + 4096))
        counts = self._new_counts()
        waiting = select.poll()
        waiting.register(fd, select.POLLIN)
        waiting.register(self._wake, select.POLLIN)
        pause = select.poll()
        pause.register(self._wake, select.POLLIN)
        while True:
            waiting.poll()
            while True:
                if self._stopping.is_set():
                    return
                try:
                    length = os.readv(fd, [buffer])
                except OSError as error:
                    if error.errno == errno.EAGAIN:
                        break
                    if error.errno in (errno.ENOENT, errno.EINTR):
                        continue
                    if error.errno not in GONE:
                        log.error("reading requests: %s", error.strerror)
                    return
                self._answer_classic(fd, bytes(memoryview(buffer)[:length]), counts)
            pause.poll(int(PAUSE * 1000))

    def _answer_classic(self, fd: int, request: bytes, counts: list[int]) -> None:
        _, opcode, unique, node, uid, gid, pid, _, _ = wire.IN_HEADER.unpack_from(request)
        reply: object = None
        number = 0
        try:
            counts[opcode] += 1
            reply = self._handlers[opcode](node, request[wire.IN_HEADER.size :], uid, gid, pid)
        except OSError as error:
            number = error_number(error)
        except IndexError:
            number = errno.ENOSYS
        except Exception as error:
            _log_fault(opcode, error)
            number = errno.EIO
        if isinstance(reply, int):
            number = reply
        if isinstance(reply, Deferred):
            self._later(fd, unique, pid, reply)
        elif isinstance(reply, bytes):
            self._reply(fd, unique, 0, reply)
        elif number and opcode not in (
            wire.Opcode.FORGET,
            wire.Opcode.BATCH_FORGET,
            wire.Opcode.INTERRUPT,
        ):
            try:
                os.write(fd, wire.OUT_HEADER.pack(16, -number, unique))
            except OSError as error:
                note_reply_failed(error)


def _log_fault(opcode: int, error: BaseException) -> None:
    log.error("request %d failed", opcode, exc_info=error)
