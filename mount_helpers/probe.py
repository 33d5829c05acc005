"""What this kernel, machine and account can do, found by trying it for real.

Each probe answers a `Finding`: what was tried, whether it worked, what failed, and the mend where
there is one. Trials run in children with mounts of their own (`mount_helpers.trials`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from mount_helpers import syscalls
from mount_helpers.namespaces import IdRange, subordinate_ids, user_namespace
from mount_helpers.trials import TrialFailed, in_child, own_user_namespace, private_mounts

FICLONE = 0x40049409
FUSE_PASSTHROUGH = 1 << 37
FUSE_OVER_IO_URING = 1 << 41
ENABLE_URING = Path("/sys/module/fuse/parameters/enable_uring")


@dataclass(frozen=True)
class Finding:
    """The result of one trial. `detail` is what it found, or why it failed."""

    name: str
    works: bool
    tried: str
    detail: str
    mend: str = ""

    def as_json(self) -> dict[str, object]:
        """The finding as JSON has it."""
        return asdict(self)


@contextmanager
def _scratch(beside: Path) -> Iterator[Path]:
    """A directory of ours on the filesystem of `beside`, removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix=".sdeefs-trial-", dir=beside))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _finding(name: str, tried: str, trial: Callable[[], str], mend: str = "") -> Finding:
    works, detail = in_child(trial)
    return Finding(name, works, tried, detail, "" if works else mend)


def _overlay(place: Path, *, userxattr: bool) -> str:
    """Mount overlayfs in `place` and hold copy-up, a whiteout and a rename against each other."""
    lower, upper, work, merged = (place / n for n in ("lower", "upper", "work", "merged"))
    for directory in (lower, upper, work, merged):
        directory.mkdir()
    (lower / "changed").write_text("lower")
    (lower / "removed").write_text("lower")
    (lower / "moved").write_text("lower")
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    if userxattr:
        options += ",userxattr"
    syscalls.mount("overlay", str(merged), "overlay", 0, options)
    try:
        with open(merged / "changed", "a") as file:
            file.write("+upper")
        (merged / "removed").unlink()
        (merged / "moved").rename(merged / "elsewhere")
    finally:
        syscalls.umount2(str(merged), syscalls.MNT_DETACH)
    if (upper / "changed").read_text() != "lower+upper":
        raise TrialFailed("copy-up lost data")
    white = (upper / "removed").lstat()
    if not (stat.S_ISCHR(white.st_mode) and white.st_rdev == 0) and white.st_size:
        raise TrialFailed("the removed file left no whiteout in upper")
    if (upper / "elsewhere").read_text() != "lower":
        raise TrialFailed("a renamed file isn't in upper")
    return "copy-up, whiteout and rename work"


def kernel_overlay(upper: Path, *, userxattr: bool = False) -> Finding:
    """Kernel overlayfs with its upper on the filesystem of the directory `upper`."""
    tried = f"overlayfs{' with userxattr' if userxattr else ''} with an upper beside {upper}"
    name = "overlay-userxattr" if userxattr else "overlay"

    try:
        with _scratch(upper) as place:

            def trial() -> str:
                private_mounts()
                return _overlay(place, userxattr=userxattr)

            return _finding(name, tried, trial, "use sdeefs (--engine fuse)")
    except OSError as error:
        return Finding(name, False, tried, f"{upper}: {error.strerror}")


def overlay_in_user_namespace(upper: Path) -> Finding:
    """Kernel overlayfs mounted by root of a user namespace (Linux >= 5.11)."""
    tried = f"overlayfs with userxattr in a user namespace, upper beside {upper}"
    try:
        with _scratch(upper) as place:

            def trial() -> str:
                own_user_namespace()
                return _overlay(place, userxattr=True)

            return _finding("overlay-rootless", tried, trial, "use sdeefs (--engine fuse)")
    except OSError as error:
        return Finding("overlay-rootless", False, tried, f"{upper}: {error.strerror}")


