"""Reading the on-disk format of an upper without mounting it: for `diff` and `fsck`.

Everything is reached from an open directory by names, never through a path string or a link.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

PREFIXES = (b"trusted.overlay.", b"user.overlay.")
WHITEOUT_PREFIX = b".wh."
OPAQUE_PREFIX = b".wh..wh..opq"
OVERRIDE_STAT = b"user.containers.override_stat"

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_root(path: bytes) -> int:
    """A layer's root; links of the path itself are followed. The caller closes it."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def open_below(directory: int, name: bytes) -> int:
    """A directory below another, never through a link."""
    return os.open(name, _DIRECTORY, dir_fd=directory)


def xattrs(directory: int, name: bytes, mode: int) -> dict[bytes, bytes]:
    """All extended attributes of an entry; none where the filesystem has none.

    By /proc/self/fd: links and devices can't be opened to be asked, and must not be followed.
    """
    path = b"/proc/self/fd/%d/%s" % (directory, name)
    found: dict[bytes, bytes] = {}
    try:
        for key in os.listxattr(path, follow_symlinks=False):
            try:
                found[os.fsencode(key)] = os.getxattr(path, key, follow_symlinks=False)
            except OSError:
                continue
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.ENOENT):
            raise
    return found


@dataclass(frozen=True)
class Object:
    """One entry of a layer as far as its format goes."""

    name: bytes
    stat: os.stat_result
    xattrs: dict[bytes, bytes]

    @property
    def kind(self) -> int:
        """The S_IFMT bits; those of override_stat where it has them."""
        return stat.S_IFMT(self.mode)

    @property
    def mode(self) -> int:
        """The mode as merged shows it."""
        parts = self.xattrs.get(OVERRIDE_STAT, b"").split(b":")
        if len(parts) >= 3:
            try:
                mode = int(parts[2], 8)
            except ValueError:
                return self.stat.st_mode
            kinds = {
                b"file": stat.S_IFREG, b"dir": stat.S_IFDIR, b"symlink": stat.S_IFLNK,
                b"pipe": stat.S_IFIFO, b"socket": stat.S_IFSOCK,
            }  # fmt: skip
            word = parts[3].partition(b"-")[0] if len(parts) > 3 else b""
            device = {b"block": stat.S_IFBLK, b"char": stat.S_IFCHR}
            kind = kinds.get(word) or device.get(word) or stat.S_IFMT(self.stat.st_mode)
            return kind | stat.S_IMODE(mode)
        return self.stat.st_mode

    @property
    def owner(self) -> tuple[int, int]:
        """(uid, gid) as merged shows them."""
        parts = self.xattrs.get(OVERRIDE_STAT, b"").split(b":")
        if len(parts) >= 2:
            try:
                return int(parts[0]), int(parts[1])
            except ValueError:
                pass
        return self.stat.st_uid, self.stat.st_gid

    def overlay(self, name: bytes) -> bytes | None:
        """The value of `overlay.NAME` in either namespace, or None."""
        for prefix in PREFIXES:
            value = self.xattrs.get(prefix + name)
            if value is not None:
                return value
        return None

    @property
    def is_device_whiteout(self) -> bool:
        """Character device 0/0."""
        return stat.S_ISCHR(self.stat.st_mode) and self.stat.st_rdev == 0

    @property
    def is_xattr_whiteout(self) -> bool:
        """A zero-size regular file with `overlay.whiteout`."""
        return (
            stat.S_ISREG(self.stat.st_mode)
            and self.stat.st_size == 0
            and self.overlay(b"whiteout") is not None
        )

    @property
    def is_whiteout(self) -> bool:
        """A deletion, in the two forms that overlayfs reads."""
        return self.is_device_whiteout or self.is_xattr_whiteout

    @property
    def is_opaque(self) -> bool:
        """A directory that hides lower's."""
        return stat.S_ISDIR(self.stat.st_mode) and self.overlay(b"opaque") == b"y"


def look_up(directory: int, name: bytes) -> Object | None:
    """One entry of an open directory, or None."""
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return Object(name, found, xattrs(directory, name, found.st_mode))


def entries(directory: int) -> Iterator[Object]:
    """The entries of an open directory by name; those that vanish meanwhile are left out."""
    for name in sorted(os.fsencode(n) for n in os.listdir(directory)):
        found = look_up(directory, name)
        if found is not None:
            yield found
