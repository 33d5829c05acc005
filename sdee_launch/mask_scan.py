"""What of the host's files not everybody may read: a walk over lower, as data.

`python -m sdee_launch.mask_scan` prints the scan as JSON lines: the daemon runs it as a process of
its own, niced, so that a walk never delays a request. Warm, 200,000 objects take half a second.

Other mounts are walked only where they belong to the system (their type is a disk's): shared
filesystems are bound into instances as they are, where the user is plainly the user.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from mount_helpers.mountinfo import read_mounts
from sdee_launch.config import site_settings

#: Mounts of these types are system parts and overlaid; any other is never walked.
SYSTEM_TYPES = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "jfs", "reiserfs", "bcachefs")
    + ("squashfs", "erofs", "overlay", "iso9660")
)
#: Always empty, whatever is in them: what comes and goes here can't be kept in a mask.
ALWAYS_EMPTY = (b"tmp", b"var/tmp", b"run")
#: Every directory in these is somebody's home, and always empty: the own one is bound over it.
HOMES = (b"home",)
#: A directory with more hidden objects than this is hidden whole, and so is one whose path is
#: longer: nobody may make everybody's mask large, or impossible, by what he keeps in lower.
MOST_IN_ONE = 2000
LONGEST_PATH = 3000


class Hidden(NamedTuple):
    """One object that not everybody may read. `path` is relative to /.

    `walked`: it is a directory and what is below it was looked at too, because a group may read it.
    """

    path: bytes
    mode: int
    uid: int
    gid: int
    size: int
    walked: bool

    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    def readable_by(self, uid: int, gids: frozenset[int]) -> bool:
        """As the kernel decides: the owner's bits, else the group's, else the others'.

        A directory that wasn't walked stays hidden even from its owner: nobody looked whether
        there is something of somebody else's in it.
        """
        wanted = 0o5 if self.is_directory() else 0o4
        if self.uid == uid:
            bits = self.mode >> 6
        elif self.gid in gids:
            bits = self.mode >> 3
        else:
            bits = self.mode
        return bits & wanted == wanted and (self.walked or not self.is_directory())


def _is_hidden(mode: int) -> bool:
    """Whether the owner, the group or the others are refused what the class below may do."""
    wanted = 0o555 if stat.S_ISDIR(mode) else 0o444
    # Refusing only the group (mode 604) hides it from the members of that group.
    return mode & wanted != wanted


def _group_may_read(mode: int, gid: int) -> bool:
    return gid != 0 and mode >> 3 & 0o5 == 0o5


def scan(
    root: bytes = b"/",
    foreign_mounts: frozenset[bytes] = frozenset(),
    always_empty: Sequence[bytes] = ALWAYS_EMPTY,
    homes: Sequence[bytes] = HOMES,
    start: Sequence[bytes] = (b"",),
) -> Iterator[Hidden]:
    """Every hidden object below `root`, parents before children; never into `foreign_mounts`.

    `start`: only below these directories. Objects that vanish meanwhile are left out; a directory that can't be walked counts as hidden.
    """
    mounted: dict[bytes, set[bytes]] = {}
    for point in foreign_mounts:
        mounted.setdefault(os.path.dirname(point), set()).add(os.path.basename(point))
    stack = list(start)
    while stack:
        relative = stack.pop()
        try:
            found, below = _one_directory(root, relative, mounted, always_empty, homes)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            found, below = [], []
            if relative:
                yield _hidden_whole(root, relative)
        if len(found) > MOST_IN_ONE and relative:
            yield _hidden_whole(root, relative)
            continue
        yield from found
        stack += below


def again(
    old: Iterable[Hidden], changed: Iterable[bytes], homes: Sequence[bytes], root: bytes = b"/"
) -> list[Hidden]:
    """A scan brought up to date at some paths, and below them; sorted."""
    foreign = foreign_mounts()
    for path in sorted(changed):
        parent, name = os.path.split(path)
        old = [x for x in old if x.path != path and not x.path.startswith(path + b"/")]
        above = set(parents(path))
        if any(x.path in above and x.is_directory() and not x.walked for x in old):
            continue  # in a directory that is hidden whole
        if os.path.join(root, path) in foreign:
            continue
        try:
            found, below = _one_directory(root, parent, {}, ALWAYS_EMPTY, homes, name)
        except OSError:
            continue
        old += found
        old += scan(root, foreign, ALWAYS_EMPTY, homes, below)
    return sorted(old)


def _hidden_whole(root: bytes, relative: bytes) -> Hidden:
    try:
        status = os.lstat(os.path.join(root, relative))
    except OSError:
        return Hidden(relative, stat.S_IFDIR | 0o755, 0, 0, 0, False)
    return Hidden(relative, status.st_mode, status.st_uid, status.st_gid, 0, False)


def _one_directory(
    root: bytes,
    relative: bytes,
    mounted: Mapping[bytes, set[bytes]],
    always_empty: Sequence[bytes],
    homes: Sequence[bytes],
    only: bytes = b"",
) -> tuple[list[Hidden], list[bytes]]:
    """The hidden objects in one directory (`only` one name), and its directories to walk."""
    if len(relative) > LONGEST_PATH:
        raise OSError(f"{relative[:40]!r}… is too long a path")
    found, below = [], []
    top = os.path.join(root, relative) if relative else root
    foreign = mounted.get(top, ())
    prefix = relative + b"/" if relative else b""
    with os.scandir(top) as entries:
        # Half a million objects are usual: what is plain of most is told with the fewest words.
        for entry in entries:
            if entry.is_symlink() or entry.name in foreign or (only and entry.name != only):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            mode = status.st_mode
            is_directory = stat.S_ISDIR(mode)
            if not is_directory and mode & 0o444 == 0o444:
                continue
            path = prefix + entry.name
            if is_directory and (path in always_empty or relative in homes):
                found.append(Hidden(path, mode, status.st_uid, status.st_gid, 0, False))
                continue
            walked = is_directory and (mode & 0o5 == 0o5 or _group_may_read(mode, status.st_gid))
            if walked:
                below.append(path)
            if _is_hidden(mode):
                found.append(
                    Hidden(path, mode, status.st_uid, status.st_gid, status.st_size, walked)
                )
    return found, below


def foreign_mounts() -> frozenset[bytes]:
    """The mount points of this namespace whose topmost mount is no part of the system."""
    top = {mount.point: mount.fstype for mount in read_mounts()}
    return frozenset(
        point
        for point, fstype in top.items()
        if point != b"/"
        and (fstype not in SYSTEM_TYPES or (fstype == "overlay" and point.count(b"/") > 1))
    )


def hidden_from(found: Iterable[Hidden], uid: int, gids: frozenset[int]) -> list[Hidden]:
    """What one user may not read; nothing below a directory that is hidden itself."""
    result: list[Hidden] = []
    closed: set[bytes] = set()
    for item in sorted(found):
        if any(parent in closed for parent in parents(item.path)):
            continue
        if item.readable_by(uid, gids):
            continue
        result.append(item)
        if item.is_directory():
            closed.add(item.path)
    return result


def parents(path: bytes) -> Iterator[bytes]:
    """The directories above a relative path, the nearest first; the root isn't among them."""
    while True:
        path = os.path.dirname(path)
        if not path:
            return
        yield path


def to_line(item: Hidden) -> str:
    """One line of the scan's output."""
    return json.dumps([os.fsdecode(item.path), *item[1:]])


def from_line(line: str) -> Hidden:
    """The reverse. Raises ValueError."""
    fields = json.loads(line)
    if not isinstance(fields, list) or len(fields) != 6 or not isinstance(fields[0], str):
        raise ValueError(f"not a line of a scan: {line[:80]!r}")
    path, mode, uid, gid, size, walked = fields
    return Hidden(os.fsencode(path), int(mode), int(uid), int(gid), int(size), bool(walked))


def main() -> int:
    """Print the scan of / and, last, a line that says it is whole."""
    os.nice(10)
    homes = [os.fsencode(path).strip(b"/") for path in site_settings().homes]
    for item in scan(foreign_mounts=foreign_mounts(), homes=homes):
        print(to_line(item))
    print("whole")
    return 0


if __name__ == "__main__":
    sys.exit(main())
