"""What a mount is refused for, before anything is made: one line each that names the thing.

The rules are overlayfs's: lower layers lie in no other layer, upper and workdir are separate
directories of one filesystem, an upper belongs to one mount at a time. An upper *inside* its lower
is fine: that is how a user's changes to `/` are kept in a home below it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mount_helpers.mountinfo import Mount, mount_at, read_mounts
from mount_helpers.syscalls import MNT_DETACH, UMOUNT_NOFOLLOW, umount2
from sdeefs import OUR_TYPE as OUR_TYPE
from sdeefs.options import Options, UsageError, split_lowers

#: Seconds within which a server notices that its mount is gone.
_NOTICED = 3.0


class Refused(Exception):
    """Why there is no mount: one line for the caller, exit status 1."""


def text(path: bytes) -> str:
    """A path for a message: the one that a descriptor is of; what can't be decoded is escaped."""
    if path.startswith(b"/proc/self/fd/"):
        path = os.path.realpath(path)
    return path.decode("utf-8", "backslashreplace") or "''"


def _directory(what: str, path: bytes, access: int) -> os.stat_result:
    """Stat a layer, which must be a directory that we can use."""
    try:
        found = os.stat(path)
    except OSError as error:
        mend = {errno.ENOENT: " (create it first)", errno.ENOTCONN: " (a dead mount: unmount it)"}
        raise Refused(
            f"{what} {text(path)}: {error.strerror}{mend.get(error.errno or 0, '')}"
        ) from None
    if not stat.S_ISDIR(found.st_mode):
        raise Refused(f"{what} {text(path)}: not a directory")
    if not os.access(path, access, effective_ids=os.access in os.supports_effective_ids):
        word = "writable" if access & os.W_OK else "readable"
        raise Refused(f"{what} {text(path)}: not {word} for uid {os.geteuid()}")
    return found


def _key(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _ancestors(path: bytes) -> Iterator[tuple[int, int]]:
    """The directories above a path, by device and inode, up to the root."""
    path = os.path.realpath(path)
    while path != b"/":
        path = os.path.dirname(path)
        try:
            yield _key(os.stat(path))
        except OSError:
            return


def default_work(upper: bytes) -> bytes:
    """`UPPER.work`, beside upper and so on its filesystem."""
    return os.path.realpath(upper) + b".work"


def with_work(options: Options) -> Options:
    """The same with `work` filled in; a default one is made, with the owner of upper."""
    from dataclasses import replace

    if options.upper is None or options.work is not None:
        return options
    _directory("upper", options.upper, os.R_OK | os.X_OK)
    work = default_work(options.upper)
    if not options.read_only:
        try:
            os.mkdir(work, 0o700)
        except FileExistsError:
            pass
        except OSError as error:
            raise Refused(
                f"workdir {text(work)}: {error.strerror} (give another with --workdir, on the"
                " filesystem of upper)"
            ) from None
    return replace(options, work=work)


def check_layers(options: Options) -> None:
    """Refuse layers that are missing, unusable, overlapping or on the wrong filesystem."""
    if not options.lowers:
        raise UsageError("no lower directory (lowerdir=) is given")
    lowers = [(p, _directory("lower", p, os.R_OK | os.X_OK)) for p in options.lowers]
    taken: dict[tuple[int, int], str] = {}
    if options.upper is not None:
        access = os.R_OK | os.X_OK | (0 if options.read_only else os.W_OK)
        upper = _directory("upper", options.upper, access)
        taken[_key(upper)] = f"upper {text(options.upper)}"
        if options.work is not None and not options.read_only:
            _check_work(options.upper, upper, options.work)
            taken[_key(os.stat(options.work))] = f"workdir {text(options.work)}"
    for path, found in lowers:
        if _key(found) in taken:
            raise Refused(f"lower {text(path)} and {taken[_key(found)]} are the same directory")
        taken[_key(found)] = f"lower {text(path)}"
    for path, found in lowers:
        for above in _ancestors(path):
            if above in taken and above != _key(found):  # itself: a bind mount of what it lies in
                raise Refused(f"lower {text(path)} lies in {taken[above]}: layers must not overlap")


def _check_work(upper: bytes, found: os.stat_result, work: bytes) -> None:
    other = _directory("workdir", work, os.R_OK | os.X_OK | os.W_OK)
    if other.st_dev != found.st_dev:
        raise Refused(
            f"workdir {text(work)} is on another filesystem than upper {text(upper)}: give one"
            f" beside it, such as {text(default_work(upper))}"
        )
    if _key(other) == _key(found):
        raise Refused(f"workdir {text(work)} is upper itself: they must be separate directories")
    if _key(found) in _ancestors(work):
        raise Refused(f"workdir {text(work)} lies in upper {text(upper)}: give one beside it")
    if _key(other) in _ancestors(upper):
        raise Refused(f"upper {text(upper)} lies in workdir {text(work)}: give one beside it")


def is_ours(mount: Mount) -> bool:
    """Whether `sdeefs mount` made it, with either engine."""
    return mount.fstype == OUR_TYPE or (mount.fstype == "overlay" and mount.source == b"sdeefs")


# --- an upper in use ---------------------------------------------------------------------------


def layer_option(mount: Mount, name: str) -> str | None:
    """The directory that overlayfs shows for `upperdir` or `workdir`, without its own escapes."""
    for word in mount.super_options:
        key, _, value = word.partition("=")
        if key == name:
            return re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL)
    return None


