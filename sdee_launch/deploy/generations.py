"""The source's side: numbered, immutable generations of an upper.

A state directory holds, for generation N, `N.manifest` and, if files were new in it, `N.pack`.
A manifest names for each file the generation in whose package its content is, so that a node needs
the packages of what it lacks and nothing else. The package is the snapshot: it is written while the
upper is walked, once, and only what changed is read.

What has changed is decided by size and modification time (the paper's rule). Where change time or
inode number differ too, the file is read and its digest compared, which costs no bytes on the way;
`checksum` reads every file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

from sdee_launch.deploy import entries, package
from sdee_launch.deploy.entries import Entry, Line
from sdee_launch.deploy.errors import Damaged, DeployProblem
from sdee_launch.deploy.walk import Found, Walk, xattrs

#: A file that is being written is tried so often.
ATTEMPTS = 3
#: The clock of file times may stand still so long.
TICK_NS = 50_000_000
#: Packages together may be so many times the content of a generation before a full one is made.
WASTE = 2.0
#: More packages than this for one generation: a full one is made.
MAX_CHAIN = 24
_NAME = re.compile(r"([1-9][0-9]{0,17})\.(manifest|pack)")


@dataclass(frozen=True)
class Generation:
    """One generation, and what making it cost."""

    number: int
    entries: int
    content: int  # bytes of all files
    packages: tuple[int, ...]  # that a node without a cache needs
    new_files: int = 0
    package_bytes: int = 0  # of its own package, as it travels
    skipped: int = 0
    moving: int = 0  # files that were being written all the time: what they had travels


class State:
    """A state directory, locked while it is open. `identity` names it among all others."""

    def __init__(self, path: str, *, create: bool = True) -> None:
        self.path = path
        if create:
            # makedirs gives its mode to the last directory alone, and our umask may be 0.
            umask = os.umask(0o077)
            try:
                os.makedirs(path, exist_ok=True)
            finally:
                os.umask(umask)
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if os.fstat(self.fd).st_uid != os.getuid():
            os.close(self.fd)
            raise DeployProblem(f"{path} isn't yours; remove it")
        self._lock = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self.fd)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.identity = self._identity()

    def __enter__(self) -> State:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)
        os.close(self.fd)

    def _identity(self) -> str:
        try:
            with open(os.path.join(self.path, "identity")) as file:
                text = file.read().strip()
            if re.fullmatch(r"[0-9a-f]{16}", text):
                return text
        except FileNotFoundError:
            pass
        return self.new_identity()

    def new_identity(self) -> str:
        """Nothing that nodes have is of this directory any more."""
        self.identity = os.urandom(8).hex()
        self.put("identity", self.identity.encode() + b"\n")
        return self.identity

    def put(self, name: str, data: bytes) -> None:
        """Write a small file so that it is there whole or not at all."""
        temporary = f".{name}.new"
        fd = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=self.fd
        )
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def numbers(self) -> list[int]:
        """The generations that are whole, oldest first."""
        found = [_NAME.fullmatch(name) for name in os.listdir(self.fd)]
        return sorted(int(m[1]) for m in found if m and m[2] == "manifest")

    def file(self, number: int, what: str) -> str:
        """The path of a generation's `manifest` or `pack`."""
        return os.path.join(self.path, f"{number}.{what}")

    def read(self, number: int) -> Iterator[Entry]:
        """The entries of a generation. Raises DeployProblem."""
        for line in self.lines(number):
            yield line.entry()

    def lines(self, number: int) -> Iterator[Line]:
        """The same, each as it stands. Raises DeployProblem."""
        try:
            file = open(self.file(number, "manifest"), "rb")  # noqa: SIM115
        except FileNotFoundError:
            raise DeployProblem(f"there is no generation {number}") from None
        with file:
            yield from entries.lines(file)

    def about(self, number: int) -> Generation:
        """What is known of a generation."""
        try:
            with open(os.path.join(self.path, f"{number}.json")) as file:
                record = json.load(file)
            return Generation(**{**record, "packages": tuple(record["packages"])})
        except (OSError, ValueError, KeyError, TypeError):
            raise DeployProblem(f"there is no generation {number}") from None

    def prune(self, keep: int = 8) -> list[int]:
        """Remove old generations and packages that no kept one needs; the numbers removed."""
        numbers = self.numbers()
        old, kept = numbers[:-keep], numbers[-keep:]
        needed: set[int] = set()
        for number in kept:
            with contextlib.suppress(DeployProblem):
                needed |= set(self.about(number).packages)
        for number in old:
            for name in (f"{number}.manifest", f"{number}.json"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self.fd)
        for name in os.listdir(self.fd):
            match = _NAME.fullmatch(name)
            if match and match[2] == "pack" and int(match[1]) not in needed:
                os.unlink(name, dir_fd=self.fd)
        return old


