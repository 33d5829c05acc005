"""The mask layer: what lies above lower so that the host's secrets stay secret.

For the kernel engine the whole rule is in it: `lowerdir=mask:lower`. A directory that the user
couldn't read on the host is an opaque empty one; such a file is an empty one of mode 000 whose
owner has no name in the instance, so that no capability of env-root reaches it, while its directory
lets it be replaced or removed. For sdeefs, which applies the rule itself, the layer holds only the
stand-ins.

A tree mirrors the host's paths from / on: the mask of a lower that is mounted at /usr is its `usr`
(`sub_layer`). Trees are named by what is in them, below DIRECTORY/trees; a new scan makes a new
tree, and what it found more is added to those of live instances (`extend`). DIRECTORY is a tmpfs of
the daemon's own: overlayfs refuses two lowers of which one lies below the other (ELOOP), and lower
is all of /.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mount_helpers import syscalls as sc
from mount_helpers.mountinfo import mount_at
from mount_helpers.namespaces import IdRange, user_namespace
from sdee_launch import mask_scan, stand_ins
from sdee_launch.mask_scan import Hidden

DIRECTORY = "/run/sdee/masks"
KERNEL, FUSE = "kernel", "fuse"

#: The owner, on disk, of what may not be read; mapped to an id that no instance has a name for.
SECRET_ID = 4_000_000_000
_NOBODY = (65534, 65533, 4_294_967_293)
_FORMAT = 1


@dataclass(frozen=True)
class Rule:
    """What the site says of masks; patterns are globs of paths without their leading slash."""

    blank: tuple[str, ...] = stand_ins.BLANK
    public: tuple[str, ...] = stand_ins.PUBLIC


RULE = Rule()


@dataclass(frozen=True)
class Node:
    """One object of a mask tree."""

    path: bytes
    mode: int
    uid: int
    gid: int
    opaque: bool = False
    content: bytes = field(default=b"", repr=False)


def plan(
    hidden: Iterable[Hidden], kind: str, rule: Rule = RULE, root: str = "/"
) -> dict[bytes, Node]:
    """The nodes of a mask for one user, by path, parents first, without doing anything.

    `hidden` is what the user may not read, as `mask_scan.hidden_from` gives it; what is in a
    directory that was removed since then is left out.
    """
    nodes: dict[bytes, Node] = {}
    for item in hidden:
        node = _node(item, kind, rule, root)
        if node is not None:
            nodes[item.path] = node
    gone: set[bytes] = set()
    for path in list(nodes):
        for parent in mask_scan.parents(path):
            if parent in nodes:
                continue
            try:
                status = os.lstat(os.path.join(os.fsencode(root), parent))
            except OSError:
                gone.add(parent)
                continue
            if not stat.S_ISDIR(status.st_mode):
                gone.add(parent)
                continue
            nodes[parent] = Node(parent, status.st_mode, status.st_uid, status.st_gid)
    return {
        path: node
        for path, node in sorted(nodes.items())
        if not gone or gone.isdisjoint(mask_scan.parents(path))
    }


def _node(item: Hidden, kind: str, rule: Rule, root: str) -> Node | None:
    permissions = stat.S_IMODE(item.mode) & 0o1777
    if item.is_directory():
        if kind == FUSE:
            return None
        return Node(item.path, stat.S_IFDIR | permissions, item.uid, item.gid, opaque=True)
    if kind == FUSE:
        # sdeefs applies its rule to this layer as well, and there is nothing secret in it.
        permissions |= 0o444
    content = stand_ins.content(item.path, root)
    if content is not None:
        return Node(item.path, stat.S_IFREG | permissions, item.uid, item.gid, False, content)
    if (item.size == 0 and stat.S_ISREG(item.mode)) or stand_ins.is_blank(item.path, rule.blank):
        return Node(item.path, stat.S_IFREG | permissions, item.uid, item.gid)
    if kind == FUSE or stand_ins.is_blank(item.path, rule.public):
        return None
    return Node(item.path, stat.S_IFREG, SECRET_ID, SECRET_ID)


def digest(nodes: dict[bytes, Node], kind: str) -> str:
    """The name of the tree of these nodes."""
    sum_ = hashlib.sha256(f"{_FORMAT} {kind}\n".encode())
    for node in nodes.values():
        sum_.update(
            b"%d:%s %o %d %d %d %d:%s\n"
            % (
                len(node.path), node.path, node.mode, node.uid, node.gid,
                node.opaque, len(node.content), node.content,
            )
        )  # fmt: skip
    return f"{kind}-{sum_.hexdigest()[:32]}"


def build(nodes: dict[bytes, Node], target: str) -> None:
    """Make the tree `target`, whole or not at all. Raises OSError."""
    temporary = f"{target}.new"
    os.makedirs(temporary, mode=0o700)
    try:
        os.chmod(temporary, 0o755)
        base = os.fsencode(temporary)
        for node in nodes.values():
            _make(node, os.path.join(base, node.path))
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _make(node: Node, path: bytes) -> None:
    if stat.S_ISDIR(node.mode):
        os.mkdir(path, 0o700)
        if node.opaque:
            os.setxattr(path, b"user.overlay.opaque", b"y")
    else:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, node.content)
        finally:
            os.close(fd)
    os.chown(path, node.uid, node.gid)
    os.chmod(path, stat.S_IMODE(node.mode))


def _add(node: Node, tree: bytes, temporary: bytes) -> bool:
    """Put a node into a tree that is in use, with one rename; whether it wasn't there.

    What stands in the way (an object of another type in an older tree) stays. Raises OSError.
    """
    target = os.path.join(tree, node.path)
    try:
        there = os.lstat(target).st_mode
    except NotADirectoryError:
        return False
    except FileNotFoundError:
        _make(node, temporary)
        os.rename(temporary, target)
        return True
    if not (node.opaque and stat.S_ISDIR(there)):
        return False
    try:
        os.setxattr(target, b"user.overlay.opaque", b"y", os.XATTR_CREATE)
    except FileExistsError:
        return False
    return True


def open_layer(
    tree: str, uid_map: Sequence[IdRange] | None = None, gid_map: Sequence[IdRange] | None = None
) -> int:
    """A descriptor of the layer `tree`, for `lowerdir+` above lower. The caller's to close.

    With maps (those of the idmapped lower) it is a detached mount with the same ids, but that the
    owner of secrets becomes one that no instance knows. Without, the bare directory.
    """
    if uid_map is None or gid_map is None:
        return os.open(tree, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    mount = sc.open_tree(sc.AT_FDCWD, tree, sc.OPEN_TREE_CLONE | sc.OPEN_TREE_CLOEXEC)
    try:
        userns = user_namespace(_with_secret(uid_map), _with_secret(gid_map))
        try:
            sc.mount_setattr(
                mount, b"", sc.AT_EMPTY_PATH, attr_set=sc.MOUNT_ATTR_IDMAP, userns_fd=userns
            )
        finally:
            os.close(userns)
    except BaseException:
        os.close(mount)
        raise
    return mount


def sub_layer(layer: int, mount_point: bytes) -> int | None:
    """The part of a layer for a lower that is mounted at `mount_point`; None if it needs none."""
    relative = mount_point.strip(b"/")
    if not relative:
        return os.dup(layer)
    try:
        return os.open(
            relative, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=layer
        )
    except FileNotFoundError:
        return None


def _with_secret(ranges: Sequence[IdRange]) -> list[IdRange]:
    for nobody in _NOBODY:
        if not any(r.outside <= nobody < r.outside + r.count for r in ranges):
            return [*ranges, IdRange(SECRET_ID, nobody, 1)]
    raise OSError(f"the ids {_NOBODY} all belong to one user: give subordinate ids below 65533")


class Masks:
    """The scan in force and the trees made of it, in one directory that only root may enter."""

    def __init__(self, directory: str = DIRECTORY, rule: Rule = RULE) -> None:
        self.directory = directory
        self.rule = rule
        self._scan: tuple[Hidden, ...] | None = None
        self.scanned_at = 0.0
        #: For a user, the groups and a kind: the tree, and the scan that it was made of.
        self._trees: dict[tuple[int, frozenset[int], str], tuple[tuple[Hidden, ...], str]] = {}
        self._built: dict[str, str] = {}  # by what is in them
        self._pins: Counter[str] = Counter()
        self._extended: dict[str, str] = {}  # trees in use, by path: what was hidden there last
        self._lock = threading.Lock()
        os.makedirs(directory, mode=0o700, exist_ok=True)
        if mount_at(directory) is None:
            flags = sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC
            sc.mount("sdee-masks", directory, "tmpfs", flags, "mode=700,size=10%,nr_inodes=1m")
            sc.mount(None, directory, None, sc.MS_PRIVATE)
        trees = os.path.join(directory, "trees")
        os.makedirs(trees, mode=0o700, exist_ok=True)
        for name in os.listdir(trees):
            if not name.endswith(".new"):
                self._built[name.rpartition(".")[0]] = os.path.join(trees, name)
        os.chmod(directory, 0o700)

    @property
    def complete(self) -> bool:
        """Whether there is a scan; without one no instance may start."""
        return self._scan is not None

    def load(self, maximum_age: float) -> bool:
        """Take the scan that an earlier daemon left, if this boot made it that recently."""
        try:
            with open(os.path.join(self.directory, "scan"), encoding="ascii") as file:
                head = json.loads(file.readline())
                if head.get("format") != _FORMAT or head.get("boot") != _boot_id():
                    return False
                age = time.clock_gettime(time.CLOCK_BOOTTIME) - float(head["at"])
                if not 0 <= age < maximum_age:
                    return False
                self._scan = _parse(file)
                self.scanned_at = float(head["at"])
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return False
        return True

    def accept(self, output: str, started_at: float) -> None:
        """Put the output of `python -m sdee_launch.mask_scan` in force. Raises ValueError."""
        self._put(_parse(output.splitlines()), output, started_at)

    def update(self, changed: Iterable[bytes], homes: Sequence[bytes]) -> bool:
        """Look again at some paths, relative to /; whether anything is otherwise than it was."""
        if self._scan is None:
            return False
        now = tuple(mask_scan.again(self._scan, changed, homes))
        if now == tuple(sorted(self._scan)):
            return False
        lines = "".join(mask_scan.to_line(item) + "\n" for item in now)
        self._put(now, lines + "whole\n", self.scanned_at)
        return True

    def secrets(self) -> list[bytes]:
        """The paths of all that is hidden from somebody."""
        return [item.path for item in self._scan or ()]

    def _put(self, scan: tuple[Hidden, ...], output: str, started_at: float) -> None:
        self._scan = scan
        self._trees.clear()
        self.scanned_at = started_at
        head = {"format": _FORMAT, "boot": _boot_id(), "at": started_at}
        path = os.path.join(self.directory, "scan")
        with open(path + ".new", "w", encoding="ascii") as file:
            file.write(json.dumps(head) + "\n" + output)
        os.rename(path + ".new", path)

    def tree(self, uid: int, gids: Iterable[int], kind: str) -> str:
        """The path of the mask tree for a user with these groups; made if it isn't there.

        It stays until `release`, and as long as `prune` is told that it is in use. No name is ever
        used twice: whoever still has a removed tree open must not take it for a new one.
        Raises RuntimeError if there is no scan yet, OSError.
        """
        scan = self._scan
        if scan is None:
            raise RuntimeError("the host's files were not scanned for secrets yet")
        key = (uid, frozenset(gids), kind)
        nodes = plan(mask_scan.hidden_from(scan, uid, key[1]), kind, self.rule)
        name = digest(nodes, kind)
        with self._lock:
            path = self._built.get(name)
            if path is None:
                path = os.path.join(self.directory, "trees", f"{name}.{time.time_ns():x}")
                build(nodes, path)
                self._built[name] = path
            self._trees[key] = (scan, path)
            self._pins[path] += 1
        return path

    def known_tree(self, uid: int, gids: Iterable[int], kind: str) -> str | None:
        """What `tree` gave since the last scan, without any work; to be released as well."""
        with self._lock:
            scan, path = self._trees.get((uid, frozenset(gids), kind), (None, None))
            if path is None or scan is not self._scan:
                return None
            self._pins[path] += 1
            return path

    def in_force(self, path: str) -> bool:
        """Whether a tree is of the last scan."""
        with self._lock:
            return any(p == path and scan is self._scan for scan, p in self._trees.values())

    def extend(self, path: str, uid: int, gids: Iterable[int]) -> bool:
        """Put into a tree in use what the scan in force hides from a user; whether anything was new.

        What isn't secret any more stays hidden there. Raises RuntimeError if there is no scan, OSError.
        """
        if self._scan is None:
            raise RuntimeError("the host's files were not scanned for secrets yet")
        hidden = mask_scan.hidden_from(self._scan, uid, frozenset(gids))
        nodes = plan(hidden, KERNEL, self.rule)
        name = digest(nodes, KERNEL)
        with self._lock:
            if name in (os.path.basename(path).rpartition(".")[0], self._extended.get(path)):
                return False
            # It isn't what its name says any more: no new instance gets it.
            self._built = {n: built for n, built in self._built.items() if built != path}
            tree = os.fsencode(path)
            temporary = os.fsencode(os.path.join(self.directory, f"new.{time.time_ns():x}"))
            added = [_add(node, tree, temporary) for node in nodes.values()]
            self._extended[path] = name
        return any(added)

    def release(self, path: str) -> None:
        """The caller of `tree` has no more need of it, or has put it where `prune` sees it."""
        with self._lock:
            self._pins[path] -= 1
            if not self._pins[path]:
                del self._pins[path]

    def close(self) -> None:
        """Take the tmpfs away; live overlays that have a tree of it as lower keep it alive."""
        with contextlib.suppress(OSError):
            sc.umount2(self.directory, sc.MNT_DETACH)

    def prune(self, used: Iterable[str]) -> None:
        """Remove all trees but those in use: a live instance's mask must never go."""
        with self._lock:
            keep = {*used, *self._pins}
            keep |= {path for scan, path in self._trees.values() if scan is self._scan}
            self._built = {name: path for name, path in self._built.items() if path in keep}
            self._extended = {path: name for path, name in self._extended.items() if path in keep}
            base = os.path.join(self.directory, "trees")
            for name in os.listdir(base):
                path = os.path.join(base, name)
                if path not in keep:
                    shutil.rmtree(path, ignore_errors=True)


def _parse(lines: Iterable[str]) -> tuple[Hidden, ...]:
    found: list[Hidden] = []
    for line in lines:
        if line.strip() == "whole":
            return tuple(found)
        found.append(mask_scan.from_line(line))
    raise ValueError("the scan ends before it was whole")


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