def lower_options(mount: Mount) -> list[str]:
    """The lower directories that overlayfs shows, topmost first."""
    found: list[str] = []
    for word in mount.super_options:
        key, _, value = word.partition("=")
        if key == "lowerdir+":  # one of them, as it is
            found.append(value)
        elif key == "lowerdir":
            found += [os.fsdecode(path) for path in split_lowers(value)]
    return found


def kernel_user(upper: bytes, work: bytes | None = None) -> Mount | None:
    """The kernel overlayfs mount that has this upper (or workdir), in this mount namespace."""
    wanted = {(n, os.path.realpath(p)) for n, p in (("upperdir", upper), ("workdir", work)) if p}
    for mount in read_mounts():
        if mount.fstype != "overlay":
            continue
        for name, path in wanted:
            value = layer_option(mount, name)
            if value is not None and os.path.normpath(os.fsencode(value)) == path:
                return mount
    return None


def _lock(path: bytes) -> int | None:
    """An exclusive flock on a directory; None where its filesystem has none. EAGAIN if held."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise BlockingIOError(errno.EAGAIN, "in use", path) from None
        return None  # NFS wants a writable descriptor, some know no locks at all
    except BaseException:
        os.close(fd)
        raise
    return fd


def lock_layers(options: Options, patience: float = 10.0) -> list[int]:
    """Hold upper and workdir for one mount; returns descriptors that are the locks.

    A server whose mount is gone needs a moment to end: that long we wait (`patience`: seconds). Raises
    Refused.
    """
    if options.upper is None:
        return []
    other = kernel_user(options.upper, options.work)
    if other is not None:
        raise Refused(
            f"upper {text(options.upper)} is in use: kernel overlayfs on {text(other.point)}"
            " has it (unmount that first)"
        )
    start = time.monotonic()
    held: list[int] = []
    for what, path in (("upper", options.upper), ("workdir", options.work)):
        if path is None or (options.read_only and what == "workdir"):
            continue
        while True:
            try:
                fd = _lock(path)
            except BlockingIOError:
                waited = time.monotonic() - start
                user = _sdeefs_user(path, waited > _NOTICED)
                if user is None and waited < patience:
                    time.sleep(0.02)
                    continue
                for other_fd in held:
                    os.close(other_fd)
                whose = user or _holder(path)
                raise Refused(f"{what} {text(path)} is in use: {whose}") from None
            except OSError as error:
                for other_fd in held:
                    os.close(other_fd)
                raise Refused(f"{what} {text(path)}: {error.strerror}") from None
            if fd is not None:
                held.append(fd)
            break
    return held


def _holder(path: bytes) -> str:
    """Who has the lock of a layer, and what to do, where no mount that we know of does."""
    found = os.stat(path)
    key = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with open("/proc/locks", encoding="ascii") as file:
        for line in file:
            words = line.split()  # 1: FLOCK ADVISORY WRITE PID MAJOR:MINOR:INODE …
            if words[1] == "FLOCK" and words[5:6] == [key] and int(words[4]) > 0:
                return _elsewhere(words[4])
    return "another sdeefs mount has it (unmount that first)"


def _elsewhere(pid: object) -> str:
    return (
        f"process {pid}, which serves another mount namespace, has it (end what runs there first)"
    )


def _sdeefs_user(path: bytes, noticed: bool) -> str | None:
    """Which live mount of ours has a layer, as the servers' records say, and what to do.

    `noticed`: a server whose mount is gone has noticed, and has no record any more.
    """
    from sdeefs.control import records

    mounts = {(m.device[1], os.fsdecode(m.point)) for m in read_mounts() if m.fstype == OUR_TYPE}
    real = os.fsdecode(os.path.realpath(path))
    for record in records():
        if real not in (record.get("upper"), record.get("work")):
            continue
        if (record.get("minor"), record.get("merged")) in mounts:
            where = f"sdeefs on {record.get('merged')} (pid {record.get('pid')})"
            return f"{where} has it (unmount that first)"
        if noticed and os.path.exists(f"/proc/{record.get('pid')}"):
            return _elsewhere(record.get("pid"))
    return None


@contextmanager
def unused(options: Options) -> Iterator[None]:
    """No sdeefs has the layers while this lasts: for an engine that can't hold locks itself."""
    held = lock_layers(options)
    try:
        yield
    finally:
        for fd in held:
            os.close(fd)