class _Snapshot:
    """One walk that writes a manifest and, as it goes, the package of what is new."""

    def __init__(
        self,
        state: State,
        upper: int,
        number: int,
        excluded: Callable[[bytes], bool],
        checksum: bool,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.state, self.number, self.checksum = state, number, checksum
        self.walk = Walk(upper, excluded)
        self.progress = progress
        self.changed = False  # for a node
        self.refreshed = False  # for the next snapshot only
        self.content = 0
        self.moving = 0
        self.packages: dict[int, int] = {}
        self.linked: dict[int, bytes] = {}  # the line of a group's first name

    def write(self, old: Iterable[Line], writer: entries.Writer, packer: package.Packer) -> None:
        """Walk, and write what is found."""
        # The walk stands at what the merge gives until the next is asked for.
        for before, found in entries.merge(old, self.walk):
            if found is None:
                self.changed = True
                continue
            found.group = self.walk.group(found.status) if found.kind == "f" else 0
            if found.kind != "f":
                line = entries.encode(found.entry)
                self.changed |= before is None or before.text != line[:-1]
                writer.copy(line)
            elif before is not None and self._untouched(before, found):
                writer.copy(before.text + b"\n")
            else:
                self._file(before and before.entry(), found, writer, packer)
            if self.progress is not None:
                self.progress(writer.entries, packer.content)

    def _untouched(self, before: Line, found: Found) -> bool:
        """Whether nothing at all has happened to a file, its change time says so."""
        if self.checksum or found.group:
            return False
        now = found.status
        mode = stat.S_IMODE(now.st_mode)
        known = (mode, now.st_uid, now.st_gid, now.st_mtime_ns, now.st_size)
        if not (
            before.text.endswith(entries.suffix(now.st_ctime_ns, now.st_ino))
            and before.text.startswith(entries.prefix(found.path, b"f", *known))
        ):
            return False
        group, generation = entries.content_of(before.text)
        if group:
            return False
        self._count(generation, now.st_size)
        return True

    def _file(
        self, before: Entry | None, found: Found, writer: entries.Writer, packer: package.Packer
    ) -> None:
        group = found.group
        if group in self.linked:  # another name of what is in already
            done = entries.decode(self.linked[group])._replace(path=found.path)
        else:
            try:
                done = self._unchanged(before, found) or self._pack(found, packer)
            except FileNotFoundError:  # it vanished
                self.changed = True
                return
            if group:
                self.linked[group] = entries.encode(done)[:-1]
            self._count(done.generation, done.size)
        self.changed |= before is None or not entries.same_object(before, done)
        self.refreshed |= before is not None and before[12:] != done[12:]  # ctime, inode
        writer.add(done)

    def _count(self, generation: int, size: int) -> None:
        self.content += size
        self.packages[generation] = self.packages.get(generation, 0) + size

    def _unchanged(self, before: Entry | None, found: Found) -> Entry | None:
        """The entry with the old content, if that is still what the file has."""
        if before is None or before.kind != "f":
            return None
        entry = found.entry
        if (before.size, before.mtime_ns) != (entry.size, entry.mtime_ns):
            return None
        same = (before.ctime_ns, before.inode) == (entry.ctime_ns, entry.inode)
        if same and not self.checksum:
            return entries.with_content(entry._replace(xattrs=before.xattrs), before)
        fd = os.open(found.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=found.dirfd)
        try:
            if package.digest_of(fd) != before.digest:
                return None
            kept = entry._replace(xattrs=xattrs(fd), ctime_ns=_settled(found.status))
            return entries.with_content(kept, before)
        finally:
            os.close(fd)

    def _pack(self, found: Found, packer: package.Packer) -> Entry:
        attempt = 0
        known: os.stat_result | None = found.status
        while True:
            attempt += 1
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            fd = os.open(found.name, flags, dir_fd=found.dirfd)
            try:
                marks = xattrs(fd)
                status, digest, steady = packer.add(found.path, fd, known)
            finally:
                os.close(fd)
            if not steady and attempt < ATTEMPTS:
                known = None
                continue
            # One that never holds still, as a log may, travels as far as it was at the last try.
            self.moving += not steady
            was = found.status
            return Entry(
                found.path, "f", stat.S_IMODE(was.st_mode), was.st_uid, was.st_gid,
                status.st_mtime_ns, status.st_size, b"", marks, found.group, self.number, digest,
                _settled(status) if steady else 0, status.st_ino,
            )  # fmt: skip


def _settled(status: os.stat_result) -> int:
    """The change time, if it is past: a later write in the same tick of the clock would leave no
    trace, and 0 makes the next walk look again."""
    return status.st_ctime_ns if time.time_ns() - status.st_ctime_ns > TICK_NS else 0


def snapshot(
    state: State,
    upper: int,
    excluded: Callable[[bytes], bool],
    *,
    checksum: bool = False,
    level: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> Generation:
    """The generation that has what `upper` (a descriptor) has now; the last one if nothing changed.

    Raises DeployProblem, OSError.
    """
    numbers = state.numbers()
    last = numbers[-1] if numbers else 0
    try:
        return _snapshot(state, upper, excluded, last, checksum, level, progress)
    except Damaged:  # the last manifest can't be read: all is new
        return _snapshot(state, upper, excluded, 0, checksum, level, progress, after=last)


def _snapshot(
    state: State,
    upper: int,
    excluded: Callable[[bytes], bool],
    last: int,
    checksum: bool,
    level: int,
    progress: Callable[[int, int], None] | None,
    after: int = 0,
) -> Generation:
    number = max(last, after) + 1
    one = _Snapshot(state, upper, number, excluded, checksum, progress)
    manifest, packed = f".{number}.manifest.new", f".{number}.pack.new"
    try:
        with (
            open(os.path.join(state.path, manifest), "wb") as manifest_file,
            open(os.path.join(state.path, packed), "wb") as package_file,
        ):
            with (
                entries.Writer(manifest_file) as writer,
                package.Packer(package_file, level) as packer,
            ):
                one.write(state.lines(last) if last else (), writer, packer)
            if last and not one.changed:
                if one.refreshed:  # the next walk needn't read those files again
                    manifest_file.flush()
                    os.fsync(manifest_file.fileno())
                    _rename(state, manifest, f"{last}.manifest")
                return state.about(last)
            for file in (manifest_file, package_file):
                file.flush()
                os.fsync(file.fileno())
        if last and _wasteful(state, one):
            # Too many old packages are needed: everything goes into this generation's own.
            return _snapshot(state, upper, excluded, 0, checksum, level, progress, after=last)
        size = os.stat(packed, dir_fd=state.fd).st_size if packer.files else 0
        about = Generation(
            number,
            writer.entries,
            one.content,
            tuple(sorted(n for n in one.packages)),
            packer.files,
            size,
            one.walk.skipped,
            one.moving,
        )
        if packer.files:
            _rename(state, packed, f"{number}.pack")
        state.put(f"{number}.json", json.dumps(asdict(about)).encode())
        _rename(state, manifest, f"{number}.manifest")
        os.fsync(state.fd)
        return about
    finally:
        for name in (manifest, packed):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=state.fd)


def _rename(state: State, old: str, new: str) -> None:
    os.rename(old, new, src_dir_fd=state.fd, dst_dir_fd=state.fd)


def _wasteful(state: State, one: _Snapshot) -> bool:
    if len(one.packages) > MAX_CHAIN:
        return True
    sizes = 0
    for number in one.packages:
        if number != one.number:
            try:
                sizes += os.stat(state.file(number, "pack")).st_size
            except FileNotFoundError:
                return True
    return sizes > WASTE * max(one.content, 64 << 20)
