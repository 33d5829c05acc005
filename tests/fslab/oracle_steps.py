"""Random file system calls, as data: who does what to which path or open handle.

The generator aims at what exists (it is told now and then), so that most calls find something;
a sequence is determined by its seed and the trees it has met.
"""

from __future__ import annotations

import os
import random
import stat
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.fslab.fslab_lab import ALICE, BOB, ROOT

ACTORS = {"root": ROOT, "alice": ALICE, "bob": BOB}
SLOTS = 4
NAMES = ("f0", "f1", "f2", "f3", "n0", "n1", "l0", "d0", "x", "long" * 20)
OLD = 1_000_000_000_000_000_000
MODES = (0o644, 0o600, 0o755, 0o777, 0o666, 0o640, 0o4755, 0o2755, 0o6711, 0o1777, 0o2777, 0o000)
XATTRS = ("user.a", "user.b", "trusted.t", "security.s", "trusted.overlay.opaque", "user.overlay.x")
ACCESS_ACL, DEFAULT_ACL = "system.posix_acl_access", "system.posix_acl_default"


class Step(NamedTuple):
    """One call."""

    actor: str
    call: str
    arguments: tuple[object, ...]

    def __str__(self) -> str:
        words = [repr(a) if len(repr(a)) < 70 else f"{a!r:.40}…" for a in self.arguments]
        return f"{self.actor}: {self.call}({', '.join(words)})"


def acl(rng: random.Random) -> bytes:
    """A valid ACL with one named user or group."""
    who = rng.choice(((2, ALICE[0]), (2, BOB[0]), (8, 60003)))
    rows = [(1, rng.randrange(8), 0xFFFFFFFF), (4, rng.randrange(8), 0xFFFFFFFF)]
    rows += [(who[0], rng.randrange(8), who[1]), (16, rng.randrange(8), 0xFFFFFFFF)]
    rows.append((32, rng.randrange(8), 0xFFFFFFFF))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *row) for row in sorted(rows))


