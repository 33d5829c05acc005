"""FUSE connections by the minor of their device: aborting one, and counting what waits in it.

/sys/fs/fuse/connections/MINOR is the only handle on a connection whose server hangs: nothing here
touches the mount itself. Where fusectl isn't mounted, it is, detached and for ourselves alone.
"""

from __future__ import annotations

import errno
import os

from mount_helpers import syscalls

CONNECTIONS = "/sys/fs/fuse/connections"


def _connections() -> int:
    """A descriptor of the directory of connections. Raises OSError."""
    try:
        fd = os.open(CONNECTIONS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        fd = -1
    if fd >= 0:
        if os.listdir(fd):
            return fd
        # Empty: fusectl isn't mounted there, or there are no connections; a mount of our own knows.
        os.close(fd)
    fs = syscalls.fsopen("fusectl")
    try:
        syscalls.fsconfig_create(fs)
        mount_fd = syscalls.fsmount(fs)
    finally:
        os.close(fs)
    try:
        # An own description: the detached mount lives as long as it.
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount_fd)
    finally:
        os.close(mount_fd)


def _file(minor: int, name: str, flags: int) -> int:
    directory = _connections()
    try:
        return os.open(f"{minor}/{name}", flags | os.O_CLOEXEC, dir_fd=directory)
    finally:
        os.close(directory)


def abort_connection(minor: int) -> bool:
    """End a connection: every waiting and later request fails with ENOTCONN or ECONNABORTED.

    False where there is no such connection (it ended already). Raises OSError, EPERM or EACCES for
    one who may not: then `umount2(MNT_FORCE)` by an owner of the mount does the same.
    """
    try:
        fd = _file(minor, "abort", os.O_WRONLY)
    except FileNotFoundError:
        return False
    try:
        os.write(fd, b"1")
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
    finally:
        os.close(fd)
    return True


def waiting_requests(minor: int) -> int | None:
    """How many requests wait in the connection; None where there is none. Raises OSError."""
    try:
        fd = _file(minor, "waiting", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return int(os.read(fd, 32) or b"0")
    finally:
        os.close(fd)
