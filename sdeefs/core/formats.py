"""What overlayfs writes on disk: names of its xattrs, file handles, whiteouts. Pure functions.

A layer written here is read by Linux's overlayfs and the other way round, so all of this is the
kernel's format (Documentation/filesystems/overlayfs.rst, fs/overlayfs/overlayfs.h).
"""

from __future__ import annotations

import os
import struct
import sys

#: `.wh.NAME` files: whiteouts where neither devices nor xattrs can be had (sdeefs alone reads them).
PREFIX = b".wh."
PREFIX_OPAQUE = b".wh..wh..opq"

# struct ovl_fb: version, magic, len, flags, type, uuid
_FB = struct.Struct("=BBBBB16s")
_FB_VERSION = 0
_FB_MAGIC = 0xFB
FB_BIG_ENDIAN = 1
FB_ANY_ENDIAN = 2
FB_PATH_UPPER = 4

# Types of file handles whose inode number can be read off (include/linux/exportfs.h).
_FILEID_INO32_GEN = (0x01, 0x02)
_FILEID_XFS64 = (0x81, 0x82)
_FILEID_BTRFS = (0x4D, 0x4E, 0x4F)


class OverlayNames:
    """The xattrs of one namespace: `trusted.overlay.` or, with `userxattr`, `user.overlay.`."""

    def __init__(self, userxattr: bool) -> None:
        self.prefix = b"user.overlay." if userxattr else b"trusted.overlay."
        self.opaque = self.prefix + b"opaque"
        self.redirect = self.prefix + b"redirect"
        self.origin = self.prefix + b"origin"
        self.impure = self.prefix + b"impure"
        self.nlink = self.prefix + b"nlink"
        self.whiteout = self.prefix + b"whiteout"
        self.metacopy = self.prefix + b"metacopy"
        self.upper = self.prefix + b"upper"
        #: Ours alone, ignored by overlayfs: the data of a secret object was not copied up.
        self.secret = self.prefix + b"sdeefs.secret"
        self._escaped = self.prefix + b"overlay."

    def is_private(self, stored: bytes) -> bool:
        """Whether merged doesn't show this xattr of a layer."""
        return stored.startswith(self.prefix) and not stored.startswith(self._escaped)

    def to_stored(self, shown: bytes) -> bytes:
        """Where an xattr of merged is kept: overlay xattrs of a nested overlay are escaped."""
        if shown.startswith(self.prefix):
            return self._escaped + shown[len(self.prefix) :]
        return shown

    def to_shown(self, stored: bytes) -> bytes | None:
        """What merged calls an xattr of a layer; None hides it."""
        if not stored.startswith(self.prefix):
            return stored
        if stored.startswith(self._escaped):
            return self.prefix + stored[len(self._escaped) :]
        return None


def encode_handle(handle: bytes, uuid: bytes, upper: bool) -> bytes:
    """overlay.origin's value for a handle as name_to_handle_at gave it (type, then the bytes)."""
    kind = struct.unpack_from("=i", handle)[0]
    fid = handle[4:]
    flags = FB_PATH_UPPER if upper else 0
    if sys.byteorder == "big":
        flags |= FB_BIG_ENDIAN
    return _FB.pack(_FB_VERSION, _FB_MAGIC, _FB.size + len(fid), flags, kind & 0xFF, uuid) + fid


def decode_handle(value: bytes) -> tuple[bytes, bytes] | None:
    """(uuid, handle for open_by_handle_at) of an overlay.origin; None where it names nothing."""
    if len(value) < _FB.size:
        return None
    version, magic, length, flags, kind, uuid = _FB.unpack_from(value)
    if version != _FB_VERSION or magic != _FB_MAGIC or length > len(value) or length < _FB.size:
        return None
    if not flags & FB_ANY_ENDIAN and bool(flags & FB_BIG_ENDIAN) != (sys.byteorder == "big"):
        return None
    return uuid, struct.pack("=i", kind) + value[_FB.size : length]


def inode_of_handle(handle: bytes) -> int | None:
    """The inode number in a file handle of ext4, xfs, btrfs and the like; None if unknown."""
    kind = struct.unpack_from("=i", handle)[0]
    fid = handle[4:]
    if kind in _FILEID_INO32_GEN and len(fid) in (8, 16):
        return int(struct.unpack_from("=I", fid)[0])
    if kind in _FILEID_XFS64 and len(fid) >= 12:
        return int(struct.unpack_from("=Q", fid)[0])
    if kind in _FILEID_BTRFS and len(fid) >= 8:
        return int(struct.unpack_from("=Q", fid)[0])
    return None


def index_name(origin: bytes) -> bytes:
    """The name in work/index of what was copied up from this origin."""
    return origin.hex().encode()


def parse_nlink(value: bytes, upper_nlink: int, lower_nlink: int) -> int | None:
    """overlay.nlink (`U+1`, `L-2`): the links that merged shows."""
    try:
        base = {b"U": upper_nlink, b"L": lower_nlink}[value[:1]]
        count = base + int(value[1:])
    except (KeyError, ValueError):
        return None
    return count if count > 0 else None


def xattr_path(dir_fd: int, name: bytes) -> bytes:
    """The object `name` of a directory for the xattr calls, which take no descriptors to start at."""
    return b"/proc/self/fd/%d/%s" % (dir_fd, name)


def fd_path(fd: int) -> bytes:
    """The object that a descriptor (also an O_PATH one) stands for."""
    return b"/proc/self/fd/%d" % fd


def valid_redirect(value: bytes) -> bool:
    """overlay.redirect: an absolute path of plain components, or one component."""
    parts = value.split(b"/")
    if value.startswith(b"/"):
        parts = parts[1:]
    elif len(parts) > 1:
        return False
    return all(p not in (b"", b".", b"..") for p in parts)


def get_xattr(path: bytes, name: bytes, follow: bool = False) -> bytes | None:
    """An xattr, or None where there is none or the file system has none."""
    try:
        return os.getxattr(path, name, follow_symlinks=follow)
    except OSError:
        return None
