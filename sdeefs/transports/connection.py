"""One FUSE connection: what the device and the ring transports have in common.

It owns the descriptor of /dev/fuse, answers INIT, and holds what lives as long as the connection:
counters, backing ids, worker threads, the notifier.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import threading

from mount_helpers import fuse
from sdeefs.core.api import Operations
from sdeefs.transports import wire
from sdeefs.transports.backing import BackingIds
from sdeefs.transports.negotiate import Agreement, agree, may_register_backing
from sdeefs.transports.notifier import Notifier
from sdeefs.transports.requests import Deferred, Features, Handler, handlers
from sdeefs.transports.scheduling import Scheduling
from sdeefs.transports.shortcuts import shorten
from sdeefs.transports.transport import PASSTHROUGH, WRITEBACK, TransportOptions
from sdeefs.transports.workers import Workers

log = logging.getLogger(__name__)

_OPCODE_NAMES = {int(opcode): opcode.name.lower() for opcode in wire.Opcode}

#: What read(2) and write(2) say when the connection is over.
GONE = (errno.ENODEV, errno.ENOTCONN, errno.ECONNABORTED, errno.EBADF)


def error_number(error: OSError) -> int:
    """An errno that the protocol can carry."""
    number = error.errno or errno.EIO
    return number if 0 < number < 512 else errno.EIO


def caller_is_killed(pid: int) -> bool:
    """Whether SIGKILL is pending for a thread: its caller won't miss the answer."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith(("SigPnd:", "ShdPnd:")) and int(line.split()[1], 16) & 1 << 8:
                    return True
    except OSError:
        return False
    return False


def abort_connection(device: int) -> bool:
    """Have the kernel give a connection up: every caller and every reader gets an error.

    False where that isn't permitted: then it lasts until its last descriptor is closed.
    """
    # A connection that is gone still tells its number, which may be another mount's by now.
    poll = select.poll()
    poll.register(device, 0)
    if any(events & select.POLLERR for _, events in poll.poll(0)):
        return True
    try:
        with open(f"/proc/self/fdinfo/{device}", encoding="ascii") as file:  # Linux >= 6.6
            numbers = [line.split()[1] for line in file if line.startswith("fuse_connection:")]
    except OSError:
        return False
    if not numbers:
        return False
    try:
        return fuse.abort_connection(int(numbers[0]))
    except OSError as error:
        log.debug("can't abort the connection: %s", error)
        return False