def user_namespaces() -> Finding:
    """Whether the caller may make user namespaces."""

    def trial() -> str:
        own_user_namespace()
        return "root inside"

    return _finding(
        "user-namespaces",
        "unshare(CLONE_NEWUSER)",
        trial,
        "the administrator sets user.max_user_namespaces and kernel.unprivileged_userns_clone",
    )


def _fuse_init_flags() -> int:
    """Mount FUSE detached and read the flags that the kernel offers in INIT."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        fs = syscalls.fsopen("fuse")
        syscalls.fsconfig_string(fs, "source", "trial")
        syscalls.fsconfig_string(fs, "fd", str(device))
        syscalls.fsconfig_string(fs, "rootmode", "40000")
        syscalls.fsconfig_string(fs, "user_id", str(os.getuid()))
        syscalls.fsconfig_string(fs, "group_id", str(os.getgid()))
        syscalls.fsconfig_create(fs)
        attached = syscalls.fsmount(fs)
        os.close(fs)
        request = os.read(device, 1 << 20)
        os.close(attached)
    finally:
        os.close(device)
    _, minor, _, flags = struct.unpack_from("=IIII", request, 40)
    flags2 = struct.unpack_from("=I", request, 56)[0] if minor >= 36 else 0
    return int(flags | flags2 << 32)


def fuse() -> list[Finding]:
    """The device, FUSE in a user namespace, passthrough and rings."""
    mend = "chmod 666 /dev/fuse (as udev does), modprobe fuse"

    def opened() -> str:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
        return "/dev/fuse opens"

    def in_namespace() -> str:
        own_user_namespace()
        _fuse_init_flags()
        return "mounts"

    def passthrough() -> str:
        private_mounts()
        if not _fuse_init_flags() & FUSE_PASSTHROUGH:
            raise TrialFailed("the kernel doesn't offer FUSE_PASSTHROUGH")
        return "offered in INIT"

    def rings() -> str:
        try:
            if ENABLE_URING.read_text().strip() != "Y":
                raise TrialFailed(f"{ENABLE_URING} is N")
        except FileNotFoundError:
            raise TrialFailed("the kernel's FUSE has no rings") from None
        own_user_namespace()
        if not _fuse_init_flags() & FUSE_OVER_IO_URING:
            raise TrialFailed("the kernel doesn't offer FUSE_OVER_IO_URING")
        return "offered in INIT"

    return [
        _finding("fuse", "open /dev/fuse", opened, mend),
        _finding("fuse-rootless", "mount FUSE in a user namespace", in_namespace, mend),
        _finding(
            "fuse-passthrough",
            "FUSE_PASSTHROUGH in INIT",
            passthrough,
            "needs Linux >= 6.9 with CONFIG_FUSE_PASSTHROUGH, and root",
        ),
        _finding(
            "fuse-rings",
            "FUSE_OVER_IO_URING in INIT",
            rings,
            f"root: echo Y > {ENABLE_URING}, and for good `options fuse enable_uring=1` in"
            " /etc/modprobe.d (Linux >= 6.14)",
        ),
    ]


def fanotify(directory: Path) -> Finding:
    """Marks on directories that tell names, as any user may set them (Linux >= 5.13)."""

    def trial() -> str:
        flags = syscalls.FAN_CLASS_NOTIF | syscalls.FAN_REPORT_FID | syscalls.FAN_REPORT_DFID_NAME
        fd = syscalls.fanotify_init(flags | syscalls.FAN_CLOEXEC | syscalls.FAN_NONBLOCK)
        mask = syscalls.FAN_CREATE | syscalls.FAN_DELETE | syscalls.FAN_EVENT_ON_CHILD
        syscalls.fanotify_mark(
            fd,
            syscalls.FAN_MARK_ADD | syscalls.FAN_MARK_ONLYDIR,
            mask | syscalls.FAN_MODIFY | syscalls.FAN_ATTRIB,
            syscalls.AT_FDCWD,
            str(directory),
        )
        return "a directory is marked"

    return _finding(
        "fanotify",
        f"fanotify mark with names on {directory}",
        trial,
        "changes of lower are seen by time-outs of one second instead",
    )


def idmapped_mounts(directory: Path) -> Finding:
    """An id-mapped clone of the mount of `directory` (Linux >= 5.12, by root)."""

    def trial() -> str:
        ids = [IdRange(0, 1000000, 65536)]
        namespace = user_namespace(ids, ids)
        tree = syscalls.open_tree(
            syscalls.AT_FDCWD,
            str(directory),
            syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC,
        )
        syscalls.mount_setattr(
            tree,
            b"",
            syscalls.AT_EMPTY_PATH,
            attr_set=syscalls.MOUNT_ATTR_IDMAP,
            userns_fd=namespace,
        )
        return "a clone of the mount is id-mapped"

    return _finding(
        "idmapped-mounts",
        f"mount_setattr(MOUNT_ATTR_IDMAP) on a clone of {directory}",
        trial,
        "needs root and a filesystem that takes part; sdeefs maps ids itself",
    )


def upper_filesystem(upper: Path) -> list[Finding]:
    """What the filesystem of the directory `upper` can do for an upper."""
    try:
        with _scratch(upper) as place:
            return _upper_filesystem(upper, place)
    except OSError as error:
        return [Finding("upper", False, f"write in {upper}", f"{upper}: {error.strerror}")]


def _upper_filesystem(upper: Path, place: Path) -> list[Finding]:
    file = place / "file"
    file.write_bytes(b"x" * 4096)

    def xattr(name: str) -> Callable[[], str]:
        def trial() -> str:
            os.setxattr(file, name, b"y")
            return f"{name} is kept"

        return trial

    def whiteout() -> str:
        os.mknod(place / "white", stat.S_IFCHR, os.makedev(0, 0))
        return "character device 0/0 made"

    def tmpfile() -> str:
        os.close(os.open(place, os.O_TMPFILE | os.O_RDWR))
        return "O_TMPFILE works"

    def reflink() -> str:
        with open(file, "rb") as source, open(place / "clone", "wb") as target:
            try:
                fcntl.ioctl(target.fileno(), FICLONE, source.fileno())
            except OSError as error:
                if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
                    raise TrialFailed("this filesystem doesn't share extents") from None
                raise
        return "FICLONE works"

    return [
        _finding("xattr-user", f"set user.* on {upper}", xattr("user.sdeefs.trial")),
        _finding(
            "xattr-trusted",
            f"set trusted.* on {upper}",
            xattr("trusted.sdeefs.trial"),
            "needs root; userxattr is used instead",
        ),
        _finding(
            "whiteout-device",
            f"mknod c 0 0 on {upper}",
            whiteout,
            "whiteouts are files with an xattr instead",
        ),
        _finding("tmpfile", f"O_TMPFILE on {upper}", tmpfile),
        _finding("reflink", f"FICLONE on {upper}", reflink, "copy-up copies the data"),
    ]


def subordinate() -> Finding:
    """Whether the caller has subordinate ids and the tools that give them."""
    uid = os.getuid()
    uids, gids = subordinate_ids(uid)
    tried = f"/etc/subuid, /etc/subgid and newuidmap for uid {uid}"
    if not uids or not gids:
        return Finding(
            "subordinate-ids",
            False,
            tried,
            "no ranges",
            "root: usermod --add-subuids FIRST-LAST --add-subgids FIRST-LAST USER",
        )
    if not shutil.which("newuidmap") or not shutil.which("newgidmap"):
        return Finding(
            "subordinate-ids", False, tried, "no newuidmap/newgidmap", "apt install uidmap"
        )
    return Finding("subordinate-ids", True, tried, f"{sum(c for _, c in uids)} uids")


def probe(upper: Path | None = None, lower: Path = Path("/")) -> list[Finding]:
    """All findings; `upper` is the directory whose filesystem is tried (default: /var/tmp)."""
    place = upper or Path(os.environ.get("TMPDIR", "/var/tmp"))
    return [
        kernel_overlay(place),
        kernel_overlay(place, userxattr=True),
        overlay_in_user_namespace(place),
        user_namespaces(),
        subordinate(),
        *fuse(),
        fanotify(lower),
        idmapped_mounts(lower),
        *upper_filesystem(place),
    ]
