"""POSIX as ext4 has it: small checks that run in any directory.

A check is a generator over a `Place`. What it does before its first `yield` prepares objects: on a
union that happens in the lower layer, so that what follows the `yield` has to copy up; in a second
run it happens in merged itself. What a transport has no word for stands in `place.lacks`.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.fslab.fslab_lab import error_of

_LIBC = ctypes.CDLL(None, use_errno=True)
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE = 1, 2, 8, 16
OLD = 1_000_000_000_123_456_789  # a time long ago, with nanoseconds


@dataclass
class Place:
    """The directory that a check works in."""

    root: Path
    lacks: frozenset[str] = frozenset()
    union: bool = False  # merged of a union (of either engine)
    fds: list[int] = field(default_factory=list)

    def __truediv__(self, name: str) -> str:
        return f"{self.root}/{name}"

    def write(self, name: str, data: bytes = b"data", mode: int = 0o644) -> str:
        path = self / name
        fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode)
        os.write(fd, data)
        os.fchmod(fd, mode)
        os.close(fd)
        return path

    def read(self, name: str) -> bytes:
        with open(self / name, "rb") as file:
            return file.read()

    def mkdir(self, name: str, mode: int = 0o755) -> str:
        os.mkdir(self / name)
        os.chmod(self / name, mode)
        return self / name

    def open(self, name: str, flags: int, mode: int = 0o644) -> int:
        fd = os.open(self / name, flags, mode)
        self.fds.append(fd)
        return fd

    def close_all(self) -> None:
        for fd in self.fds:
            try:
                os.close(fd)
            except OSError:
                pass
        self.fds.clear()

    def stat(self, name: str) -> os.stat_result:
        return os.lstat(self / name)

    def mode(self, name: str) -> int:
        return stat.S_IMODE(self.stat(name).st_mode)

    def ls(self, name: str = ".") -> list[str]:
        return sorted(os.listdir(self / name))


Check = Callable[[Place], Iterator[None]]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Register a check under its function's name."""
    assert function.__name__ not in CHECKS
    CHECKS[function.__name__] = function
    return function


def fails(name: str, function: Callable[..., object], *arguments: object, **kw: object) -> None:
    """The call fails with this errno."""
    got = error_of(function, *arguments, **kw)
    assert got == name, f"{getattr(function, '__name__', function)}{arguments}: {got}, not {name}"


def rename2(old: str, new: str, flags: int) -> None:
    if _LIBC.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), old, None, new)


def link_handle(fd: int, new: str) -> None:
    """linkat(2) of /proc/self/fd/N, followed: os.link doesn't follow."""
    if _LIBC.linkat(-100, b"/proc/self/fd/%d" % fd, -100, os.fsencode(new), 0x400):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), new)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _LIBC.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def acl(*entries: tuple[int, int, int]) -> bytes:
    """The xattr of an ACL from (tag, permissions, id): tags 1 user-obj, 2 user, 4 group-obj,
    8 group, 16 mask, 32 other."""
    rows = sorted(entries, key=lambda e: (e[0], e[2]))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *row) for row in rows)


NO_ID = 0xFFFFFFFF
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


def simple_acl(user: int, permissions: int, mask: int = 7, own: int = 6, other: int = 0) -> bytes:
    return acl(
        (1, own, NO_ID), (2, permissions, user), (4, 4, NO_ID), (16, mask, NO_ID), (32, other, NO_ID)
    )  # fmt: skip
