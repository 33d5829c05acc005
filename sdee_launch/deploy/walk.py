"""Walking an upper: every object in a manifest's order, whatever its depth and names.

One descriptor is open at a time besides the root's: going back is `..`, checked to be the
directory that we came from, so that depth costs neither descriptors nor PATH_MAX.
"""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sdee_launch.deploy.entries import XATTRS, Entry
from sdee_launch.deploy.errors import DeployProblem

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
KINDS = {stat.S_IFREG: "f", stat.S_IFDIR: "d", stat.S_IFLNK: "l", stat.S_IFIFO: "p"}
#: These name objects of the source's disk.
LOCAL_XATTRS = (
    b"user.overlay.origin",
    b"user.overlay.impure",
    b"user.overlay.nlink",
    b"user.overlay.uuid",
    b"user.overlay.upper",
    b"user.overlay.protattr",
)


@dataclass
class Found:
    """An object of the walk: its entry, and where it can be opened."""

    entry: Entry
    dirfd: int
    name: bytes
    status: os.stat_result


@dataclass
class Walk:
    """One walk. `skipped` counts sockets and other things that don't travel."""

    root: int
    excluded: Callable[[bytes], bool]
    skipped: int = 0
    vanished: int = 0
    _links: dict[tuple[int, int], int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Found]:
        fd = os.dup(self.root)
        stack: list[tuple[list[bytes], os.stat_result]] = []
        path = b""
        try:
            status = os.fstat(fd)
            yield Found(self._entry(b"", status, fd, b"."), fd, b".", status)
            names = self._names(fd)
            while True:
                if not names:
                    if not stack:
                        return
                    names, expected = stack.pop()
                    fd = self._back(fd, expected, path)
                    path = path.rpartition(b"/")[0]
                    continue
                name = names.pop()
                below = path + b"/" + name if path else name
                try:
                    status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    if self.excluded(below) or not self._travels(status):
                        self.skipped += 1
                        continue
                    entry = self._entry(below, status, fd, name)
                except FileNotFoundError:
                    self.vanished += 1
                    continue
                yield Found(entry, fd, name, status)
                if entry.kind == "d":
                    try:
                        child = os.open(name, DIRECTORY, dir_fd=fd)
                    except (FileNotFoundError, NotADirectoryError):
                        self.vanished += 1
                        continue
                    stack.append((names, os.fstat(fd)))
                    os.close(fd)
                    fd, path = child, below
                    names = self._names(fd)
        finally:
            os.close(fd)

    @staticmethod
    def _names(fd: int) -> list[bytes]:
        """The names of a directory, the last first."""
        return sorted((os.fsencode(name) for name in os.listdir(fd)), reverse=True)

    @staticmethod
    def _back(fd: int, expected: os.stat_result, path: bytes) -> int:
        parent = os.open("..", DIRECTORY, dir_fd=fd)
        os.close(fd)
        status = os.fstat(parent)
        if (status.st_dev, status.st_ino) != (expected.st_dev, expected.st_ino):
            os.close(parent)
            raise DeployProblem(f"{os.fsdecode(path)} was moved while it was read; try again")
        return parent

    @staticmethod
    def _travels(status: os.stat_result) -> bool:
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFCHR:
            return status.st_rdev == 0  # a whiteout; any other device is the node's own matter
        return kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO)

    def _entry(self, path: bytes, status: os.stat_result, dirfd: int, name: bytes) -> Entry:
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "c")
        mode = stat.S_IMODE(status.st_mode)
        who = (status.st_uid, status.st_gid, status.st_mtime_ns)
        if kind == "l":
            return Entry(path, kind, mode, *who, 0, os.fsencode(os.readlink(name, dir_fd=dirfd)))
        if kind != "f":
            return Entry(path, kind, mode, *who, 0, b"", xattrs(dirfd, name) if kind == "d" else ())
        group = 0
        if status.st_nlink > 1:
            key = (status.st_dev, status.st_ino)
            group = self._links.setdefault(key, len(self._links) + 1)
        marks = xattrs(dirfd, name)
        change = (status.st_ctime_ns, status.st_ino)
        return Entry(path, kind, mode, *who, status.st_size, b"", marks, group, 0, "", *change)


def remove_tree(path: str | bytes, dirfd: int | None = None) -> None:
    """Remove whatever is at `path`, however deep; nothing there is fine. Raises DeployProblem."""
    try:
        os.stat(path, dir_fd=dirfd, follow_symlinks=False)
    except FileNotFoundError:
        return
    # rm goes below PATH_MAX and any number of levels, which shutil.rmtree's recursion can't.
    place = None if dirfd is None else f"/proc/self/fd/{dirfd}"
    done = subprocess.run(["rm", "-rf", "--", path], cwd=place, capture_output=True)
    if done.returncode:
        reason = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise DeployProblem(f"{os.fsdecode(path)} can't be removed: {reason[-1:]}")


def xattrs(dirfd: int, name: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """The extended attributes of a file or directory that travel, sorted."""
    path = b"/proc/self/fd/%d/%s" % (dirfd, name)
    found = []
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EACCES, errno.EPERM):
            return ()
        raise
    for text in names:
        one = os.fsencode(text)
        if one.startswith(XATTRS) and one not in LOCAL_XATTRS:
            try:
                found.append((one, os.getxattr(path, one, follow_symlinks=False)))
            except OSError as error:
                if error.errno != errno.ENODATA:
                    raise
    return tuple(sorted(found))
