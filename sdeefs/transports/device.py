"""The device transport: threads that read requests from /dev/fuse and write the answers.

Each thread has a descriptor of its own (FUSE_DEV_IOC_CLONE), so that they don't meet on one queue
of answers. Their loop is in C where that is built (and follows a lone caller to its CPU:
`_following.h`), else here. They block in read(2), where the kernel wakes exactly one for each request,
and nothing but the end of the connection wakes them otherwise: `stop()` aborts it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading

from sdeefs.core.api import Operations
from sdeefs.transports import wire
from sdeefs.transports.connection import (
    GONE,
    Connection,
    abort_connection,
    error_number,
    note_reply_failed,
)
from sdeefs.transports.forgetting import Forgetter
from sdeefs.transports.mount_device import open_device
from sdeefs.transports.transport import TransportOptions

log = logging.getLogger(__name__)

try:
    from sdeefs.transports._device import Device
except ImportError:
    Device = None

_WRITE = int(wire.Opcode.WRITE)
#: Answers longer than this are written from two buffers, not copied into one.
_JOIN = 4096


def clone_device(device: int) -> int:
    """One more descriptor of the same connection, with a queue of its own for answers."""
    try:
        clone = open_device()
    except OSError:  # none in this root: the same queue has to do
        return os.dup(device)
    try:
        fcntl.ioctl(clone, wire.DEV_IOC_CLONE, wire.BACKING_ID.pack(device))
    except OSError:
        os.close(clone)
        return os.dup(device)
    return clone


class DeviceTransport(Connection):
    """See the module; the methods are those of `transport.Transport`."""

    name = "device"

    def __init__(
        self, operations: Operations, fuse_fd: int, options: TransportOptions | None = None
    ) -> None:
        super().__init__(operations, fuse_fd, options)
        self._finished = threading.Event()
        self._serving = 0
        self._loop: Device | None = None
        self._forgetter: Forgetter | None = None

    def run(self) -> None:
        """Serve until the mount is gone or `stop()`."""
        try:
            if self._agreement is None:
                self.negotiate()
            for _ in range(1, max(1, self._options.threads)):
                self._descriptors.append(clone_device(self._fd))
            self._serving = len(self._descriptors)
            if Device is not None and self._options.shortcuts:
                self._loop = self._loop_in_c()
                self._forgetter = Forgetter(
                    self._loop, self._handlers[wire.Opcode.BATCH_FORGET], self._scheduling
                )
                self._forgetter.start()
            for i, fd in enumerate(self._descriptors):
                threading.Thread(
                    target=self._serve_one, args=(fd,), name=f"device-{i}", daemon=True
                ).start()
            self._finished.wait()
        finally:
            if self._forgetter is not None:
                self._forgetter.end()
            self._wind_up()

    def stop(self) -> None:
        """See `transport.Transport`. Where the kernel lets nobody abort the connection, the
        readers stay blocked, and the connection lasts until the process ends."""
        with self._ending:
            if self._stopping.is_set() or self._over.is_set():
                return
            self._stopping.set()
            if not abort_connection(self._fd):
                self._finished.set()

    def counters(self) -> dict[str, int]:
        return self._sum([*self._counts, *([self._loop.counts()] if self._loop else [])])

    def _serve_one(self, fd: int) -> None:
        try:
            if self._loop is None:
                self._serve(fd)
                return
            self._scheduling.answer_callers()
            number = self._loop.run(fd)
            if number not in GONE:
                log.error("reading requests: %s", os.strerror(number))
        finally:
            with self._ending:
                self._serving -= 1
                if self._serving == 0:
                    self._finished.set()

    def _loop_in_c(self) -> Device:
        size = max(wire.MIN_READ_BUFFER, self._max_write + 4096)
        return Device(size, self._handlers, self._later, _log_fault)

    def _drop(self, unique: int) -> None:
        for fd in self._descriptors:
            try:
                os.write(fd, wire.OUT_HEADER.pack(16, -errno.EINTR, unique))
                return
            except OSError:
                continue  # ENOENT: the request came through another descriptor

    def _serve(self, fd: int) -> None:
        buffer = bytearray(max(wire.MIN_READ_BUFFER, self._max_write + 4096))
        view = memoryview(buffer)
        buffers = [buffer]
        table, counts = self._handlers, self._new_counts()
        unpack, pack = wire.IN_HEADER.unpack_from, wire.OUT_HEADER.pack
        readv, write, writev = os.readv, os.write, os.writev
        while True:
            try:
                length = readv(fd, buffers)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EAGAIN, errno.EINTR):
                    continue  # ENOENT: the request was interrupted while it was handed over
                if error.errno not in GONE:
                    log.error("reading requests: %s", error.strerror)
                return
            if not length:  # /dev/null: the connection was wound up
                return
            _, opcode, unique, node, uid, gid, pid, _, _ = unpack(buffer)
            try:
                counts[opcode] += 1
                # What is written stays in the buffer until it is done; all else is copied out.
                body = view[40:length]
                reply = table[opcode](
                    node,
                    body if opcode == _WRITE else bytes(body),
                    uid,
                    gid,
                    pid,
                )
                if type(reply) is bytes:
                    if len(reply) <= _JOIN:
                        write(fd, pack(16 + len(reply), 0, unique) + reply)
                    else:
                        writev(fd, (pack(16 + len(reply), 0, unique), reply))
                    continue
                if type(reply) is not int:
                    if reply is not None:
                        self._later(fd, unique, pid, reply)
                    continue
                number = reply
            except OSError as error:
                number = error_number(error)
            except IndexError:
                number = errno.ENOSYS if opcode >= wire.OPCODES else errno.EIO
                if number == errno.EIO:
                    log.exception("request %d failed", opcode)
            except Exception:
                log.exception("request %d failed", opcode)
                number = errno.EIO
            try:
                write(fd, pack(16, -number, unique))
            except OSError as error:
                note_reply_failed(error)


def _log_fault(opcode: int, error: BaseException | None) -> None:
    if error is None:
        log.error("the kernel refused an answer: %s", os.strerror(opcode))
    else:
        log.error("request %d failed", opcode, exc_info=error)
