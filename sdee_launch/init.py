"""The first process of an instance: reaps, and ends with the last member; everything ends with it.

It is forked from whoever built the instance, so its imports are those of its maker.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import signal
import time
from collections.abc import Sequence
from typing import NoReturn

from mount_helpers import syscalls
from sdee_launch import membership

#: Seconds to wait for the first member: its maker may have died on the way.
FIRST_MEMBER = 60.0
_PATIENCE = 3.0


def keep_only(member: int, others: Sequence[int]) -> list[int]:
    """Close all descriptors but these, `member` becoming membership.FD, and 0 to 2 /dev/null.

    Gives the new numbers of `others`.
    """
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    above = membership.FD + 1
    member, null, *kept = [
        fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in (member, null, *others)
    ]
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.dup2(member, membership.FD, inheritable=False)
    keep = {0, 1, 2, membership.FD, *kept}
    for entry in os.listdir("/proc/self/fd"):
        if int(entry) not in keep:
            try:
                os.close(int(entry))
            except OSError:
                pass  # the one that read the list
    return kept


def set_title(title: str) -> None:
    """What ps shows: over the arguments that the forked interpreter was started with."""
    try:
        name = ctypes.create_string_buffer(title.split(" ")[0].encode()[:15])
        syscalls.prctl(syscalls.PR_SET_NAME, ctypes.addressof(name))
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rsplit(b")", 1)[1].split()
        start, end = int(fields[45]), int(fields[46])
        if 0 < end - start < 1 << 20:
            text = title.encode()[: end - start - 1]
            ctypes.memset(start, 0, end - start)
            ctypes.memmove(start, text, len(text))
    except (OSError, IndexError, ValueError):
        pass  # only a name


def run(servers: Sequence[int], lasting: bool) -> NoReturn:
    """Until the last member leaves (not if `lasting`), a server ends, or SIGTERM.

    `servers`: pidfds of the filesystem's servers, without which nothing here can go on.
    """
    wake, woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _noted)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    poll = select.epoll()
    poll.register(wake, select.EPOLLIN)
    for fd in servers:
        poll.register(fd, select.EPOLLIN)
    if not lasting:
        # By edge: without a writer the pipe is at its end all the time.
        poll.register(membership.FD, select.EPOLLIN | select.EPOLLET)
    deadline: float | None = None if lasting else time.monotonic() + FIRST_MEMBER
    while True:
        wait = None if deadline is None else max(0.0, deadline - time.monotonic()) + 0.001
        for fd, _ in poll.poll(wait):
            if fd == wake:
                if set(os.read(wake, 512)) - {signal.SIGCHLD}:
                    _end()
            elif fd in servers:
                os._exit(1)
        if not lasting:
            joined, inhabited = membership.look(membership.FD)
            if joined:
                deadline = None
            over = deadline is None or time.monotonic() > deadline
            if over and not inhabited and membership.leave(membership.FD):
                os._exit(0)
        _reap()


def _noted(*_: object) -> None:
    """The wakeup descriptor tells."""


def _reap() -> bool:
    """Wait for children that have ended; whether any is left."""
    while True:
        try:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                return True
        except ChildProcessError:
            return False


def _end() -> NoReturn:
    """Ask everybody to go, and go."""
    deadline = time.monotonic() + _PATIENCE
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCONT):
        try:
            os.kill(-1, number)
        except OSError as error:
            if error.errno == errno.ESRCH:
                os._exit(0)
    while time.monotonic() < deadline:
        _reap()
        try:
            os.kill(-1, 0)
        except OSError:
            break
        time.sleep(0.02)
    os._exit(0)
