"""What is shown in place of a few secrets of the host, so that package tools work without them.

A stand-in is made from what the user may read anyway: `shadow` lists the accounts of passwd(5) and
no hash, `gshadow` the groups. `useradd`, `passwd` and `groupadd` work in them, on the user's own
copy. Lock files and logs of package tools are shown empty.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Sequence

#: Shown as empty files that env-root owns, though the user can't read them (globs, without the
#: leading slash). Files that are empty on the host need no place here: they are shown so anyway.
BLANK = (
    "etc/.pwd.lock",
    "etc/security/opasswd",
    "var/log/apt/*",
    "var/log/dpkg.log*",
    "var/log/btmp*",
    "var/log/lastlog",
    "var/log/tallylog",
    "var/log/faillog",
    "var/cache/debconf/*",
    "var/cache/apt/archives/lock",
    "var/lib/apt/lists/lock",
    "var/lib/dpkg/lock*",
    "var/lib/dpkg/triggers/Lock",
    "var/lib/rpm/.rpm.lock",
    "var/log/dnf*",
    "var/log/yum*",
    "var/lib/dnf/*",
)
#: Shown although the user can't read them: programs of packages, which are public elsewhere, and
#: which package tools must be able to link and replace.
PUBLIC = ("usr/lib/dbus-1.0/dbus-daemon-launch-helper",)


def is_blank(path: bytes, patterns: Sequence[str] = BLANK) -> bool:
    """Whether the object at this relative path is shown empty."""
    name = os.fsdecode(path)
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _rows(data: bytes) -> list[list[bytes]]:
    rows = [line.split(b":") for line in data.splitlines()]
    return [row for row in rows if len(row) >= 3 and row[0] and not row[0].startswith((b"+", b"-"))]


def shadow(passwd: bytes) -> bytes:
    """shadow(5) with the accounts of passwd(5): locked, without a hash, never changed."""
    return b"".join(row[0] + b":*:1:0:99999:7:::\n" for row in _rows(passwd))


def gshadow(group: bytes) -> bytes:
    """gshadow(5) with the groups of group(5) and their members, without passwords."""
    return b"".join(
        row[0] + b":*::" + (row[3] if len(row) > 3 else b"") + b"\n" for row in _rows(group)
    )


def _sudoers(_: bytes) -> bytes:
    # Env-root needs no rule to become anybody; sudo as root must start, though.
    return b"# The host's rules are not shown here.\nroot ALL=(ALL:ALL) ALL\n"


_MADE = {
    b"etc/shadow": ("etc/passwd", shadow),
    b"etc/shadow-": ("etc/passwd-", shadow),
    b"etc/gshadow": ("etc/group", gshadow),
    b"etc/gshadow-": ("etc/group-", gshadow),
    b"etc/sudoers": ("etc/passwd", _sudoers),
}


def known(root: str = "/") -> list[bytes]:
    """The paths, relative to `root`, of what has a stand-in or is shown empty, if it is there."""
    found = {path for path in _MADE if os.path.lexists(os.path.join(os.fsencode(root), path))}
    for pattern in BLANK:
        for path in glob.glob(os.path.join(root, pattern)):
            if os.path.isfile(path):
                found.add(os.fsencode(os.path.relpath(path, root)))
    return sorted(found)


def content(path: bytes, root: str = "/") -> bytes | None:
    """The stand-in for the object at this path, relative to `root`; None if there is none.

    Reads only what everybody may read.
    """
    made = _MADE.get(path)
    if made is None:
        return None
    source, make = made
    try:
        with open(os.path.join(root, source), "rb") as file:
            if not os.fstat(file.fileno()).st_mode & 0o004:
                return make(b"")
            return make(file.read())
    except OSError:
        return make(b"")
