"""What other packages use of sdeefs: a server whose mount is handed over, or serving right here.

`start_server()` starts a process with a *detached* mount and gives its descriptor to the caller,
who attaches it where he wants: in another mount namespace, under a root that is being made. The
server ends by itself when its mount is gone everywhere, or on SIGTERM.

`run_server()` is what that process runs; a program that keeps a warm process may fork it and call
this in the child, which spares the start of an interpreter.
"""

from __future__ import annotations

import array
import errno
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from mount_helpers import syscalls
from mount_helpers.fuse import abort_connection
from sdeefs.options import Options, UsageError, parse
from sdeefs.preload import preload
from sdeefs.refusals import Refused, check_layers, check_merged, with_work

__all__ = [
    "Options",
    "Refused",
    "Server",
    "UsageError",
    "parse",
    "preload",
    "receive_server",
    "run_server",
    "serve_at",
    "start_server",
]

_MESSAGE = 1 << 16


@dataclass
class Server:
    """A server process and its mount. The caller owns both descriptors; `stop()` closes them."""

    pid: int
    pidfd: int
    mount_fd: int
    minor: int  # of st_dev, the number of the FUSE connection
    transport: str
    data_path: str
    _child: bool = field(default=True, repr=False)

    def attach(self, target: bytes | str) -> None:
        """Attach the mount at a directory of this mount namespace."""
        syscalls.attach(self.mount_fd, target)

    def release(self) -> None:
        """Close the descriptor of the mount: from here on only where it is attached counts."""
        if self.mount_fd >= 0:
            os.close(self.mount_fd)
            self.mount_fd = -1

    def ended(self, timeout: float = 0) -> bool:
        """Whether the server has ended, waiting for it at most that long (seconds)."""
        if self.pidfd < 0:
            return True
        if not select.select([self.pidfd], [], [], timeout)[0]:
            return False
        if self._child:
            try:
                os.waitpid(self.pid, 0)
            except ChildProcessError:
                pass
        os.close(self.pidfd)
        self.pidfd = -1
        return True

    def flush(self, timeout: float = 30) -> None:
        """Have the kernel write out what it holds for the mount, no longer than that."""
        if self.mount_fd < 0:
            return
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.mount_fd)

        def write_out() -> None:
            try:
                syscalls.syncfs(fd)
            except OSError:
                pass  # the connection is cut, and with it what was held
            finally:
                os.close(fd)

        thread = threading.Thread(target=write_out, daemon=True)
        thread.start()
        thread.join(timeout)

    def stop(self, timeout: float = 10) -> None:
        """End the server: unseen where the mount is gone already, else by SIGTERM, then by force.

        Unmount first, or flush(): what is attached elsewhere is cut off.
        """
        self.release()
        if self.ended(0.2):
            return
        self._signal(signal.SIGTERM)
        if not self.ended(timeout):
            self.abort()

    def abort(self) -> None:
        """Cut the connection and kill the server at once."""
        try:
            abort_connection(self.minor)
        except OSError:
            pass  # not permitted in a user namespace; the kill does the same
        self._signal(signal.SIGKILL)
        self.ended(10)
        self.release()

    def _signal(self, number: signal.Signals) -> None:
        if self.pidfd >= 0:
            try:
                signal.pidfd_send_signal(self.pidfd, number)
            except ProcessLookupError:
                pass


def start_server(
    options: Options,
    *,
    log_file: str | None = None,
    log_level: str = "warning",
    pass_fds: Sequence[int] = (),
    timeout: float = 60,
) -> Server:
    """Start a server in a process of its own; returns when its mount answers.

    Layers may be `/proc/self/fd/N` of descriptors in `pass_fds`; they aren't checked beyond what
    opening them does, but upper and workdir are locked. Raises Refused or UsageError with the
    server's complaint.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sdeefs", "serve", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno(), *pass_fds],
            start_new_session=True,
            cwd="/",
        )
        theirs.close()
        try:
            ours.send(pickle.dumps((options, log_file, log_level)))
            server = receive_server(ours, process.pid, timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        process.returncode = 0  # waited for by Server.ended(), which Popen must not complain of
        return server


def receive_server(channel: socket.socket, pid: int, timeout: float = 60) -> Server:
    """Take over what `run_server()` in process `pid` sends. Raises Refused or UsageError."""
    channel.settimeout(timeout)
    try:
        message, ancillary, _, _ = channel.recvmsg(_MESSAGE, socket.CMSG_SPACE(4))
    except TimeoutError:
        raise Refused(f"the sdeefs server isn't ready after {timeout:g} s") from None
    except ConnectionResetError:
        message, ancillary = b"", []
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    if not message:
        raise Refused("the sdeefs server ended before its mount was usable")
    told = json.loads(message)
    if "error" in told:
        raise (UsageError if told["status"] == 2 else Refused)(told["error"])
    os.set_inheritable(descriptors[0], False)
    return Server(
        pid, os.pidfd_open(pid), descriptors[0], told["minor"], told["transport"], told["data_path"]
    )


def run_server(
    options: Options,
    channel: socket.socket,
    *,
    log_file: str | None = None,
    log_level: str = "warning",
) -> int:
    """Open the layers, mount, hand the mount over on `channel`, and serve until it is gone.

    For a process that does nothing else (signals, umask and capabilities are changed). Returns the
    exit status.
    """
    from sdeefs import log
    from sdeefs.background import FAILURE, complaint, detach
    from sdeefs.session import Session
    from sdeefs.transports.scheduling import favour_own_group

    log.start(log_level, log_file)
    favour_own_group()
    signal.set_wakeup_fd(-1)  # of whoever forked us; trio sets its own, and warns of others
    session = Session(options, None)
    try:
        try:
            session.open()
        except BaseException as error:
            status, line = complaint(error)
            _send(channel, {"status": status, "error": line}, [])
            if not isinstance(error, (OSError, Refused, UsageError)):
                raise
            return FAILURE
        told = {
            "minor": session.minor,
            "transport": session.transport.name,
            "data_path": session.transport.data_path,
        }
        own_log = log_file
        if own_log is None and session.control is not None:
            own_log = str(session.control.directory / f"{session.control.identity}.log")
        detach(own_log, log_level)
        assert session.mount_fd is not None
        _send(channel, told, [session.mount_fd])
        channel.close()
        os.close(session.mount_fd)
        session.mount_fd = None
        return session.run()
    finally:
        session.close()


def _send(channel: socket.socket, what: dict[str, object], descriptors: list[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    try:
        channel.sendmsg([json.dumps(what).encode()], rights if descriptors else [])
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ECONNRESET):
            raise  # whoever asked is gone, and so the mount will be


def serve_command(fd: int) -> int:
    """`sdeefs serve FD`: the process that `start_server()` starts."""
    channel = socket.socket(fileno=fd)
    options, log_file, log_level = pickle.loads(channel.recv(1 << 20))
    return run_server(options, channel, log_file=log_file, log_level=log_level)


def serve_at(options: Options, merged: bytes, *, log_level: str = "warning") -> int:
    """Mount at a path and serve in this process until the mount is gone; the exit status.

    Raises UsageError, Refused or OSError before the mount is usable.
    """
    from sdeefs.background import foreground

    merged = check_merged(merged)
    options = with_work(options)
    check_layers(options)
    return foreground(options, merged, log_level, None)
