"""Uppers, state directories and caches of a real user, made inside the user's namespace."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdee_launch.accounts import Account, account_of
from sdee_launch.deploy import api, cache
from sdee_launch.deploy.inside import run_inside

Tree = dict[str, tuple[object, ...]]


def describe(root: str) -> Tree:
    """Every object of a tree with all that a node would see. Call it inside."""
    found: Tree = {}
    names: dict[int, str] = {}
    stack = [""]
    while stack:
        path = stack.pop()
        full = os.path.join(root, path) if path else root
        status = os.lstat(full)
        common = (stat.S_IFMT(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns)
        if stat.S_ISREG(status.st_mode):
            first = names.setdefault(status.st_ino, path) if status.st_nlink > 1 else path
            with open(full, "rb") as file:
                digest = hashlib.sha256(file.read()).hexdigest()
            found[path] = (*common, stat.S_IMODE(status.st_mode), digest, first, _xattrs(full))
        elif stat.S_ISLNK(status.st_mode):
            found[path] = (*common, os.readlink(full))
        elif stat.S_ISDIR(status.st_mode):
            found[path] = (*common, stat.S_IMODE(status.st_mode), _xattrs(full))
            stack += sorted((os.path.join(path, n) for n in os.listdir(full)), reverse=True)
        else:
            found[path] = (*common, stat.S_IMODE(status.st_mode), status.st_rdev)
    return found


def _xattrs(path: str) -> list[tuple[str, str]]:
    return sorted((n, os.getxattr(path, n).hex()) for n in os.listxattr(path))


def contents(tree: Tree) -> dict[str, object]:
    """Paths and digests of the regular files."""
    return {p: v[5] for p, v in tree.items() if v[0] == stat.S_IFREG}


@dataclass
class Lab:
    """One user's upper, state and cache in a directory of the test."""

    account: Account
    place: Path

    @property
    def upper(self) -> str:
        return str(self.place / "upper")

    @property
    def state(self) -> str:
        return str(self.place / "state")

    @property
    def cache(self) -> str:
        return str(self.place / "cache")

    def inside(self, work: Callable[[], Any]) -> Any:
        """Do something as root of the user's namespace."""
        return run_inside(self.account, work)

    def tree(self, path: str | None = None) -> Tree:
        """What is in a tree (upper if none is named)."""
        found = self.inside(lambda: describe(path or self.upper))
        return {p: tuple(map(_hashable, v)) for p, v in found.items()}

    def submit(self, *exclude: str, checksum: bool = False) -> api.Submitted:
        """A generation of upper."""
        return api.submit(self.account, self.upper, self.state, exclude, checksum=checksum)

    def ensure(self, submitted: api.Submitted, key: str = "job-1") -> cache.Ensured:
        """That generation in the cache."""
        number = submitted.generation.number
        return api.ensure(self.account, self.cache, self.state, submitted.identity, number, key)


def _hashable(value: object) -> object:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def make_lab(uid: int, place: Path) -> Lab:
    """A lab in `place`, which every user may pass through."""
    place.chmod(0o711)
    lab = Lab(account_of(uid), place)
    for name in ("upper", "state"):
        (place / name).mkdir()
        os.chown(place / name, lab.account.uid, lab.account.gid)
    return lab


def fill(upper: str) -> None:
    """An upper with everything that an upper can have. Call it inside."""
    os.makedirs(f"{upper}/etc/deep")
    with open(f"{upper}/etc/hosts", "w") as file:
        file.write("127.0.0.1 localhost\n")
    with open(f"{upper}/etc/deep/tool", "w") as file:
        file.write("#!/bin/sh\n")
    os.chmod(f"{upper}/etc/deep/tool", 0o4755)
    os.link(f"{upper}/etc/deep/tool", f"{upper}/etc/alias")
    os.symlink("../no/where", f"{upper}/etc/link")
    os.mknod(f"{upper}/etc/gone", stat.S_IFCHR, 0)
    os.mkfifo(f"{upper}/etc/pipe", 0o620)
    os.setxattr(f"{upper}/etc/deep", "user.overlay.opaque", b"y")
    os.setxattr(f"{upper}/etc/hosts", "user.note", b"\0\xff")
    os.chown(f"{upper}/etc/hosts", 101, 33)
    with open(f"{upper}/etc/holes", "wb") as file:
        file.seek(5 << 20)
        file.write(b"end")
        file.truncate(9 << 20)
    with open(os.fsencode(upper) + b"/etc/odd \n\xff\\name", "wb") as file:
        file.write(b"odd")
    os.mkdir(f"{upper}/etc/shut", 0o000)
    os.chmod(f"{upper}/etc", 0o755)
    os.utime(f"{upper}/etc", ns=(1, 1234567890123456789))
