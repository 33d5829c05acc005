"""Checking an upper that isn't mounted: what a crash or another program may have left in it."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from sdeefs.diff import _Lowers
from sdeefs.layer_format import (
    PREFIXES,
    Object,
    entries,
    open_below,
    open_root,
)

#: What overlayfs itself writes below its prefix (Documentation/filesystems/overlayfs.rst), and
#: the one word of ours (`sdeefs.core.formats`), which it ignores.
_KNOWN = {
    b"opaque", b"redirect", b"origin", b"impure", b"nlink", b"upper", b"uuid", b"metacopy",
    b"protattr", b"whiteout", b"sdeefs.secret",
}  # fmt: skip
_ESCAPE = b"overlay."  # of an overlay nested in merged: `PREFIX + overlay.NAME`


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `path` is relative to upper, or absolute in the work directory."""

    path: bytes
    problem: str
    repair: str  # what --repair does; "" where only a person can decide
    repaired: bool = False

    def as_json(self) -> dict[str, object]:
        """The finding as `--json` prints it."""
        return {
            "path": os.fsdecode(self.path),
            "problem": self.problem,
            "repair": self.repair,
            "repaired": self.repaired,
        }


Repair = Callable[[], None]
_Found = Iterator[tuple[Finding, Repair | None]]


def check(
    upper: bytes, lowers: Sequence[bytes], work: bytes | None, *, repair: bool
) -> Iterator[Finding]:
    """Walk work and upper, and mend what can be mended if told to. Raises OSError.

    The caller makes sure that nothing has upper mounted.
    """
    with ExitStack() as stack:
        roots = []
        for path in lowers:
            roots.append(open_root(path))
            stack.callback(os.close, roots[-1])
        top = open_root(upper)
        stack.callback(os.close, top)
        below = _Lowers(tuple(roots), tuple(roots), stack) if roots else None
        if work is not None:
            yield from _mend(_left_over(work), repair)
        yield from _mend(_walk(top, b"", below, marked=_marks(upper)), repair)


def _mend(found: _Found, repair: bool) -> Iterator[Finding]:
    for finding, action in found:
        if repair and action is not None:
            action()
            yield replace(finding, repaired=True)
        else:
            yield finding


def _left_over(work: bytes) -> _Found:
    """Work files of a server (or kernel) that was killed: the next mount would remove them too.

    What stays between mounts isn't one: overlayfs's empty `work`, and `index`, which keeps hard
    links together.
    """
    try:
        top = open_root(work)
    except FileNotFoundError:
        return
    try:
        for entry in entries(top):
            where = os.path.join(work, entry.name)
            if entry.name == b"index":
                continue
            if not stat.S_ISDIR(entry.stat.st_mode):
                yield (
                    Finding(where, "left-over work file", "remove it"),
                    lambda w=where: os.unlink(w),  # type: ignore[misc]
                )
                continue
            inner = open_below(top, entry.name)
            try:
                for left in entries(inner):
                    path = os.path.join(where, left.name)
                    if left.name in (b"incompat", b"lock"):
                        continue
                    yield (
                        Finding(path, "left-over work file", "remove it"),
                        lambda p=path, e=left: _remove(p, e),  # type: ignore[misc]
                    )
            finally:
                os.close(inner)
    finally:
        os.close(top)


def _remove(path: bytes, entry: Object) -> None:
    if stat.S_ISDIR(entry.stat.st_mode):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _marks(path: bytes) -> bool:
    """Whether a directory is marked as one that may hold whiteouts in xattrs."""
    for prefix in PREFIXES:
        try:
            if os.getxattr(path, prefix + b"opaque", follow_symlinks=False) == b"x":
                return True
        except OSError:
            continue
    return False


def _walk(directory: int, path: bytes, lowers: _Lowers | None, *, marked: bool) -> _Found:
    for entry in entries(directory):
        where = path + entry.name
        yield from _entry(directory, entry, where, lowers, marked)
        if stat.S_ISDIR(entry.stat.st_mode):
            fd = open_below(directory, entry.name)
            try:
                below = _below(entry, lowers)
                try:
                    yield from _walk(
                        fd, where + b"/", below, marked=entry.overlay(b"opaque") in (b"x", b"y")
                    )
                finally:
                    if below is not None:
                        below.close()
            finally:
                os.close(fd)


def _below(entry: Object, lowers: _Lowers | None) -> _Lowers | None:
    if lowers is None:
        return None
    if entry.is_opaque:
        return _Lowers(lowers.root, (), lowers._stack)
    redirect = entry.overlay(b"redirect")
    if redirect is None:
        return lowers.below(entry.name)
    return lowers.at(redirect) if redirect.startswith(b"/") else lowers.below(redirect)


def _entry(
    directory: int, entry: Object, where: bytes, lowers: _Lowers | None, marked: bool
) -> _Found:
    path = b"/proc/self/fd/%d/%s" % (directory, entry.name)
    is_directory = stat.S_ISDIR(entry.stat.st_mode)

    def drop(*names: bytes) -> Repair:
        def action() -> None:
            for name in names:
                os.removexattr(path, name, follow_symlinks=False)

        return action

    for key, value in entry.xattrs.items():
        prefix = next((p for p in PREFIXES if key.startswith(p)), None)
        if prefix is None:
            continue
        name = key.removeprefix(prefix)
        shown = os.fsdecode(key)
        if name.startswith(_ESCAPE):
            continue
        if name not in _KNOWN:
            yield Finding(where, f"foreign overlay xattr {shown}", "remove it"), drop(key)
        elif name == b"opaque" and (not is_directory or value not in (b"x", b"y")):
            what = "on something that is no directory" if not is_directory else f"says {value!r}"
            yield Finding(where, f"broken opaque mark: {shown} {what}", "remove it"), drop(key)
        elif name == b"whiteout":
            if not stat.S_ISREG(entry.stat.st_mode) or entry.stat.st_size:
                yield (
                    Finding(
                        where, f"broken whiteout: {shown} on what isn't an empty file", "remove it"
                    ),
                    drop(key),
                )
            elif not marked:
                yield (
                    Finding(
                        where,
                        f"broken whiteout: its directory lacks {os.fsdecode(prefix)}opaque=x",
                        "mark the directory",
                    ),
                    lambda p=prefix: os.setxattr(  # type: ignore[misc]
                        b"/proc/self/fd/%d" % directory, p + b"opaque", b"x"
                    ),
                )
                marked = True
        elif name == b"redirect":
            yield from _redirect(entry, value, where, shown, lowers, drop(key), is_directory)
        elif name == b"metacopy":
            yield Finding(where, f"{shown}: its data is still in lower; not supported", ""), None


def _redirect(
    entry: Object,
    value: bytes,
    where: bytes,
    shown: str,
    lowers: _Lowers | None,
    drop: Repair,
    is_directory: bool,
) -> _Found:
    parts = value.strip(b"/").split(b"/")
    broken = (
        not is_directory
        or b"" in parts
        or b".." in parts
        or b"." in parts
        or (not value.startswith(b"/") and len(parts) > 1)
    )
    if broken and entry.overlay(b"metacopy") is None:
        yield Finding(where, f"broken redirect: {shown}={value!r}", "remove it"), drop
        return
    if lowers is None or not is_directory:
        return
    target = lowers.at(value) if value.startswith(b"/") else lowers.below(value)
    with ExitStack() as stack:
        stack.callback(target.close)
        if not target.fds:
            # What the directory had in lower is lost to merged either way.
            yield (
                Finding(
                    where, f"redirect leads nowhere in lower: {os.fsdecode(value)}", "remove it"
                ),
                drop,
            )
