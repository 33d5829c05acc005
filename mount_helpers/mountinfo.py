"""/proc/PID/mountinfo, parsed (proc(5)). Reading it touches no mount, so a dead one can't hang it."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

#: Filesystems that other hosts write to, and whose calls may wait for a network.
_REMOTE = (
    "nfs",
    "cifs",
    "smb",
    "ceph",
    "lustre",
    "gpfs",
    "beegfs",
    "9p",
    "afs",
    "fuse",
    "virtiofs",
)

_ESCAPE = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    """One line. Paths are bytes without the kernel's escapes; `device` is (major, minor)."""

    mount_id: int
    parent_id: int
    device: tuple[int, int]
    root: bytes
    point: bytes
    options: frozenset[str]
    propagation: str
    fstype: str
    source: bytes
    super_options: tuple[str, ...]


def _plain(field: bytes) -> bytes:
    return _ESCAPE.sub(lambda m: bytes([int(m[1], 8)]), field)


def parse_line(line: bytes) -> Mount:
    """Parse one line of mountinfo."""
    left, _, right = line.rstrip(b"\n").partition(b" - ")
    fields = left.split(b" ")
    fstype, source, super_options = (right.split(b" ", 2) + [b"", b""])[:3]
    major, minor = fields[2].split(b":")
    return Mount(
        int(fields[0]),
        int(fields[1]),
        (int(major), int(minor)),
        _plain(fields[3]),
        _plain(fields[4]),
        frozenset(os.fsdecode(fields[5]).split(",")),
        os.fsdecode(b" ".join(fields[6:])),
        os.fsdecode(fstype),
        _plain(source),
        # A comma of a value is escaped, so that those that separate are bare.
        tuple(os.fsdecode(_plain(option)) for option in super_options.split(b",")),
    )


def is_remote(fstype: str) -> bool:
    """Whether a filesystem of this type may be another host's (or another program's: FUSE)."""
    return fstype.startswith(_REMOTE)


def read_mounts(pid: int | str = "self") -> list[Mount]:
    """All mounts of the mount namespace of a process, in the kernel's order. Raises OSError."""
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        return [parse_line(line) for line in file]


def mount_at(point: bytes | str, pid: int | str = "self") -> Mount | None:
    """The topmost mount at exactly this absolute path, or None."""
    wanted = os.fsencode(point)
    found = None
    for mount in read_mounts(pid):
        if mount.point == wanted:
            found = mount
    return found
