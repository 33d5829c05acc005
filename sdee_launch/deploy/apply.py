"""The node's side: a generation's tree made from its manifest, packages and an older tree.

Runs inside the user's namespace (`inside.run_inside`). Everything is made beneath one directory
descriptor, one component at a time without following links. A run that was killed is gone on with:
a file that is whole has its size and time. Files that the older generation has too are linked.

Of each object as much is done as its state needs: in a tree that was empty when we began nothing
can be in the way, and what is new belongs to root of the namespace already.
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
from sdee_launch.deploy.entries import Entry, Line
from sdee_launch.deploy.errors import Damaged, DeployProblem
from sdee_launch.deploy.walk import DIRECTORY

FICLONE = 0x40049409
#: Nobody's upper is larger than this (entries): a manifest that claims more is refused.
MAX_ENTRIES = 50_000_000
#: So many lines that are needed again are held; of a larger manifest all are read again.
KEEP = 1 << 15


class Places:
    """Directories beneath a descriptor, opened a component at a time; the last path is kept open."""

    def __init__(self, root: int) -> None:
        self._stack: list[tuple[bytes, int]] = [(b"", root)]
        self._path = b""

    def directory(self, path: bytes) -> int:
        """A descriptor of the directory `path`, ours until the next call. Raises OSError."""
        if path == self._path:
            return self._stack[-1][1]
        parts = path.split(b"/") if path else []
        self._path = b"/"  # nobody's, until we are there
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
        self._path = path
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
    """One tree in the making. `manifest` and `base_manifest` give their lines anew at each call.

    What base's manifest says was checked when base was made. The umask is 0.
    """

    root: int
    manifest: Callable[[], Iterable[Line]]
    base: int | None = None
    base_manifest: Callable[[], Iterable[Line]] = lambda: ()
    limit: int = 0  # bytes that all files together may have; 0: any
    result: Result = field(default_factory=Result)

    def run(self, packages: Callable[[int], BinaryIO]) -> Result:
        """Make the tree. `packages(N)` opens the package of generation N. Raises Damaged, OSError."""
        # A directory of another group could hand that on (bsdgroups, S_ISGID).
        self._fresh = not os.listdir(self.root) and os.fstat(self.root).st_gid == 0
        self._places = Places(self.root)
        self._sources = Places(self.base) if self.base is not None else None
        self._groups: set[int] = set()
        self._rest: list[Line] | None = []  # what the skeleton isn't done with; None: too much
        try:
            needed = self._skeleton()
            for number in sorted(needed):
                with packages(number) as file:
                    self._extract(number, file)
                    self.result.bytes_read += file.tell()
            if self._groups:
                self._links()
            self._directories()
        finally:
            self._places.close()
            if self._sources is not None:
                self._sources.close()
        return self.result

    def _skeleton(self) -> set[int]:
        """Everything but the content of new files; the packages that those need."""
        needed = set()
        content = 0
        for old, line in entries.merge(self.base_manifest(), self.manifest()):
            if line is None:
                continue
            self.result.entries += 1
            if self.result.entries > MAX_ENTRIES:
                raise Damaged("a manifest has more entries than an upper can have")
            waiting = self._waiting(line)
            if waiting is not None:
                content += waiting[0]
                needed.add(waiting[1])
                self._bounded(content)
                self._keep(line)
                continue
            size = self._linked(old, line)
            new = line.entry() if size is None else None
            content += (size or 0) if new is None else new.size
            self._bounded(content)
            if new is None:
                continue
            made = not new.path or self._make(old, new)
            if not made:
                needed.add(new.generation)
            if not made or new.kind == "d" or new.group:
                self._keep(line)
        return needed

    def _keep(self, line: Line) -> None:
        if self._rest is not None:
            self._rest.append(line)
            if len(self._rest) > KEEP:
                self._rest = None

    def _again(self) -> Iterable[Line]:
        """Lines with all that the skeleton isn't done with, in order."""
        return self.manifest() if self._rest is None else self._rest

    def _bounded(self, content: int) -> None:
        if self.limit and content > self.limit:
            raise DeployProblem(
                f"the environment is larger than a node keeps ({self.limit // 10**6} MB,"
                " [deploy] cache_limit); sdee deploy plan shows what is large in it"
            )

    def _waiting(self, line: Line) -> tuple[int, int] | None:
        """(size, generation) of a file of one name that only its package can bring: nothing is done
        for it now, and what its line says is checked when the package is read."""
        if not self._fresh or self._sources is not None:
            return None
        try:
            _, kind, _, _, _, _, size, _, _, group, generation, *_ = line.text.split(b"\t")
            return (int(size), int(generation)) if kind == b"f" and group == b"0" else None
        except ValueError:
            return None  # told by whoever reads it all

    def _linked(self, old: Line | None, line: Line) -> int | None:
        """The size of a file that is as base has it and has been linked; else None."""
        if self._sources is None or old is None or not entries.same_but_for_change(old, line):
            return None
        _, kind, _, _, _, mtime, size, _, _, group, *_ = line.text.split(b"\t")
        if kind != b"f" or group != b"0":
            return None
        try:
            source_dir, source = self._sources.parent(line.path)
            status = os.stat(source, dir_fd=source_dir, follow_symlinks=False)
        except OSError:
            return None
        if not _whole(status, int(size), int(mtime)):
            return None  # somebody wrote into the cache
        dirfd, name = self._places.parent(line.path)
        self._clear(dirfd, name)
        return status.st_size if self._link(source_dir, source, dirfd, name) else None

    def _link(self, source_dir: int, source: bytes, dirfd: int, name: bytes) -> bool:
        """Another name for a file of base, where its filesystem can."""
        try:
            os.link(source, name, src_dir_fd=source_dir, dst_dir_fd=dirfd, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EMLINK, errno.EXDEV, errno.EPERM):
                raise
            return False
        self.result.linked += 1
        return True

    def _make(self, old: Line | None, new: Entry) -> bool:
        """Make one object; whether all of it is there, which of a new file the content isn't."""
        dirfd, name = self._places.parent(new.path)
        if new.kind == "f":
            if new.group:
                if new.group in self._groups:
                    return True  # `_links` makes its further names
                self._groups.add(new.group)
            there = not self._fresh and self._there(dirfd, name, new)
            return there or self._from_base(old, new, dirfd, name)
        if new.kind == "d":
            try:
                os.mkdir(name, 0o700, dir_fd=dirfd)
            except FileExistsError:
                if not stat.S_ISDIR(os.stat(name, dir_fd=dirfd, follow_symlinks=False).st_mode):
                    raise Damaged(f"{_text(new)} is in the way") from None
            return True
        self._clear(dirfd, name)
        if new.kind == "l":
            os.symlink(new.target, name, dir_fd=dirfd)
        elif new.kind == "c":
            os.mknod(name, stat.S_IFCHR | new.mode, os.makedev(0, 0), dir_fd=dirfd)
        else:
            os.mkfifo(name, new.mode, dir_fd=dirfd)
        if self._foreign(new):
            _chown(
                lambda: os.chown(name, new.uid, new.gid, dir_fd=dirfd, follow_symlinks=False), new
            )
        if new.kind == "p":
            os.chmod(name, new.mode, dir_fd=dirfd)
        os.utime(name, ns=(new.mtime_ns, new.mtime_ns), dir_fd=dirfd, follow_symlinks=False)
        return True

    def _there(self, dirfd: int, name: bytes, entry: Entry) -> bool:
        """Whether an earlier run, or base, has this file: the time is the last thing that is set."""
        try:
            status = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        mode = stat.S_IMODE(status.st_mode)
        return _whole(status, entry.size, entry.mtime_ns) and mode == entry.mode

    def _from_base(self, before: Line | None, new: Entry, dirfd: int, name: bytes) -> bool:
        """Link or copy the file from the older tree, if it is there with this content."""
        if self._sources is None or before is None or before.kind != b"f":
            return False
        old = before.entry()
        if not entries.same_content(old, new):
            return False
        try:
            source_dir, source_name = self._sources.parent(old.path)
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            source = os.open(source_name, flags, dir_fd=source_dir)
        except OSError:
            return False
        try:
            status = os.fstat(source)
            if not _whole(status, old.size, old.mtime_ns):
                return False  # somebody wrote into the cache
            self._clear(dirfd, name)
            same = entries.same_object(old._replace(group=0), new._replace(group=0))
            if same and self._link(source_dir, source_name, dirfd, name):
                return True
            target = _new_file(dirfd, name, new.mode)
            try:
                _copy(source, target, status.st_size)
                self._finish(target, new)
            finally:
                os.close(target)
            self.result.copied += 1
            return True
        finally:
            os.close(source)

    def _missing(self, number: int) -> Iterator[Entry]:
        """Files whose content is in package `number` and not in the tree yet, in order."""
        seen: set[int] = set()
        alone = self._fresh and self._sources is None  # nobody else can have brought one
        for line in self._again():
            if line.kind != b"f":
                continue
            group, generation = entries.content_of(line.text)
            if generation != number or group in seen:
                continue
            if group:
                seen.add(group)
            new = line.entry()
            if alone or not self._there(*self._places.parent(new.path), new):
                yield new

    def _extract(self, number: int, file: BinaryIO) -> None:
        wanted = self._missing(number)
        entry = next(wanted, None)
        for member in package.read(file):
            if entry is None:
                break
            if entry.path != member.path:
                if entries.sort_key(entry.path) < entries.sort_key(member.path):
                    raise Damaged(f"package {number} lacks {_text(entry)}")
                continue  # the base had it, or it is no longer there
            if member.size != entry.size:
                continue  # an attempt while it was being written; another follows
            dirfd, name = self._places.parent(entry.path)
            target = _new_file(dirfd, name, entry.mode)
            try:
                if member.extract(target) != entry.digest:
                    os.ftruncate(target, 0)
                    continue
                self._finish(target, entry)
            finally:
                os.close(target)
            self.result.extracted += 1
            entry = next(wanted, None)
        if entry is not None:
            raise Damaged(f"package {number} lacks {_text(entry)}, or it is not what it was")

    def _links(self) -> None:
        """The further names of files that have several."""
        first: dict[int, bytes] = {}
        others = Places(self.root)
        try:
            for line in self._again():
                if line.kind != b"f":
                    continue
                group, _ = entries.content_of(line.text)
                if not group:
                    continue
                if group not in first:
                    first[group] = line.path
                    continue
                source_dir, source = others.parent(first[group])
                dirfd, name = self._places.parent(line.path)
                self._clear(dirfd, name)
                os.link(
                    source, name, src_dir_fd=source_dir, dst_dir_fd=dirfd, follow_symlinks=False
                )
        finally:
            others.close()

    def _directories(self) -> None:
        """Owner, mode, xattrs and time of directories, each after what is in it."""
        waiting: list[Entry] = []
        for line in self._again():
            if line.kind != b"d":
                continue
            while waiting:
                above = waiting[-1].path
                if not above or line.path.startswith(above + b"/"):
                    break
                self._leave(waiting.pop())
            waiting.append(line.entry())
        while waiting:
            self._leave(waiting.pop())

    def _leave(self, entry: Entry) -> None:
        fd = self._places.directory(entry.path)
        if self._foreign(entry):
            _chown(lambda: os.chown(fd, entry.uid, entry.gid), entry)
        os.chmod(fd, entry.mode)
        if not self._fresh:
            for name in set(map(os.fsencode, os.listxattr(fd))) - {key for key, _ in entry.xattrs}:
                if name.startswith(b"user."):
                    os.removexattr(fd, name)
        _set_xattrs(fd, entry)
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))

    def _finish(self, fd: int, entry: Entry) -> None:
        """Metadata of a new file, the time last: a file with the right time is whole."""
        if self._foreign(entry):
            _chown(lambda: os.chown(fd, entry.uid, entry.gid), entry)
        if entry.mode & ~0o777 or not self._fresh:
            os.chmod(fd, entry.mode)  # after chown(2), which takes S_ISUID away
        _set_xattrs(fd, entry)
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))

    def _foreign(self, entry: Entry) -> bool:
        """Whether what we have just made may belong to somebody else than the entry says."""
        return not self._fresh or (entry.uid, entry.gid) != (0, 0)

    def _clear(self, dirfd: int, name: bytes) -> None:
        """Remove what an earlier run may have left."""
        if not self._fresh:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=dirfd)


def _text(entry: Entry) -> str:
    return os.fsdecode(entry.path)


def _whole(status: os.stat_result, size: int, mtime_ns: int) -> bool:
    """Whether that is a file with this size and time."""
    return stat.S_ISREG(status.st_mode) and (status.st_size, status.st_mtime_ns) == (size, mtime_ns)


def _new_file(dirfd: int, name: bytes, mode: int) -> int:
    """A file that is open for writing, of the permissions in `mode`; whatever was there goes."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, mode & 0o777, dir_fd=dirfd)
    except FileExistsError:
        os.unlink(name, dir_fd=dirfd)
        return os.open(name, flags, mode & 0o777, dir_fd=dirfd)


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


def _set_xattrs(fd: int, entry: Entry) -> None:
    for name, value in entry.xattrs:
        try:
            os.setxattr(fd, name, value)
        except OSError as error:
            raise DeployProblem(
                f"{_text(entry)}: its attribute {os.fsdecode(name)} can't be set: {error.strerror}"
            ) from None
