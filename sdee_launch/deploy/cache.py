"""A node's cache of generations: per user, by the source's identity and number.

    CACHE/UID/IDENTITY/N/tree        the generation, only read
    CACHE/UID/IDENTITY/N/manifest
    CACHE/UID/IDENTITY/N/users/KEY   somebody (a job) uses it, since the boot that stands in it
    CACHE/UID/IDENTITY/N/boot-ID     it was made in that boot
    CACHE/UID/IDENTITY/N/synced      and is on the disk
    CACHE/UID/IDENTITY/.N/           being made; gone on with after a crash
    CACHE/UID/IDENTITY/lock          flock(2)

CACHE is root's and may be passed through by all; CACHE/UID is the user's alone, and everything in
it is done inside the user's namespace. A generation is there whole or not at all: until it is on the
disk it counts for the boot that made it, so that no job waits for the disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from mount_helpers import syscalls
from sdee_launch.accounts import Account
from sdee_launch.deploy import entries, package
from sdee_launch.deploy.apply import Apply, Places
from sdee_launch.deploy.entries import Line
from sdee_launch.deploy.errors import Damaged, DeployProblem
from sdee_launch.deploy.inside import run_inside
from sdee_launch.deploy.walk import DIRECTORY, Walk, remove_tree

DEFAULT = "/var/lib/sdee/cache"
#: So many objects of a cached generation are looked at before it is used again.
SAMPLE = 500
#: A disk or a quota that has no room.
FULL = (errno.ENOSPC, errno.EDQUOT)
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")
_IDENTITY = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Ensured:
    """A generation that is in the cache. `bytes_read`: of manifest and packages, for it."""

    tree: str
    bytes_read: int
    base: int
    linked: int
    extracted: int
    seconds: float


def user_directory(account: Account, cache: str) -> str:
    """The directory of a user's generations, made if it isn't there. Raises OSError.

    Root makes it in the site's place; a user without a daemon in a place of their own.
    """
    path = os.path.join(cache, str(account.uid))
    os.makedirs(cache, mode=0o711, exist_ok=True)
    if os.getuid() == 0:
        os.chmod(cache, 0o711)
    if not os.path.lexists(path):
        _make_user_directory(account, cache, path)
    else:
        status = os.lstat(path)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != account.uid:
            raise DeployProblem(f"{path} isn't {account.name}'s; remove it") from None
    return path


def _make_user_directory(account: Account, cache: str, path: str) -> None:
    """Under another name until it is the user's, lest a crash leave one that is root's."""
    import tempfile  # once for each user

    made = tempfile.mkdtemp(prefix=".new-", dir=cache)
    try:
        if os.getuid() == 0:
            os.chown(made, account.uid, account.gid)
        os.rename(made, path)
    except OSError as error:
        os.rmdir(made)
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another was faster
            raise


def ensure(
    account: Account,
    cache: str,
    source: str,
    identity: str,
    number: int,
    key: str,
    *,
    limit: int = 0,
) -> Ensured:
    """Bring generation `number` from the directory `source` into the cache; used by `key` from now.

    Only what the newest cached generation lacks is read. A cache that turns out to be broken is
    replaced by a full copy. A generation of more than `limit` bytes (0: none) is refused. Raises
    DeployProblem with the reason.
    """
    _check(identity, number, key)
    top = user_directory(account, cache)

    def work() -> dict[str, object]:
        started = time.monotonic()
        place = os.path.join(top, identity)
        os.makedirs(place, mode=0o700, exist_ok=True)
        with _locked(place):
            done = _ensure(place, source, number, limit)
            users = os.path.join(place, str(number), "users")
            os.makedirs(users, exist_ok=True)
            with open(os.path.join(users, key), "w") as mark:
                mark.write(_boot())
            os.utime(os.path.join(place, str(number)))
        tree = os.path.join(place, str(number), "tree")
        return asdict(Ensured(tree, *done, time.monotonic() - started))

    return Ensured(**run_inside(account, work))


def release(account: Account, cache: str, key: str) -> None:
    """`key` uses none of the user's generations any more. Twice is harmless.

    What it used is written out to the disk, and so outlives a crash of the node.
    """
    _check("0" * 16, 1, key)
    top = os.path.join(cache, str(account.uid))

    def work() -> None:
        for place in _identities(top):
            for number in _numbers(place):
                path = os.path.join(place, str(number))
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(path, "users", key))
                    _settle(path)

    if os.path.isdir(top):
        run_inside(account, work)


def users(account: Account, cache: str) -> list[str]:
    """All that use a generation of a user's, each once."""
    top = os.path.join(cache, str(account.uid))

    def work() -> list[str]:
        found: set[str] = set()
        for place in _identities(top):
            for number in _numbers(place):
                found.update(_users(os.path.join(place, str(number))))
        return sorted(found)

    return list(run_inside(account, work)) if os.path.isdir(top) else []


