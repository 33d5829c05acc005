"""How an instance knows that somebody is in it: a pipe whose read end its init holds.

A member opens the pipe for writing by its init's /proc entry and takes a shared lock (flock) on it,
for as long as it lives. Init ends when the last writer is gone, but only with the exclusive lock in
its hand: so a member either joins an instance that stays, or is told to make a new one.

On the path of `sdee run`: imports next to nothing.
"""

from __future__ import annotations

import fcntl
import os

#: Where init has its end.
FD = 3
_PF_EXITING = 0x4  # among the flags of /proc/PID/stat


class Ended(Exception):
    """The instance is gone or just ending: make a new one."""


def make() -> int:
    """The read end of a new pipe that has no writer yet; the caller's."""
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.close(write)
    return read


def hold(pid: int) -> int:
    """Become a member of the instance of this init; closing the descriptor ends that.

    Raises Ended, PermissionError: it is another account's.
    """
    try:
        fd = os.open(f"/proc/{pid}/fd/{FD}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        # Once its memory is gone, until it is a zombie, what /proc has of a process is root's.
        if _exiting(pid):
            raise Ended from None
        raise
    except OSError:
        raise Ended from None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.write(fd, b"x")
    except OSError:
        os.close(fd)
        raise Ended from None
    return fd


def _exiting(pid: int) -> bool:
    """Whether a process is on its way out, or gone: told before it gives up its memory."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            flags = int(file.read().rsplit(b")", 1)[1].split()[6])
    except OSError:
        return True
    return bool(flags & _PF_EXITING)


def look(fd: int) -> tuple[bool, bool]:
    """For init: (whether somebody joined since the last look, whether any member is there)."""
    joined = False
    while True:
        try:
            if not os.read(fd, 4096):
                return joined, False
            joined = True
        except BlockingIOError:
            return joined, True


def leave(fd: int) -> bool:
    """For init: whether it may end now. With True nobody can join any more."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
