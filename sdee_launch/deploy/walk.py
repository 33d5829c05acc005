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
KINDS = {
    stat.S_IFREG: "f",
    stat.S_IFDIR: "d",
    stat.S_IFLNK: "l",
    stat.S_IFIFO: "p",
    stat.S_IFCHR: "c",
}
#: These name objects of the source's disk.
LOCAL_XATTRS = (
    b"user.overlay.origin",
    b"user.overlay.impure",
    b"user.overlay.nlink",
    b"user.overlay.uuid",
    b"user.overlay.upper",
    b"user.overlay.protattr",
)


@dataclass(slots=True)
class Found:
    """An object of the walk, and where it can be opened while the walk stands at it.

    `marks` are a directory's extended attributes; those of a file are read by whoever opens it. Its
    group is given by whoever needs it: `Walk.group` remembers every file it is asked of.
    """

    path: bytes
    kind: str  # as in `Entry`
    status: os.stat_result
    dirfd: int
    name: bytes
    target: bytes = b""
    marks: tuple[tuple[bytes, bytes], ...] = ()
    group: int = 0

    @property
    def entry(self) -> Entry:
        """Its entry, made anew at each call."""
        path, kind, status = self.path, self.kind, self.status
        mode = stat.S_IMODE(status.st_mode)
        who = (status.st_uid, status.st_gid, status.st_mtime_ns)
        if kind != "f":
            return Entry(path, kind, mode, *who, 0, self.target, self.marks)
        change = (status.st_ctime_ns, status.st_ino)
        return Entry(path, kind, mode, *who, status.st_size, b"", (), self.group, 0, "", *change)


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
        child = -1  # a directory that is entered next
        stack: list[tuple[list[bytes], os.stat_result]] = []
        path = b""
        try:
            status = os.fstat(fd)
            yield Found(b"", "d", status, fd, b".", marks=xattrs(fd))
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
                    kind = self._kind(status)
                    if not kind or self.excluded(below):
                        self.skipped += 1
                        continue
                    found = Found(below, kind, status, fd, name)
                    if kind == "l":
                        found.target = os.readlink(name, dir_fd=fd)
                    if kind == "d":
                        child = os.open(name, DIRECTORY, dir_fd=fd)
                        found.marks = xattrs(child)
                except (FileNotFoundError, NotADirectoryError):
                    self.vanished += 1
                    continue
                yield found
                if kind == "d":
                    stack.append((names, os.fstat(fd)))
                    os.close(fd)
                    fd, path, child = child, below, -1
                    names = self._names(fd)
        finally:
            os.close(fd)
            if child >= 0:
                os.close(child)

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
    def _kind(status: os.stat_result) -> str:
        """As in `Entry`; empty: it doesn't travel."""
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "")
        # A whiteout; any other device is the node's own matter.
        return "" if kind == "c" and status.st_rdev else kind

    def group(self, status: os.stat_result) -> int:
        """As in `Entry`: the number of a file that has several names, here or elsewhere."""
        if status.st_nlink == 1:
            return 0
        return self._links.setdefault((status.st_dev, status.st_ino), len(self._links) + 1)


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


def xattrs(fd: int) -> tuple[tuple[bytes, bytes], ...]:
    """The extended attributes of an open file or directory that travel, sorted."""
    found = []
    try:
        names = os.listxattr(fd)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EACCES, errno.EPERM):
            return ()
        raise
    for text in names:
        one = os.fsencode(text)
        if one.startswith(XATTRS) and one not in LOCAL_XATTRS:
            try:
                found.append((one, os.getxattr(fd, one)))
            except OSError as error:
                if error.errno != errno.ENODATA:
                    raise
    return tuple(sorted(found))