def listing(account: Account, cache: str) -> list[dict[str, Any]]:
    """A user's cached generations: identity, generation, bytes, files, used by, last use."""
    top = os.path.join(cache, str(account.uid))

    def work() -> list[dict[str, object]]:
        found = []
        for place in _identities(top):
            for number in _numbers(place):
                path = os.path.join(place, str(number))
                size, files = _size(path)
                found.append(
                    {
                        "identity": os.path.basename(place),
                        "generation": number,
                        "bytes": size,
                        "files": files,
                        "users": _users(path),
                        "used": os.stat(path).st_mtime,
                        "path": path,
                    }
                )
        return found

    return list(run_inside(account, work)) if os.path.isdir(top) else []


def prune(account: Account, cache: str, limit: int) -> list[dict[str, Any]]:
    """Remove the least recently used generations that nobody uses until the rest fits `limit` bytes.

    A file that several generations share counts once. Returns what was removed.
    """
    top = os.path.join(cache, str(account.uid))
    everything = sorted(listing(account, cache), key=lambda one: one["used"])
    total = sum(one["bytes"] for one in everything)
    doomed = []
    for one in everything:
        if total <= limit:
            break
        if not one["users"]:
            doomed.append(one)
            total -= one["bytes"]

    def work() -> None:
        for one in doomed:
            place = os.path.join(top, one["identity"])
            with _locked(place):
                if not _users(one["path"]):
                    _remove_generation(place, one["generation"])
        for place in _identities(top):
            if not _numbers(place):
                remove_tree(place)

    if os.path.isdir(top):
        run_inside(account, work)
    return doomed


def verify(account: Account, cache: str, identity: str, number: int, checksum: bool) -> list[str]:
    """What of a cached generation isn't as its manifest says: paths, empty if all is well."""
    place = os.path.join(cache, str(account.uid), identity)

    def work() -> list[str]:
        return _verify(os.path.join(place, str(number)), checksum)

    return list(run_inside(account, work))


def remove(account: Account, cache: str, identity: str, number: int) -> None:
    """Remove one generation, used or not: the next job brings it anew."""
    place = os.path.join(cache, str(account.uid), identity)

    def work() -> None:
        with _locked(place):
            _remove_generation(place, number)

    if os.path.isdir(place):
        run_inside(account, work)


def _check(identity: str, number: int, key: str) -> None:
    if not _IDENTITY.fullmatch(identity) or number < 1 or number >= 10**18:
        raise DeployProblem(f"{identity[:40]}@{number} is no generation")
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", key) or key.startswith("."):
        raise DeployProblem(f"{key[:40]!r} can't be a user of a generation")