class Connection:
    """See the module. Subclasses serve the requests."""

    name = "device"
    _max_write: int
    _over_io_uring = False

    def __init__(
        self, operations: Operations, fuse_fd: int, options: TransportOptions | None = None
    ) -> None:
        self._operations = operations
        self._fd = fuse_fd
        self._options = options or TransportOptions()
        self._max_write = self._options.max_write
        self._counts: list[list[int]] = []
        self._agreement: Agreement | None = None
        self._handlers: list[Handler] = []
        self._backing_ids: BackingIds | None = None
        self._scheduling = Scheduling.here()
        self._workers = Workers(self._options.workers, self._scheduling)
        self._notifier = Notifier(fuse_fd, self._scheduling)
        self._waiting: dict[int, int] = {}  # unique -> pid, of requests that wait for a worker
        self._stopping = threading.Event()
        self._over = threading.Event()
        self._ending = threading.Lock()  # stop() and the end of run() don't meet
        self._descriptors = [fuse_fd]
        # What the device's numbers become at the end, when none may be left to open it.
        self._nothing = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)

    # What the session asks

    @property
    def data_path(self) -> str:
        return self._agreement.data_path if self._agreement else "plain"

    def connected(self) -> bool:
        return self._agreement is not None and not self._over.is_set()

    def counters(self) -> dict[str, int]:
        return self._sum(self._counts)

    @staticmethod
    def _sum(lists: list[list[int]]) -> dict[str, int]:
        sums = [sum(column) for column in zip(*lists, strict=True)]
        return {
            _OPCODE_NAMES.get(opcode, str(opcode)): count
            for opcode, count in enumerate(sums)
            if count
        }

    def write_back(self, node: int) -> None:
        """Wait until the kernel has written back a file's dirty pages."""
        self._notifier.write_back(node)

    def invalidate_inode(self, node: int, attributes_only: bool = False) -> None:
        self._notifier.invalidate_inode(node, attributes_only)

    def invalidate_entry(self, parent: int, name: bytes) -> None:
        self._notifier.invalidate_entry(parent, name)

    def negotiate(self) -> None:
        """Read INIT, answer it, and tell the core what was agreed."""
        request = os.read(self._fd, max(wire.MIN_READ_BUFFER, self._max_write + 4096))
        _, opcode, unique, _, _, _, _, _, _ = wire.IN_HEADER.unpack_from(request)
        if opcode != wire.Opcode.INIT:
            raise OSError(errno.EPROTO, f"the first request isn't INIT but {opcode}", "/dev/fuse")
        offer = wire.unpack_init(request[wire.IN_HEADER.size :])
        try:
            agreement = agree(
                offer,
                self._options,
                may_register_backing(),
                self._max_write,
                self._over_io_uring,
                bool(getattr(self._operations, "exports", False)),
            )
        except OSError:
            os.write(self._fd, wire.OUT_HEADER.pack(16, -errno.EPROTO, unique))
            raise
        if self._over_io_uring and not agreement.over_io_uring:
            os.write(self._fd, wire.OUT_HEADER.pack(16, -errno.EPROTO, unique))
            raise OSError(errno.EOPNOTSUPP, "the kernel doesn't offer io_uring for FUSE")
        self._prepare(agreement)
        body = wire.pack_init(agreement.answer)
        os.write(self._fd, wire.OUT_HEADER.pack(16 + len(body), 0, unique) + body)
        self._agreement = agreement

    def _prepare(self, agreement: Agreement) -> None:
        operations = self._operations
        operations.kernel = self
        operations.passthrough = agreement.data_path == PASSTHROUGH
        operations.writeback = agreement.data_path == WRITEBACK
        operations.killpriv = bool(agreement.flags & wire.HANDLE_KILLPRIV_V2)
        if operations.passthrough:
            self._backing_ids = BackingIds(self._fd)
        features = Features(
            flush=self._options.flush,
            setxattr_ext=bool(agreement.flags & wire.SETXATTR_EXT),
            writeback=operations.writeback,
            no_opendir=bool(agreement.flags & wire.NO_OPENDIR_SUPPORT),
        )
        table = handlers(operations, features, self._backing_ids, self._interrupt)
        if self._options.shortcuts:
            table = shorten(operations, table, self._backing_ids, features, self._fd)
        self._handlers = table

    # For subclasses

    def _new_counts(self) -> list[int]:
        """One thread's counters: a list of its own, so that no increment is lost."""
        counts = [0] * wire.OPCODES
        self._counts.append(counts)
        return counts

    def _later(self, fd: int, unique: int, pid: int, deferred: Deferred) -> None:
        """Have a worker finish a request that came through `fd`."""

        def job() -> None:
            self._waiting.pop(unique, None)
            self._reply(fd, unique, *finish(deferred))

        self._waiting[unique] = pid
        self._workers.submit(unique, job)

    def _reply(self, fd: int, unique: int, error: int, body: bytes) -> None:
        try:
            os.writev(fd, (wire.OUT_HEADER.pack(16 + len(body), -error, unique), body))
        except OSError as failed:
            note_reply_failed(failed)

    def _interrupt(self, unique: int) -> None:
        """A signal for a caller. Only one that is killed has its request dropped, and only if it
        hasn't begun: what programs do on Linux's own filesystems isn't interrupted by less."""
        pid = self._waiting.get(unique)
        if pid is not None and caller_is_killed(pid) and self._workers.take_back(unique):
            self._waiting.pop(unique, None)
            self._drop(unique)

    def _drop(self, unique: int) -> None:
        """Answer EINTR to a request whose caller is killed."""

    def _wind_up(self) -> None:
        """After the last request: end the helpers and close the device, by which the kernel
        aborts the connection if it is still there."""
        with self._ending:
            self._over.set()
        # Where it may, before the descriptors are closed: a notification that waits in the kernel
        # for a request that nobody answers any more holds the device open.
        abort_connection(self._fd)
        ended = self._workers.end(5)
        # A thread of ours that hangs may still use a number: it must not become another file's.
        for fd in self._descriptors:
            os.dup2(self._nothing, fd, inheritable=False)
        os.close(self._nothing)
        ended = self._notifier.end() and ended
        if self._backing_ids is not None:
            self._backing_ids.forget_all()
        if ended:
            for fd in self._descriptors:
                os.close(fd)
        self._descriptors = []


def finish(deferred: Deferred) -> tuple[int, bytes]:
    """(errno, reply) of what takes long."""
    try:
        return 0, deferred.finish()
    except OSError as error:
        return error_number(error), b""
    except Exception:
        log.exception("a request failed")
        return errno.EIO, b""


def note_reply_failed(failed: OSError) -> None:
    """ENOENT: the caller was killed meanwhile. Else it is worth a line."""
    if failed.errno != errno.ENOENT and failed.errno not in GONE:
        log.error("the kernel refused an answer: %s", failed.strerror)
