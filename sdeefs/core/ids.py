"""Ids between merged and the layers: maps as fuse-overlayfs spells them, and ownership in xattrs."""

from __future__ import annotations

import errno
import os
import stat
import struct
from typing import NamedTuple

from sdeefs.core.settings import IdMap

#: What the kernel shows for an id that a map has no name for.
OVERFLOW = 65534
#: Ownership that the server can't set on disk, as podman and fuse-overlayfs write it.
OVERRIDE_STAT = b"user.containers.override_stat"

_ACL_HEADER = struct.Struct("<I")
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_USER = 0x02
_ACL_GROUP = 0x08
ACL_ACCESS = b"system.posix_acl_access"
ACL_DEFAULT = b"system.posix_acl_default"
ACL_NAMES = (ACL_ACCESS, ACL_DEFAULT)


def to_shown(ranges: IdMap, stored: int) -> int:
    """An id of a layer, as merged shows it."""
    for r in ranges:
        if r.outside <= stored < r.outside + r.count:
            return stored - r.outside + r.inside
    return OVERFLOW if ranges else stored


def to_stored(ranges: IdMap, shown: int) -> int:
    """An id of merged, as a layer stores it."""
    for r in ranges:
        if r.inside <= shown < r.inside + r.count:
            return shown - r.inside + r.outside
    if ranges:
        raise OSError(errno.EINVAL, f"id {shown} has no place in the id map of the layer")
    return shown


class Owners:
    """The maps of one kind of layer; `identity` where nothing has to be done."""

    def __init__(self, uids: IdMap, gids: IdMap, squash_overflow: bool = False) -> None:
        self.uids = uids
        self.gids = gids
        self.squash = squash_overflow
        self.identity = not uids and not gids and not squash_overflow

    def shown(self, uid: int, gid: int) -> tuple[int, int]:
        """(uid, gid) of a layer as merged shows them."""
        if self.squash:
            uid = 0 if uid == OVERFLOW else uid
            gid = 0 if gid == OVERFLOW else gid
        return to_shown(self.uids, uid), to_shown(self.gids, gid)

    def stored_uid(self, uid: int) -> int:
        """A uid of merged as the layer stores it."""
        return to_stored(self.uids, uid)

    def stored_gid(self, gid: int) -> int:
        """A gid of merged as the layer stores it."""
        return to_stored(self.gids, gid)

    def acl_shown(self, value: bytes) -> bytes:
        """A POSIX ACL of a layer as merged shows it."""
        return value if self.identity else _map_acl(value, self.shown)

    def acl_stored(self, value: bytes) -> bytes:
        """A POSIX ACL of merged as the layer stores it."""
        if self.identity:
            return value
        return _map_acl(
            value, lambda u, g: (self._or_same(self.uids, u), self._or_same(self.gids, g))
        )

    @staticmethod
    def _or_same(ranges: IdMap, shown: int) -> int:
        return to_stored(ranges, shown)


def _map_acl(value: bytes, pair: object) -> bytes:
    assert callable(pair)
    if len(value) < 4 or (len(value) - 4) % 8:
        return value
    out = [value[:4]]
    for tag, perm, ident in _ACL_ENTRY.iter_unpack(value[4:]):
        if tag == _ACL_USER:
            ident = pair(ident, 0)[0]
        elif tag == _ACL_GROUP:
            ident = pair(0, ident)[1]
        out.append(_ACL_ENTRY.pack(tag, perm, ident))
    return b"".join(out)


def acl_entries(value: bytes) -> list[tuple[int, int, int]]:
    """(tag, permissions, id) of each entry of an ACL xattr."""
    if len(value) < 4 or (len(value) - 4) % 8:
        return []
    return list(_ACL_ENTRY.iter_unpack(value[4:]))


def pack_acl(entries: list[tuple[int, int, int]]) -> bytes:
    """The xattr of an ACL."""
    return _ACL_HEADER.pack(2) + b"".join(_ACL_ENTRY.pack(*entry) for entry in entries)


ACL_TAG_USER_OBJ = 0x01
ACL_TAG_GROUP_OBJ = 0x04
ACL_TAG_MASK = 0x10
ACL_TAG_OTHER = 0x20


def inherited_acl(default: bytes, mode: int) -> tuple[int, bytes | None]:
    """posix_acl_create(): (mode, access ACL or None) of a new object below a default ACL."""
    entries = acl_entries(default)
    tags = {tag for tag, _, _ in entries}
    out = []
    user = group = other = 7
    group_tag = ACL_TAG_MASK if ACL_TAG_MASK in tags else ACL_TAG_GROUP_OBJ
    for tag, perm, ident in entries:
        if tag == ACL_TAG_USER_OBJ:
            perm &= mode >> 6
            user = perm & 7
        elif tag == group_tag:
            perm &= mode >> 3
            group = perm & 7
        elif tag == ACL_TAG_OTHER:
            perm &= mode
            other = perm & 7
        out.append((tag, perm & 7, ident))
    new_mode = (mode & ~0o777) | user << 6 | group << 3 | other
    plain = tags <= {ACL_TAG_USER_OBJ, ACL_TAG_GROUP_OBJ, ACL_TAG_OTHER}
    return new_mode, None if plain else pack_acl(out)


class Override(NamedTuple):
    """What `user.containers.override_stat` says."""

    uid: int
    gid: int
    mode: int
    rdev: int


_KINDS = {
    b"dir": stat.S_IFDIR,
    b"file": stat.S_IFREG,
    b"symlink": stat.S_IFLNK,
    b"pipe": stat.S_IFIFO,
    b"socket": stat.S_IFSOCK,
    b"block": stat.S_IFBLK,
    b"char": stat.S_IFCHR,
}
_KIND_NAMES = {kind: name for name, kind in _KINDS.items()}


def parse_override(value: bytes, real_mode: int) -> Override | None:
    """`UID:GID:MODE[:KIND[-MAJOR-MINOR]]`, the mode octal."""
    fields = value.split(b":")
    if len(fields) < 3:
        return None
    try:
        uid, gid, mode = int(fields[0]), int(fields[1]), int(fields[2], 8)
        kind, rdev = stat.S_IFMT(real_mode), 0
        if len(fields) > 3 and fields[3]:
            words = fields[3].split(b"-")
            kind = _KINDS[words[0]]
            if len(words) == 3:
                rdev = os.makedev(int(words[1]), int(words[2]))
    except (ValueError, KeyError):
        return None
    return Override(uid, gid, kind | stat.S_IMODE(mode), rdev)


def format_override(uid: int, gid: int, mode: int, rdev: int, real_mode: int) -> bytes:
    """The xattr that makes an object of `real_mode` look like this."""
    text = b"%d:%d:%o" % (uid, gid, stat.S_IMODE(mode))
    kind = stat.S_IFMT(mode)
    if kind and kind != stat.S_IFMT(real_mode):
        text += b":" + _KIND_NAMES[kind]
        if kind in (stat.S_IFBLK, stat.S_IFCHR):
            text += b"-%d-%d" % (os.major(rdev), os.minor(rdev))
    return text
