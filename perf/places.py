"""Where a run keeps its things: layers on a real disk, programs where every sandbox sees them."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mount_helpers.mountinfo import Mount, read_mounts
from perf.figures import Missing

#: In memory, or unable to hold an upper: no place for layers.
NO_DISK = frozenset(("tmpfs", "ramfs", "devtmpfs", "overlay", "squashfs", "proc", "sysfs"))


def mount_of(path: Path) -> Mount:
    """The mount that holds a path. Raises OSError."""
    resolved = os.fsencode(path.resolve(strict=True))
    found = None
    for mount in read_mounts():
        point = mount.point.rstrip(b"/")
        # A later line covers an earlier one at the same point.
        if (resolved == mount.point or resolved.startswith(point + b"/")) and (
            found is None or len(mount.point) >= len(found.point)
        ):
            found = mount
    if found is None:
        raise FileNotFoundError(2, "No mount holds", str(path))
    return found


def described(path: Path) -> str:
    """The filesystem that holds a path, for the report: its type, device, and what that is."""
    mount = mount_of(path)
    source = os.fsdecode(mount.source)
    block = Path(f"/sys/dev/block/{mount.device[0]}:{mount.device[1]}")
    backing = block / "loop/backing_file"
    if backing.exists():
        file = backing.read_text().strip()
        try:
            under = mount_of(Path(file).parent).fstype
        except OSError:
            under = "an unknown filesystem"
        kind = f"a loop device over a file on {under}"
        if under in ("tmpfs", "ramfs", "devtmpfs"):
            kind += ", so in memory"
    elif block.exists():
        kind = _disk(block.resolve())
    else:
        kind = "in memory" if mount.fstype in ("tmpfs", "ramfs", "devtmpfs") else "no block device"
    return f"{mount.fstype} on {source} ({kind})"


def default_scratch() -> Path:
    """A directory on a real filesystem: the current one, TMPDIR or /var/tmp. Raises Missing."""
    tried = [Path.cwd(), Path(tempfile.gettempdir()), Path("/var/tmp")]
    for place in tried:
        kind = mount_of(place).fstype
        if os.access(place, os.W_OK) and kind not in NO_DISK and not kind.startswith("fuse"):
            return place
    names = ", ".join(map(str, tried))
    raise Missing(f"none of {names} is a writable directory on a disk; name one by --scratch")


def spread(path: Path) -> None:
    """Make ext4 give each directory made in `path` a block group of its own (chattr +T).

    ext4 looks at every inode that was deleted in the last minutes before it gives out one of the same
    group (recently_deleted(), seen on Linux 6.18): where one contender has removed thousands of
    files, the next one's creations took up to a millisecond each. Other filesystems don't know the flag.
    """
    subprocess.run(["chattr", "+T", str(path)], capture_output=True, check=False, timeout=20)


def written_back(path: Path) -> None:
    """Wait until nothing of the filesystem waits to be written: it would disturb who comes next."""
    subprocess.run(["sync", "--file-system", str(path)], check=True, timeout=600)


def _disk(block: Path) -> str:
    """What a block device without a file behind it is, by its directory in sysfs."""
    if not (block / "queue").exists():  # a partition: the disk's directory is the one above
        block = block.parent
    if block.name.startswith("vd"):
        return "a virtual machine's disk"
    try:
        spins = (block / "queue/rotational").read_text().strip() == "1"
    except OSError:
        return "a disk"
    return "a spinning disk" if spins else "a disk without spinning parts"


@dataclass(frozen=True)
class Place:
    """Directories that are the same inside and outside.

    `programs`: what is run. `work`: the user's, on whatever filesystem the sandbox has there.
    `image`: the root of a container, to which the host's /usr is bound. `podman`: what it keeps.
    """

    programs: Path
    work: Path
    image: Path
    podman: Path


def _image(path: Path) -> None:
    """A root directory as an image has it, but for /usr."""
    for name in ("usr", "etc", "tmp", "proc", "dev", "sys", "run", "var/tmp", "root"):
        (path / name).mkdir(parents=True)
    for name in ("tmp", "var/tmp"):
        (path / name).chmod(0o1777)
    for name in ("bin", "sbin", "lib", "lib64"):
        (path / name).symlink_to(f"usr/{name}")
    for name in ("passwd", "group", "ld.so.cache", "alternatives", "openmpi"):
        source = Path("/etc") / name
        if source.is_dir():
            shutil.copytree(source, path / "etc" / name, symlinks=True)
        elif source.exists():
            shutil.copy2(source, path / "etc" / name)


def _give(path: Path, uid: int, gid: int) -> None:
    for directory, _, files in os.walk(path):
        for name in (directory, *(os.path.join(directory, file) for file in files)):
            os.chown(name, uid, gid, follow_symlinks=False)


@contextmanager
def place(user: str | None) -> Iterator[Place]:
    """A place for one run of `user`: in /var/cache as root, else in the own cache."""
    if os.getuid():
        account, parent = pwd.getpwuid(os.getuid()), Path.home() / ".cache"
    else:
        try:
            account = pwd.getpwnam(user or "root")
        except KeyError:
            raise Missing(f"--user {user}: there is no such user") from None
        parent = Path("/var/cache")
    parent.mkdir(parents=True, exist_ok=True)
    top = Path(tempfile.mkdtemp(prefix="sdee-perf-", dir=parent))
    # podman takes no runroot of more than 50 characters.
    found = Place(top / "programs", top / "work", top / "image", top / "p")
    try:
        top.chmod(0o755)
        for directory in (found.programs, found.work, found.image, found.podman):
            directory.mkdir()
        _image(found.image)
        for directory in (found.work, found.image, found.podman):
            _give(directory, account.pw_uid, account.pw_gid)
        yield found
    finally:
        _end_podman(found.podman)
        shutil.rmtree(top, ignore_errors=True)


def _end_podman(kept: Path) -> None:
    """Remove what podman keeps, and end the process that holds its namespaces."""
    if os.getuid() and any(kept.iterdir()):
        # Files of subordinate ids, which only their owner's namespace may remove.
        where = [f"--root={kept / 's'}", f"--runroot={kept / 'r'}", f"--tmpdir={kept / 't'}"]
        words = ["podman", *where, "unshare", "rm", "-rf", str(kept / "s"), str(kept / "r")]
        subprocess.run(words, capture_output=True, check=False, timeout=60)
    for file in kept.rglob("pause.pid"):
        try:
            os.kill(int(file.read_text()), signal.SIGTERM)
        except (OSError, ValueError):
            continue