@contextlib.contextmanager
def _locked(place: str) -> Iterator[None]:
    fd = os.open(os.path.join(place, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _identities(top: str) -> list[str]:
    names = os.listdir(top) if os.path.isdir(top) else []
    return [os.path.join(top, name) for name in sorted(names) if _IDENTITY.fullmatch(name)]


def _numbers(place: str) -> list[int]:
    return sorted(int(name) for name in os.listdir(place) if _NUMBER.fullmatch(name))


def _remove_generation(place: str, number: int) -> None:
    """Under another name first, so that half of one is never found."""
    doomed = os.path.join(place, f".{number}.gone")
    remove_tree(doomed)
    with contextlib.suppress(FileNotFoundError):
        os.rename(os.path.join(place, str(number)), doomed)
    remove_tree(doomed)


def _size(path: str) -> tuple[int, int]:
    """Bytes on disk of what this generation alone has, and its files."""
    size = files = 0
    fd = os.open(path, DIRECTORY)
    try:
        for found in Walk(fd, lambda _: False):
            if found.kind != "d":
                size += found.status.st_blocks * 512 // max(1, found.status.st_nlink)
                files += 1
    finally:
        os.close(fd)
    return size, files


def open_source(source: str, name: str) -> BinaryIO:
    """A file of a spool: a regular one of the user's own, no link. Raises DeployProblem.

    Read inside the user's namespace, where the user is 0.
    """
    path = os.path.join(source, name)
    try:
        directory = os.open(source, DIRECTORY)
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(name, flags, dir_fd=directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise DeployProblem(f"{path}: {error.strerror}") from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != 0:
        os.close(fd)
        raise DeployProblem(f"{path} is no file of the user's own; it isn't read")
    return os.fdopen(fd, "rb")


def _manifest(path: str) -> Iterator[Line]:
    with open(path, "rb") as file:
        yield from entries.lines(file)


def _ensure(place: str, source: str, number: int, limit: int) -> tuple[int, int, int, int]:
    """(bytes read, base, linked, extracted)."""
    final = os.path.join(place, str(number))
    if os.path.isdir(final):
        if _trusted(final) and _sound(final):
            return 0, number, 0, 0
        if _users(final):
            raise DeployProblem(
                f"{final} is damaged and in use; try again when those jobs are gone"
            )
        _remove_generation(place, number)
    for name in os.listdir(place):
        # Under the lock what is being made is ours, or was given up: a full disk, a killed daemon.
        if name.startswith(".") and name != f".{number}":
            remove_tree(os.path.join(place, name))
    try:
        return _bring(place, source, number, limit)
    except OSError as error:
        if error.errno not in FULL:
            raise
    _make_room(place, number)
    try:
        return _bring(place, source, number, limit)
    except OSError as error:
        remove_tree(os.path.join(place, f".{number}"))
        if error.errno not in FULL:
            raise
        raise DeployProblem(
            f"{place}: {error.strerror}, and nothing unused is cached there"
        ) from None


def _make_room(place: str, number: int) -> None:
    """The disk is full: what of this environment nobody uses goes, and the try that filled it."""
    remove_tree(os.path.join(place, f".{number}"))
    for other in _numbers(place):
        if not _users(os.path.join(place, str(other))):
            _remove_generation(place, other)


def _bring(place: str, source: str, number: int, limit: int) -> tuple[int, int, int, int]:
    """(bytes read, base, linked, extracted); without the base if that is damaged."""
    others = (n for n in reversed(_numbers(place)) if n != number)
    bases = [n for n in others if _trusted(os.path.join(place, str(n)))][:1]
    try:
        return _make(place, source, number, bases[0] if bases else 0, limit)
    except (Damaged, FileNotFoundError):
        # The base, or what an interrupted run left, isn't what it should be: all anew.
        remove_tree(os.path.join(place, f".{number}"))
        return _make(place, source, number, 0, limit)


def _users(path: str) -> list[str]:
    """Who uses a generation. A mark of an earlier boot is nobody's: its job is gone with the node."""
    boot, started = _boot(), time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    found = []
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(os.path.join(path, "users"))):
            with (
                contextlib.suppress(FileNotFoundError),
                open(os.path.join(path, "users", name)) as mark,
            ):
                text = mark.read(100)
                # An empty one: the crash came before its content was on the disk.
                if text == boot or (not text and os.fstat(mark.fileno()).st_mtime > started):
                    found.append(name)
    return found


def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _trusted(path: str) -> bool:
    """Whether no crash can have taken from a generation what it had: it is on the disk, or was made
    in this boot."""
    return any(os.path.exists(os.path.join(path, n)) for n in ("synced", f"boot-{_boot()}"))


def _settle(path: str) -> None:
    """See that a generation is on the disk; if it can't be, it counts for this boot only."""
    if os.path.exists(os.path.join(path, "synced")) or not _trusted(path):
        return
    with contextlib.suppress(OSError):
        fd = os.open(path, DIRECTORY)
        try:
            syscalls.syncfs(fd)
        finally:
            os.close(fd)
        with open(os.path.join(path, "synced"), "w"):
            pass


def _sound(path: str) -> bool:
    """A look at the first objects of a cached generation, which costs next to nothing."""
    try:
        return not _verify(path, False, SAMPLE)
    except (Damaged, OSError):
        return False


def _staging(place: str, number: int) -> str:
    """Where a generation is made. What was left there before a power cut isn't gone on with: a
    file may have its size and time, and not its content."""
    staging = os.path.join(place, f".{number}")
    marker = os.path.join(staging, f"boot-{_boot()}")
    if os.path.isdir(staging) and not os.path.exists(marker):
        remove_tree(staging)
    os.makedirs(os.path.join(staging, "tree"), mode=0o700, exist_ok=True)
    with open(marker, "w"):
        return staging


def _make(place: str, source: str, number: int, base: int, limit: int) -> tuple[int, int, int, int]:
    staging = _staging(place, number)
    tree = os.path.join(staging, "tree")
    manifest = os.path.join(staging, "manifest")
    with open_source(source, f"{number}.manifest") as wanted, open(manifest, "wb") as kept:
        shutil.copyfileobj(wanted, kept, 1 << 20)
        read = kept.tell()
    root = os.open(tree, DIRECTORY)
    base_place = os.path.join(place, str(base))
    base_fd = os.open(os.path.join(base_place, "tree"), DIRECTORY) if base else None
    try:
        apply = Apply(
            root,
            lambda: _manifest(manifest),
            base_fd,
            (lambda: _manifest(os.path.join(base_place, "manifest"))) if base else (lambda: ()),
            limit=limit,
        )
        result = apply.run(lambda n: open_source(source, f"{n}.pack"))
    finally:
        os.close(root)
        if base_fd is not None:
            os.close(base_fd)
    os.makedirs(os.path.join(staging, "users"), exist_ok=True)
    os.rename(staging, os.path.join(place, str(number)))
    return read + result.bytes_read, base, result.linked, result.extracted


def _verify(path: str, checksum: bool, most: int | None = None) -> list[str]:
    wrong = []
    root = os.open(os.path.join(path, "tree"), DIRECTORY)
    places = Places(root)
    try:
        for line in itertools.islice(_manifest(os.path.join(path, "manifest")), most):
            entry = line.entry()
            try:
                dirfd, name = places.parent(entry.path)
                status = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
                right = (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (
                    entry.mode if entry.kind != "l" else stat.S_IMODE(status.st_mode),
                    entry.uid,
                    entry.gid,
                )
                if entry.kind == "f":
                    right &= stat.S_ISREG(status.st_mode)
                    right &= (status.st_size, status.st_mtime_ns) == (entry.size, entry.mtime_ns)
                    if right and checksum:
                        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=dirfd)
                        right = package.digest_of(fd) == entry.digest
                        os.close(fd)
                elif entry.kind == "l":
                    right &= os.fsencode(os.readlink(name, dir_fd=dirfd)) == entry.target
                elif entry.kind == "d":
                    right &= stat.S_ISDIR(status.st_mode)
            except OSError:
                right = False
            if not right:
                wrong.append(os.fsdecode(entry.path))
    finally:
        places.close()
        os.close(root)
    return wrong
