"""What an upper changes in its lowers, read from the layers themselves, mounted or not."""

from __future__ import annotations

import enum
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

from sdeefs.layer_format import (
    OPAQUE_PREFIX,
    OVERRIDE_STAT,
    PREFIXES,
    WHITEOUT_PREFIX,
    Object,
    entries,
    look_up,
    open_below,
    open_root,
)


class Change(enum.Enum):
    """The kinds of difference, with the letter that `sdeefs diff` prints."""

    ADDED = "A"
    CHANGED = "C"
    DELETED = "D"
    OPAQUE = "O"
    TYPE = "T"
    MOVED = "R"


_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFCHR: "char device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


@dataclass(frozen=True)
class Difference:
    """One difference. `path` is relative to merged; `kind` what merged has there ("" if deleted)."""

    change: Change
    path: bytes
    kind: str
    was: str = ""  # what lower has there
    origin: bytes = b""  # of MOVED: where lower has it

    def as_json(self) -> dict[str, str]:
        """The difference as `--json` prints it."""
        found = {
            "change": self.change.name.lower(),
            "path": os.fsdecode(self.path),
            "kind": self.kind,
        }
        if self.was:
            found["was"] = self.was
        if self.origin:
            found["origin"] = os.fsdecode(self.origin)
        return found


@dataclass(frozen=True)
class _Rules:
    prefix: bool
    owners: bool


class _Lowers:
    """One directory as the stack of lowers shows it: descriptors from the top down."""

    def __init__(self, root: tuple[int, ...], fds: Sequence[int], stack: ExitStack) -> None:
        self.root = root
        self.fds = fds
        self._stack = stack

    def look_up(self, name: bytes) -> Object | None:
        """The object that the stack shows under this name."""
        for fd in self.fds:
            found = look_up(fd, name)
            if found is not None:
                return None if found.is_whiteout else found
        return None

    def below(self, name: bytes) -> _Lowers:
        """The directory of this name; empty where the stack shows none."""
        return self._merge(self.fds, name)

    def at(self, path: bytes) -> _Lowers:
        """A directory by its path from the roots (a redirect)."""
        here = _Lowers(self.root, self.root, self._stack)
        for part in path.strip(b"/").split(b"/"):
            here = here.below(part) if part else here
        return here

    def _merge(self, fds: Sequence[int], name: bytes) -> _Lowers:
        found = []
        for fd in fds:
            entry = look_up(fd, name)
            if entry is None:
                continue
            if not stat.S_ISDIR(entry.stat.st_mode) or entry.is_whiteout:
                break
            try:
                found.append(open_below(fd, name))
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise
                break
            if entry.is_opaque:
                break
        return _Lowers(self.root, tuple(found), self._stack)

    def close(self) -> None:
        """Close this directory's descriptors (not the roots)."""
        for fd in self.fds:
            if fd not in self.root:
                os.close(fd)


_NOTHING: tuple[int, ...] = ()


def differences(
    upper: bytes, lowers: Sequence[bytes], *, prefix: bool = False, owners: bool = True
) -> Iterator[Difference]:
    """Walk an upper and say what it changes, parents first, in the order of names.

    `prefix` reads `.wh.NAME` as deletions too; `owners` compares uids and gids (not useful where
    the layers are id-mapped). Raises OSError.
    """
    with ExitStack() as stack:
        roots = []
        for path in lowers:
            roots.append(open_root(path))
            stack.callback(os.close, roots[-1])
        top = open_root(upper)
        stack.callback(os.close, top)
        below = _Lowers(tuple(roots), tuple(roots), stack)
        yield from _walk(top, below, b"", _Rules(prefix, owners))


