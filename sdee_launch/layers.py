"""The directories that an instance's merged mounts are made of, opened one component at a time.

An upper (and a generation, which is one that is read only) mirrors the host's paths from / on: the
upper of a filesystem that is mounted at /usr is `upper/usr`.
"""

from __future__ import annotations

import os
import stat

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def part_of(top: int, point: bytes) -> int | None:
    """The part of a layer for what is mounted at `point`; None if it has none. The caller's."""
    fd = os.dup(top)
    for name in point.split(b"/"):
        if not name:
            continue
        try:
            below = os.open(name, _DIRECTORY, dir_fd=fd)
        except OSError:
            os.close(fd)
            return None
        os.close(fd)
        fd = below
    return fd


def upper_part(top: int, point: bytes) -> int | None:
    """The part of an upper for `point`, made if there is none; None if upper has removed it.

    New directories get the modes of the host's. Raises OSError.
    """
    fd = os.dup(top)
    path = b""
    try:
        for name in point.split(b"/"):
            if not name:
                continue
            path += b"/" + name
            try:
                os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                mode = stat.S_IMODE(os.stat(path).st_mode) & 0o1777
                os.mkdir(name, mode, dir_fd=fd)
                os.chmod(name, mode, dir_fd=fd)
            try:
                below = os.open(name, _DIRECTORY, dir_fd=fd)
            except (NotADirectoryError, OSError):
                # A whiteout, or something else that was put there.
                os.close(fd)
                return None
            os.close(fd)
            fd = below
    except BaseException:
        os.close(fd)
        raise
    return fd


def work_name(point: bytes) -> str:
    """The name of the work directory for `point`."""
    if point == b"/":
        return "work"
    return "work." + os.fsdecode(point.strip(b"/")).replace("%", "%25").replace("/", "%2F")


def work_part(place: int, point: bytes) -> int:
    """The work directory for `point`, made if there is none. The caller's. Raises OSError."""
    name = work_name(point)
    try:
        os.mkdir(name, 0o700, dir_fd=place)
    except FileExistsError:
        pass
    return os.open(name, _DIRECTORY, dir_fd=place)
