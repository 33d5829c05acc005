"""Processes that are made before they are needed: each waits at its end of a channel.

They hold nothing of their maker's: what it serves and locks must not live on in them.
"""

from __future__ import annotations

import os
import select
import signal
import socket

#: The descriptor on which a spare waits.
CHANNEL = 3


class SpareProcess:
    """A child that waits, as its maker has it. Owns `channel` and `pidfd`."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._channel = channel

    def alive(self) -> bool:
        """Whether it still waits: its owner may kill it."""
        return not select.select([self._pidfd], [], [], 0)[0]

    def discard(self) -> None:
        """End it."""
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        except (ProcessLookupError, ChildProcessError):
            pass
        self._close()

    def _close(self) -> None:
        self._channel.close()
        os.close(self._pidfd)


def keep_only(channel: socket.socket) -> socket.socket:
    """In the child: the channel at CHANNEL, and no other descriptor but 0 to 2."""
    os.dup2(channel.fileno(), CHANNEL)
    channel.detach()
    os.closerange(CHANNEL + 1, max(map(int, os.listdir("/proc/self/fd"))) + 1)
    return socket.socket(fileno=CHANNEL)