def _walk(directory: int, lowers: _Lowers, path: bytes, rules: _Rules) -> Iterator[Difference]:
    for entry in entries(directory):
        name = entry.name
        if rules.prefix and name.startswith(WHITEOUT_PREFIX):
            if name != OPAQUE_PREFIX:
                hidden = name.removeprefix(WHITEOUT_PREFIX)
                yield from _deleted(lowers, hidden, path + hidden)
            continue
        where = path + name
        if entry.is_whiteout:
            yield from _deleted(lowers, name, where)
            continue
        found = lowers.look_up(name)
        kind = _KINDS.get(entry.kind, "?")
        if entry.kind != stat.S_IFDIR:
            change = _compare(directory, entry, lowers, found, rules)
            if change is not None:
                was = _KINDS.get(found.kind, "?") if found is not None else ""
                yield Difference(change, where, kind, was if change is Change.TYPE else "")
            continue
        yield from _directory(directory, entry, lowers, found, where, rules)


def _deleted(lowers: _Lowers, name: bytes, where: bytes) -> Iterator[Difference]:
    found = lowers.look_up(name)
    if found is not None:  # a whiteout over nothing changes nothing
        yield Difference(Change.DELETED, where, "", _KINDS.get(found.kind, "?"))


def _directory(
    directory: int,
    entry: Object,
    lowers: _Lowers,
    found: Object | None,
    where: bytes,
    rules: _Rules,
) -> Iterator[Difference]:
    redirect = entry.overlay(b"redirect")
    fd = open_below(directory, entry.name)
    try:
        opaque = entry.is_opaque or (rules.prefix and look_up(fd, OPAQUE_PREFIX) is not None)
        if found is not None and found.kind != stat.S_IFDIR:
            yield Difference(Change.TYPE, where, "directory", _KINDS.get(found.kind, "?"))
            below = _Lowers(lowers.root, _NOTHING, lowers._stack)
        elif redirect is not None:
            origin = redirect if redirect.startswith(b"/") else _sibling(where, redirect)
            below = lowers.at(redirect) if redirect.startswith(b"/") else lowers.below(redirect)
            yield Difference(Change.MOVED, where, "directory", "", origin.strip(b"/"))
        elif found is None:
            yield Difference(Change.ADDED, where, "directory")
            below = _Lowers(lowers.root, _NOTHING, lowers._stack)
        elif opaque:
            yield Difference(Change.OPAQUE, where, "directory")
            below = _Lowers(lowers.root, _NOTHING, lowers._stack)
        else:
            if _metadata(entry, found, rules):
                yield Difference(Change.CHANGED, where, "directory")
            below = lowers.below(entry.name)
        with closing(below):
            yield from _walk(fd, below, where + b"/", rules)
    finally:
        os.close(fd)


def _sibling(where: bytes, name: bytes) -> bytes:
    return os.path.join(os.path.dirname(where), name)


def _compare(
    directory: int, entry: Object, lowers: _Lowers, found: Object | None, rules: _Rules
) -> Change | None:
    if found is None:
        return Change.ADDED
    if found.kind != entry.kind:
        return Change.TYPE
    if _metadata(entry, found, rules):
        return Change.CHANGED
    if entry.kind == stat.S_IFLNK:
        for fd in lowers.fds:
            try:
                there = os.readlink(entry.name, dir_fd=fd)
            except OSError:
                continue
            here = os.readlink(entry.name, dir_fd=directory)
            return None if here == there else Change.CHANGED
    if entry.kind in (stat.S_IFCHR, stat.S_IFBLK):
        return None if entry.stat.st_rdev == found.stat.st_rdev else Change.CHANGED
    if entry.kind == stat.S_IFREG:
        # The rule of deployment: size and time tell whether contents differ.
        same = (entry.stat.st_size, entry.stat.st_mtime_ns) == (
            found.stat.st_size,
            found.stat.st_mtime_ns,
        )
        return None if same else Change.CHANGED
    return None


def _metadata(entry: Object, found: Object, rules: _Rules) -> bool:
    """Whether mode, owner or extended attributes differ, overlayfs's own left aside."""
    if entry.kind != stat.S_IFLNK and stat.S_IMODE(entry.mode) != stat.S_IMODE(found.mode):
        return True
    if rules.owners and entry.owner != found.owner:
        return True
    return _own(entry) != _own(found)


def _own(entry: Object) -> dict[bytes, bytes]:
    return {
        key: value
        for key, value in entry.xattrs.items()
        if not key.startswith(PREFIXES) and key != OVERRIDE_STAT
    }