# --- the mount point ---------------------------------------------------------------------------


def absolute(path: bytes) -> bytes:
    """An absolute path without links, but for the last component, which isn't touched.

    The mount at it may hang. Raises Refused for an empty path, as of a variable that isn't set.
    """
    if not path:
        raise Refused("an empty path is no mount point")
    path = os.path.abspath(path)
    parent, name = os.path.split(path)
    if not name:
        return path
    return os.path.join(os.path.realpath(parent), name)


def check_merged(merged: bytes) -> bytes:
    """The mount point as an absolute path; a dead mount of ours on it is taken away first."""
    point = absolute(merged)
    mount = mount_at(point)
    link = mount is None and os.path.islink(point)
    if (os.path.realpath(point) if link else point) in (b"/", b"//"):
        # Nobody would see it, until a process enters this namespace anew and sees nothing else.
        raise Refused("mount point /: a root can't be mounted over (give a directory below it)")
    while mount is not None and mount.fstype == OUR_TYPE and _is_dead(point):
        _clean(point)
        mount = mount_at(point)
    try:
        found = os.stat(point)
    except OSError as error:
        mend = " (create it first)" if error.errno == errno.ENOENT else ""
        raise Refused(f"mount point {text(point)}: {error.strerror}{mend}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise Refused(f"mount point {text(point)}: not a directory")
    return os.path.realpath(point)


def _is_dead(point: bytes) -> bool:
    """Whether the server of a mount has gone. One that hangs is refused."""
    from mount_helpers.trials import in_child

    def trial() -> str:
        try:
            os.statvfs(point)  # always asks the server, where stat() may be answered from a cache
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, "")
        return "alive"

    works, answer = in_child(trial, seconds=10)
    if not works:
        raise Refused(
            f"mount point {text(point)}: the sdeefs there doesn't answer (sdeefs umount --force)"
        )
    return answer in ("ENOTCONN", "ECONNABORTED")


def _clean(point: bytes) -> None:
    try:
        umount2(point, MNT_DETACH | UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.EPERM:
            raise Refused(f"mount point {text(point)}: {error.strerror}") from None
        from sdeefs.umount_command import fusermount

        fusermount(point, lazy=True)
