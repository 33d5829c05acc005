"""The node's side: a generation's tree made from its manifest, packages and an older tree.

Runs inside the user's namespace (`inside.run_inside`). Everything is made beneath one directory
descriptor, one component at a time without following links. A run that was killed is gone on with:
a file that is whole has its size and time. Files that the older generation has too are linked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from sdee_launch.deploy import entries, package
from sdee_launch.deploy.entries import Entry
from sdee_launch.deploy.errors import Damaged, DeployProblem
from sdee_launch.deploy.walk import DIRECTORY

FICLONE = 0x40049409
#: Nobody's upper is larger than this (entries): a manifest that claims more is refused.
MAX_ENTRIES = 50_000_000


class Places:
    """Directories beneath a descriptor, opened a component at a time; the last path is kept open."""

    def __init__(self, root: int) -> None:
        self._stack: list[tuple[bytes, int]] = [(b"", root)]

    def directory(self, path: bytes) -> int:
        """A descriptor of the directory `path`, ours until the next call. Raises OSError."""
        parts = path.split(b"/") if path else []
        keep = 0
        while keep < len(parts) and keep + 1 < len(self._stack):
            if self._stack[keep + 1][0] != parts[keep]:
                break
            keep += 1
        while len(self._stack) > keep + 1:
            os.close(self._stack.pop()[1])
        for part in parts[keep:]:
            fd = os.open(part, DIRECTORY, dir_fd=self._stack[-1][1])
            self._stack.append((part, fd))
        return self._stack[-1][1]

    def parent(self, path: bytes) -> tuple[int, bytes]:
        """The directory of an object, and its name there; for the root itself `.`."""
        above, _, name = path.rpartition(b"/")
        return self.directory(above), name or b"."

    def close(self) -> None:
        """Close all but the root."""
        self.directory(b"")


@dataclass
class Result:
    """What applying took."""

    entries: int = 0
    linked: int = 0
    copied: int = 0
    extracted: int = 0
    bytes_read: int = 0


@dataclass
class Apply:
    """One tree in the making. `manifest` and `base_manifest` give their entries anew at each call."""

    root: int
    manifest: Callable[[], Iterable[Entry]]
    base: int | None = None
    base_manifest: Callable[[], Iterable[Entry]] = lambda: ()
    limit: int = 0  # bytes that all files together may have; 0: any
    result: Result = field(default_factory=Result)

    def run(self, packages: Callable[[int], BinaryIO]) -> Result:
        """Make the tree. `packages(N)` opens the package of generation N. Raises Damaged, OSError."""
        self._places = Places(self.root)
        self._sources = Places(self.base) if self.base is not None else None
        try:
            needed = self._skeleton()
            for number in sorted(needed):
                with packages(number) as file:
                    self._extract(number, file)
                    self.result.bytes_read += file.tell()
            self._links()
            self._directories()
        finally:
            self._places.close()
            if self._sources is not None:
                self._sources.close()
        return self.result

    def _pairs(self) -> Iterator[tuple[Entry | None, Entry]]:
        """(entry of base or None, entry) in order."""
        count = 0
        for old, new in entries.merge(self.base_manifest(), self.manifest()):
            if new is not None:
                count += 1
                if count > MAX_ENTRIES:
                    raise Damaged("a manifest has more entries than an upper can have")
                yield old, new

    def _skeleton(self) -> set[int]:
        """Everything but the content of new files; the packages that those need."""
        needed = set()
        first: set[int] = set()
        content = 0
        for old, new in self._pairs():
            self.result.entries += 1
            content += new.size
            if self.limit and content > self.limit:
                raise DeployProblem(
                    f"the environment is larger than a node keeps ({self.limit // 10**6} MB,"
                    " [deploy] cache_limit); sdee deploy plan shows what is large in it"
                )
            if not new.path:
                continue
            dirfd, name = self._places.parent(new.path)
            if new.kind == "d":
                try:
                    os.mkdir(name, 0o700, dir_fd=dirfd)
                except FileExistsError:
                    if not stat.S_ISDIR(os.stat(name, dir_fd=dirfd, follow_symlinks=False).st_mode):
                        raise Damaged(f"{_text(new)} is in the way") from None
                continue
            if new.kind == "f":
                if new.group:
                    if new.group in first:
                        continue
                    first.add(new.group)
                if not self._there(dirfd, name, new) and not self._from_base(old, new, dirfd, name):
                    needed.add(new.generation)
                continue
            _remove(dirfd, name)
            if new.kind == "l":
                os.symlink(new.target, name, dir_fd=dirfd)
            elif new.kind == "c":
                os.mknod(name, stat.S_IFCHR | new.mode, os.makedev(0, 0), dir_fd=dirfd)
            else:
                os.mkfifo(name, new.mode, dir_fd=dirfd)
            _own(dirfd, name, new)
        return needed

    @staticmethod
    def _there(dirfd: int, name: bytes, entry: Entry) -> bool:
        """Whether an earlier run has made this file: the time is the last thing that is set."""
        try:
            status = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return (
            stat.S_ISREG(status.st_mode)
            and (status.st_size, status.st_mtime_ns) == (entry.size, entry.mtime_ns)
            and stat.S_IMODE(status.st_mode) == entry.mode
        )

    def _from_base(self, old: Entry | None, new: Entry, dirfd: int, name: bytes) -> bool:
        """Link or copy the file from the older tree, if it is there with this content."""
        if self._sources is None or old is None or old.kind != "f":
            return False
        if not entries.same_content(old, new):
            return False
        try:
            source_dir, source_name = self._sources.parent(old.path)
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            source = os.open(source_name, flags, dir_fd=source_dir)
        except (FileNotFoundError, NotADirectoryError, OSError):
            return False
        try:
            status = os.fstat(source)
            if not stat.S_ISREG(status.st_mode):
                return False
            if (status.st_size, status.st_mtime_ns) != (old.size, old.mtime_ns):
                return False  # somebody wrote into the cache
            _remove(dirfd, name)
            if entries.same_object(old._replace(group=0), new._replace(group=0)):
                try:
                    os.link(
                        source_name, name, src_dir_fd=source_dir, dst_dir_fd=dirfd,
                        follow_symlinks=False,
                    )  # fmt: skip
                    self.result.linked += 1
                    return True
                except OSError as error:
                    if error.errno not in (errno.EMLINK, errno.EXDEV, errno.EPERM):
                        raise
            with _new_file(dirfd, name) as target:
                _copy(source, target, status.st_size)
                _finish(dirfd, name, target, new)
            self.result.copied += 1
            return True
        finally:
            os.close(source)

    def _missing(self, number: int) -> Iterator[Entry]:
        """Files whose content is in package `number` and not in the tree yet, in order."""
        seen: set[int] = set()
        for new in self.manifest():
            if new.kind != "f" or new.generation != number:
                continue
            if new.group:
                if new.group in seen:
                    continue
                seen.add(new.group)
            dirfd, name = self._places.parent(new.path)
            if not self._there(dirfd, name, new):
                yield new

    def _extract(self, number: int, file: BinaryIO) -> None:
        wanted = self._missing(number)
        entry = next(wanted, None)
        for member in package.read(file):
            key = entries.sort_key(member.path)
            while entry is not None and entries.sort_key(entry.path) < key:
                raise Damaged(f"package {number} lacks {_text(entry)}")
            if entry is None:
                break
            if entry.path != member.path:
                continue  # the base had it, or it is no longer there
            if member.size != entry.size:
                continue  # an attempt while it was being written; another follows
            dirfd, name = self._places.parent(entry.path)
            with _new_file(dirfd, name) as target:
                if member.extract(target) != entry.digest:
                    os.ftruncate(target, 0)
                    continue
                _finish(dirfd, name, target, entry)
            self.result.extracted += 1
            entry = next(wanted, None)
        if entry is not None:
            raise Damaged(f"package {number} lacks {_text(entry)}, or it is not what it was")

    def _links(self) -> None:
        """The further names of files that have several."""
        first: dict[int, bytes] = {}
        others = Places(self.root)
        try:
            for new in self.manifest():
                if new.kind != "f" or not new.group:
                    continue
                if new.group not in first:
                    first[new.group] = new.path
                    continue
                source_dir, source = others.parent(first[new.group])
                dirfd, name = self._places.parent(new.path)
                _remove(dirfd, name)
                os.link(
                    source, name, src_dir_fd=source_dir, dst_dir_fd=dirfd, follow_symlinks=False
                )
        finally:
            others.close()

    def _directories(self) -> None:
        """Owner, mode, xattrs and time of directories, each after what is in it."""
        waiting: list[Entry] = []

        def leave(entry: Entry) -> None:
            fd = os.dup(self._places.directory(entry.path))
            try:
                _metadata(fd, entry)
                os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
            finally:
                os.close(fd)

        for new in self.manifest():
            if new.kind != "d":
                continue
            while waiting:
                above = waiting[-1].path
                if not above or new.path.startswith(above + b"/"):
                    break
                leave(waiting.pop())
            waiting.append(new)
        while waiting:
            leave(waiting.pop())


def _text(entry: Entry) -> str:
    return os.fsdecode(entry.path)


def _remove(dirfd: int, name: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=dirfd)


@contextlib.contextmanager
def _new_file(dirfd: int, name: bytes) -> Iterator[int]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, 0o600, dir_fd=dirfd)
    except FileExistsError:
        os.unlink(name, dir_fd=dirfd)
        fd = os.open(name, flags, 0o600, dir_fd=dirfd)
    try:
        yield fd
    finally:
        os.close(fd)


def _copy(source: int, target: int, size: int) -> None:
    """Share the extents, else copy the pieces between holes."""
    try:
        fcntl.ioctl(target, FICLONE, source)
        return
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV):
            raise
    for offset, length in package.pieces(source, size):
        end = offset + length
        while offset < end:
            done = os.copy_file_range(source, target, end - offset, offset, offset)
            if not done:
                raise Damaged("a cached file got shorter")
            offset += done
    os.ftruncate(target, size)


def _chown(call: Callable[[], None], entry: Entry) -> None:
    try:
        call()
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise DeployProblem(
                f"{_text(entry)} belongs to {entry.uid}:{entry.gid}, which is outside the user's"
                " subordinate ids on this node; give them the same range as on the login node"
            ) from None
        raise


def _own(dirfd: int, name: bytes, entry: Entry) -> None:
    """Owner and times of what has no content."""
    _chown(lambda: os.chown(name, entry.uid, entry.gid, dir_fd=dirfd, follow_symlinks=False), entry)
    if entry.kind == "p":
        os.chmod(name, entry.mode, dir_fd=dirfd)
    os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=dirfd, follow_symlinks=False)


def _metadata(fd: int, entry: Entry) -> None:
    _chown(lambda: os.chown(fd, entry.uid, entry.gid), entry)
    os.chmod(fd, entry.mode)
    wanted = dict(entry.xattrs)
    for name in os.listxattr(fd):
        if os.fsencode(name).startswith(b"user.") and os.fsencode(name) not in wanted:
            os.removexattr(fd, name)
    for name_bytes, value in wanted.items():
        try:
            os.setxattr(fd, name_bytes, value)
        except OSError as error:
            raise DeployProblem(
                f"{_text(entry)}: its attribute {os.fsdecode(name_bytes)} can't be set:"
                f" {error.strerror}"
            ) from None


def _finish(dirfd: int, name: bytes, fd: int, entry: Entry) -> None:
    """Metadata of a file, the time last: a file with the right time is whole."""
    _metadata(fd, entry)
    os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