@dataclass
class Generator:
    """Makes steps. `know(tree)` tells it what exists: path -> the S_IFMT bits."""

    seed: int
    lacks: frozenset[str] = frozenset()
    xattrs: tuple[str, ...] = XATTRS
    known: dict[str, int] = field(default_factory=dict)
    opened: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.calls = [c for c, weight in _WEIGHTS.items() for _ in range(weight)]
        if "tmpfile" in self.lacks:
            self.calls = [c for c in self.calls if c not in ("tmpfile", "link_handle")]
        if "fallocate" in self.lacks:
            self.calls = [c for c in self.calls if c != "fallocate"]

        if "xattr" in self.lacks:
            self.calls = [c for c in self.calls if "xattr" not in c and not c.startswith("seta")]
            self.calls = [c for c in self.calls if c != "setcap"]

    def know(self, tree: dict[str, int]) -> None:
        self.known = dict(sorted(tree.items()))

    def step(self) -> Step:
        actor = self.rng.choices(("root", "alice", "bob"), (6, 2, 2))[0]
        call = self.rng.choice(self.calls)
        arguments = getattr(self, f"_{call}")()
        if call == "removexattr" and arguments[1] == ACCESS_ACL:
            actor = "root"  # overlayfs takes setgid away when another does it; ext4 doesn't
        return Step(actor, call, arguments)

    # -- what steps are made of --

    def _any(self, kind: int = 0) -> str:
        """A path: mostly one that exists, sometimes a new name, now and then nonsense."""
        choice = self.rng.random()
        if choice < 0.85:
            paths = [p for p, k in self.known.items() if not kind or k == kind]
            if paths:
                return self.rng.choice(paths)
        if choice > 0.99:
            return self.rng.choice(("x/y/z", "f0/below", "n" * 256, "a/../a"))
        return self._new()

    def _new(self) -> str:
        directories = [p for p, k in self.known.items() if k == stat.S_IFDIR] + [""]
        parent = self.rng.choice(directories)
        return os.path.join(parent, self.rng.choice(NAMES))

    def _slot(self) -> int:
        """A handle, mostly one that was opened."""
        if self.opened and self.rng.random() < 0.95:
            return self.rng.choice(sorted(self.opened))
        return self.rng.randrange(SLOTS)

    def _fresh_slot(self) -> int:
        slot = self.rng.randrange(SLOTS)
        self.opened.add(slot)
        return slot

    def _mode(self) -> int:
        return self.rng.choice(MODES)

    def _change_mode(self) -> int:
        """For chmod: no setuid while handles are open that the kernel may write by itself."""
        return self._mode() & (0o1777 if self.opened else 0o7777)

    def _data(self) -> bytes:
        length = self.rng.choice((0, 1, 7, 100, 4096, 5000, 20_000))
        return bytes([self.rng.randrange(65, 90)]) * length

    def _offset(self) -> int:
        return self.rng.choice((0, 0, 1, 10, 4095, 4096, 10_000, 70_000))

    # -- one method for each call: its arguments --

    def _open(self) -> tuple[object, ...]:
        flags = self.rng.choice((os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR))
        for flag, chance in (
            (os.O_CREAT, 0.4), (os.O_EXCL, 0.1), (os.O_TRUNC, 0.2), (os.O_APPEND, 0.2),
            (os.O_NOFOLLOW, 0.1), (os.O_DIRECTORY, 0.03), (os.O_SYNC, 0.05),
        ):  # fmt: skip
            if self.rng.random() < chance:
                flags |= flag
        if flags & os.O_DIRECTORY and flags & os.O_CREAT:
            flags &= ~os.O_CREAT
        path = self._any(stat.S_IFREG if self.rng.random() < 0.8 else 0)
        return (self._fresh_slot(), path, flags | os.O_NONBLOCK, self._mode() & 0o777)

    def _close(self) -> tuple[object, ...]:
        slot = self._slot()
        self.opened.discard(slot)
        return (slot,)

    def _read(self) -> tuple[object, ...]:
        return (self._slot(), self._offset(), self.rng.choice((1, 100, 4096, 50_000)))

    def _write(self) -> tuple[object, ...]:
        return (self._slot(), self._offset(), self._data())

    def _append(self) -> tuple[object, ...]:
        return (self._slot(), self._data())

    def _map_write(self) -> tuple[object, ...]:
        return (self._slot(), self._offset(), self.rng.randrange(65, 90))

    def _map_read(self) -> tuple[object, ...]:
        return (self._slot(),)

    def _fstat(self) -> tuple[object, ...]:
        return (self._slot(),)

    def _fsync(self) -> tuple[object, ...]:
        return (self._slot(),)

    def _seek_end(self) -> tuple[object, ...]:
        return (self._slot(),)

    def _ftruncate(self) -> tuple[object, ...]:
        return (self._slot(), self._offset())

    def _fallocate(self) -> tuple[object, ...]:
        mode = self.rng.choice((0, 1, 3, 16))
        if mode == 16 and "zero_range" in self.lacks:  # refused after the kernel has set mtime
            mode = 0
        return (self._slot(), mode, self._offset(), 5000)

    def _fchmod(self) -> tuple[object, ...]:
        return (self._slot(), self._change_mode())

    def _fchown(self) -> tuple[object, ...]:
        return (self._slot(), *self._ids())

    def _futime(self) -> tuple[object, ...]:
        return (self._slot(), OLD + self.rng.randrange(10**12))

    def _flock(self) -> tuple[object, ...]:
        return (self._slot(), self.rng.choice(("shared", "exclusive", "unlock")))

    def _copy_range(self) -> tuple[object, ...]:
        return (self._slot(), self._slot(), self._offset(), self._offset(), 6000)

    def _tmpfile(self) -> tuple[object, ...]:
        return (self._fresh_slot(), self._any(stat.S_IFDIR), self._mode() & 0o777)

    def _link_handle(self) -> tuple[object, ...]:
        return (self._slot(), self._new())

    def _stat(self) -> tuple[object, ...]:
        return (self._any(),)

    def _stat_followed(self) -> tuple[object, ...]:
        return (self._any(),)

    def _list(self) -> tuple[object, ...]:
        return (self._any(stat.S_IFDIR),)

    def _access(self) -> tuple[object, ...]:
        return (self._any(), self.rng.randrange(8))

    def _readlink(self) -> tuple[object, ...]:
        return (self._any(stat.S_IFLNK),)

    def _mkdir(self) -> tuple[object, ...]:
        return (self._new(), self._mode())

    def _rmdir(self) -> tuple[object, ...]:
        return (self._any(stat.S_IFDIR),)

    def _unlink(self) -> tuple[object, ...]:
        return (self._any(),)

    def _remove_tree(self) -> tuple[object, ...]:
        return (self._any(stat.S_IFDIR),)

    def _rename(self) -> tuple[object, ...]:
        target = self._any() if self.rng.random() < 0.4 else self._new()
        return (self._any(), target, self._rename_flags())

    def _rename_directory(self) -> tuple[object, ...]:
        target = self._any(stat.S_IFDIR) if self.rng.random() < 0.3 else self._new()
        return (self._any(stat.S_IFDIR), target, self._rename_flags())

    def _rename_flags(self) -> int:
        flags = self.rng.choices((0, 1, 2), (8, 1, 2))[0]
        return 0 if flags == 2 and "exchange" in self.lacks else flags

    def _link(self) -> tuple[object, ...]:
        return (self._any(), self._new())

    def _symlink(self) -> tuple[object, ...]:
        target = self.rng.choice(("f0", "a/b", "nowhere", "..", self._any() or "."))
        return (target, self._new())

    def _mknod(self) -> tuple[object, ...]:
        kind = self.rng.choice(
            (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFREG, stat.S_IFCHR, stat.S_IFBLK)
        )
        if "devices" in self.lacks and kind in (stat.S_IFCHR, stat.S_IFBLK):
            kind = stat.S_IFIFO
        device = os.makedev(1, 3) if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
        return (self._new(), kind | self._mode() & 0o777, device)

    def _chmod(self) -> tuple[object, ...]:
        return (self._any(), self._change_mode())

    def _ids(self) -> tuple[int, int]:
        ids = (0, ALICE[0], BOB[0], 60003, 100_000)
        uid, gid = self.rng.choice(ids), self.rng.choice(ids)
        return self.rng.choice(((uid, gid), (uid, -1), (-1, gid)))

    def _chown(self) -> tuple[object, ...]:
        return (self._any(), *self._ids())

    def _utime(self) -> tuple[object, ...]:
        when = OLD + self.rng.randrange(10**12) if self.rng.random() < 0.8 else None
        return (self._any(), when)

    def _truncate(self) -> tuple[object, ...]:
        return (self._any(stat.S_IFREG), self._offset())

    def _setxattr(self) -> tuple[object, ...]:
        return (
            self._any(), self.rng.choice(self.xattrs), self.rng.choice((b"", b"v", b"y" * 300)),
            self.rng.choice((0, 0, 0, os.XATTR_CREATE, os.XATTR_REPLACE)),
        )  # fmt: skip

    def _setcap(self) -> tuple[object, ...]:
        value = struct.pack("<IIIII", 0x02000001, 1 << self.rng.randrange(20), 0, 0, 0)
        # Not while dirty pages may follow, whose writing takes it away again.
        name = "user.a" if self.opened else "security.capability"
        return (self._any(stat.S_IFREG), name, value, 0)

    def _setacl(self) -> tuple[object, ...]:
        return (self._any(), self.rng.choice((ACCESS_ACL, DEFAULT_ACL)), acl(self.rng), 0)

    def _getxattr(self) -> tuple[object, ...]:
        return (self._any(), self.rng.choice((*self.xattrs, ACCESS_ACL)))

    def _removexattr(self) -> tuple[object, ...]:
        name = self.rng.choice((*self.xattrs, ACCESS_ACL, DEFAULT_ACL))
        if "acl_removal" in self.lacks and name in (ACCESS_ACL, DEFAULT_ACL):
            name = "user.a"  # refused by overlayfs over lower filesystems without ACLs
        return (self._any(), name)

    def _listxattr(self) -> tuple[object, ...]:
        return (self._any(),)


_WEIGHTS = {
    "open": 20, "close": 3, "read": 5, "write": 10, "append": 4, "map_write": 2, "map_read": 1,
    "fstat": 4, "fsync": 1, "seek_end": 1, "ftruncate": 3, "fallocate": 2, "fchmod": 2, "fchown": 1,
    "futime": 2, "flock": 2, "copy_range": 2, "tmpfile": 1, "link_handle": 2,
    "stat": 6, "stat_followed": 3, "list": 5, "access": 2, "readlink": 1,
    "mkdir": 6, "rmdir": 4, "unlink": 6, "remove_tree": 1, "rename": 10, "rename_directory": 5,
    "link": 5, "symlink": 3, "mknod": 4, "chmod": 4, "chown": 4, "utime": 3, "truncate": 3,
    "setxattr": 4, "setcap": 1, "setacl": 2, "getxattr": 2, "removexattr": 2, "listxattr": 2,
}  # fmt: skip
