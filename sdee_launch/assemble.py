"""Putting an instance's root together: in a child, root of its new user, mount and PID namespaces.

Two rounds: `gather` opens everything that comes from the host and makes what is new, as detached
mounts, while the merged root may still be on its way; `assemble` attaches that and puts the rest on
top. Targets are looked up *in* the new root (RESOLVE_IN_ROOT): what the user's upper has there may
be any link.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mount_helpers import syscalls as sc
from sdee_launch.plan import Bind, Cover, Plan, Private, Proc, Tmpfs

#: Directories to attach the new root at until it is pivoted to; one of them is always there.
_PLACES = (b"/tmp", b"/mnt", b"/run", b"/var")
_QUIET = (errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ESTALE)


class AssemblyFailed(Exception):
    """What could not be put where, and why, in one line."""


@dataclass
class Material:
    """What `assemble` works with: descriptors of the caller's.

    `private`: detached mounts of the environment's private directories, by name; a tmpfs where one
    is missing. `extra`: more detached mounts, by target.
    """

    mounts: Sequence[tuple[bytes, int]]
    private: Mapping[str, int] = field(default_factory=dict)
    extra: Sequence[tuple[bytes, int]] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)  # written below /run
    links: Mapping[str, str] = field(default_factory=dict)  # made below /run


def gather(plan: Plan) -> dict[int, int]:
    """Detached mounts of what doesn't depend on the merged root, by the number of the step.

    Raises AssemblyFailed.
    """
    try:
        sc.mount(None, b"/", None, sc.MS_REC | sc.MS_SLAVE)
    except OSError as error:
        raise AssemblyFailed(f"make / a slave: {error.strerror}") from None
    found = {}
    for number, step in enumerate(plan.steps):
        if isinstance(step, Proc):
            found[number] = _filesystem("proc", {}, _TIGHT)
            continue
        if isinstance(step, Tmpfs):
            found[number] = _tmpfs(step)
            continue
        if not isinstance(step, Bind):
            continue
        try:
            fd = sc.open_tree(
                sc.AT_FDCWD,
                step.source,
                sc.OPEN_TREE_CLONE | sc.OPEN_TREE_CLOEXEC | sc.AT_RECURSIVE,
            )
        except OSError as error:
            if step.optional and error.errno in _QUIET:
                continue
            what = f"bind of {os.fsdecode(step.source)}"
            raise AssemblyFailed(f"{what}: {error.strerror}") from None
        attributes = (sc.MOUNT_ATTR_NOSUID if step.nosuid else 0) | (
            sc.MOUNT_ATTR_RDONLY if step.readonly else 0
        )
        if attributes:
            try:
                sc.mount_setattr(fd, b"", sc.AT_EMPTY_PATH | sc.AT_RECURSIVE, attr_set=attributes)
            except OSError as error:
                raise AssemblyFailed(f"{os.fsdecode(step.source)}: {error.strerror}") from None
        found[number] = fd
    return found


def assemble(plan: Plan, material: Material, gathered: Mapping[int, int]) -> None:
    """Make the plan real with what `gather` gave, and pivot to it. Raises AssemblyFailed."""
    root = _attach_root(material.mounts)
    for point, mount in material.mounts[1:]:
        _put(root, mount, point, True, "the merged mount")
    _fill(plan, material, gathered, root)
    _pivot(root)


def _attach_root(mounts: Sequence[tuple[bytes, int]]) -> int:
    """Attach the merged root somewhere and go there; gives a descriptor of it."""
    reason = "nothing"
    for place in _PLACES:
        try:
            sc.attach(mounts[0][1], place)
            root = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            os.chdir(root)
            return root
        except OSError as error:
            reason = error.strerror or str(error)
    raise AssemblyFailed(f"the merged root can't be attached: {reason}")


def _fill(plan: Plan, material: Material, gathered: Mapping[int, int], root: int) -> None:
    for number, step in enumerate(plan.steps):
        shown = os.fsdecode(step.target)
        if isinstance(step, Bind):
            if number in gathered:
                _bind(root, gathered[number], step)
                os.close(gathered[number])
        elif isinstance(step, Proc | Tmpfs):
            _put(root, gathered[number], step.target, True, shown)
            if step.target == b"/run":
                _write_run(root, material)
        elif isinstance(step, Private):
            _private(root, material.private, step)
        elif isinstance(step, Cover):
            _cover(root, step.target)
    for target, mount in material.extra:
        _put(root, mount, target, None, os.fsdecode(target))


_TIGHT = sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV | sc.MOUNT_ATTR_NOEXEC
_TMP = sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV


def _filesystem(fstype: str, options: Mapping[str, str], attributes: int) -> int:
    fs = -1
    try:
        fs = sc.fsopen(fstype)
        sc.fsconfig_string(fs, "source", "sdee" if fstype == "tmpfs" else fstype)
        for key, value in options.items():
            sc.fsconfig_string(fs, key, value)
        sc.fsconfig_create(fs)
        return sc.fsmount(fs, attributes)
    except OSError as error:
        hint = ""
        if fstype == "proc" and error.errno == errno.EPERM:
            hint = " (parts of the host's /proc are covered, as in a container)"
        raise AssemblyFailed(f"a new {fstype}: {error.strerror}{hint}") from None
    finally:
        if fs >= 0:
            os.close(fs)


def _tmpfs(step: Tmpfs) -> int:
    mount = _filesystem("tmpfs", {"size": step.size, "mode": f"{step.mode:o}"}, _TMP)
    for name, mode in step.directories:
        os.mkdir(name, mode, dir_fd=mount)
        os.chmod(name, mode, dir_fd=mount)
    return mount


def _write_run(root: int, material: Material) -> None:
    run = sc.openat2(root, b"/run", os.O_PATH | os.O_DIRECTORY, resolve=sc.RESOLVE_IN_ROOT)
    try:
        for name, content in material.files.items():
            _parents(run, name)
            fd = os.open(
                name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=run
            )
            os.write(fd, content)
            os.close(fd)
        for name, target in material.links.items():
            _parents(run, name)
            os.symlink(target, name, dir_fd=run)
    finally:
        os.close(run)


def _parents(run: int, name: str) -> None:
    parent = os.path.dirname(name)
    if parent:
        try:
            os.mkdir(parent, 0o755, dir_fd=run)
        except FileExistsError:
            pass


def _private(root: int, private: Mapping[str, int], step: Private) -> None:
    mount = private.get(step.name)
    if mount is None:
        mount = _filesystem("tmpfs", {"size": "10%", "mode": f"{step.mode:o}"}, _TMP)
    _put(root, mount, step.target, True, os.fsdecode(step.target))


def clone_private(fd: int) -> int:
    """A detached mount of an open directory of the caller's mount namespace. Raises OSError."""
    flags = sc.AT_EMPTY_PATH | sc.OPEN_TREE_CLONE | sc.OPEN_TREE_CLOEXEC
    mount = sc.open_tree(fd, b"", flags)
    sc.mount_setattr(mount, b"", sc.AT_EMPTY_PATH, attr_set=_TMP)
    return mount


def _bind(root: int, source: int, step: Bind) -> None:
    try:
        _move(root, source, step.target, _is_dir(source))
    except OSError as error:
        if step.optional and error.errno in (*_QUIET, errno.EPERM, errno.EROFS):
            return
        raise AssemblyFailed(f"bind at {os.fsdecode(step.target)}: {error.strerror}") from None


def _is_dir(fd: int) -> bool:
    return stat.S_ISDIR(os.fstat(fd).st_mode)


def _cover(root: int, target: bytes) -> None:
    """An empty directory, or /dev/null, over what is there; nothing if nothing is."""
    try:
        fd = sc.openat2(root, target, os.O_PATH, resolve=sc.RESOLVE_IN_ROOT)
    except OSError:
        return
    try:
        if _is_dir(fd):
            mount = _filesystem(
                "tmpfs", {"size": "4k", "mode": "555"}, _TIGHT | sc.MOUNT_ATTR_RDONLY
            )
        else:
            null = sc.openat2(root, b"/dev/null", os.O_PATH, resolve=sc.RESOLVE_IN_ROOT)
            mount = sc.open_tree(
                null, b"", sc.AT_EMPTY_PATH | sc.OPEN_TREE_CLONE | sc.OPEN_TREE_CLOEXEC
            )
            os.close(null)
        flags = sc.MOVE_MOUNT_F_EMPTY_PATH | sc.MOVE_MOUNT_T_EMPTY_PATH
        sc.move_mount(mount, b"", fd, b"", flags)
        os.close(mount)
    except OSError as error:
        raise AssemblyFailed(f"cover {os.fsdecode(target)}: {error.strerror}") from None
    finally:
        os.close(fd)


def _put(root: int, mount: int, target: bytes, directory: bool | None, what: str) -> None:
    """Attach a detached mount; its descriptor is closed. `directory` None: as the mount is."""
    try:
        _move(root, mount, target, _is_dir(mount) if directory is None else directory)
    except OSError as error:
        raise AssemblyFailed(f"{what} at {os.fsdecode(target)}: {error.strerror}") from None
    os.close(mount)


def _move(root: int, mount: int, target: bytes, directory: bool) -> None:
    fd = _target(root, target, directory)
    try:
        flags = sc.MOVE_MOUNT_F_EMPTY_PATH | sc.MOVE_MOUNT_T_EMPTY_PATH
        sc.move_mount(mount, b"", fd, b"", flags)
    finally:
        os.close(fd)


def _target(root: int, path: bytes, directory: bool) -> int:
    """A descriptor of the place in the new root, made if it isn't there. Raises OSError."""
    try:
        return sc.openat2(root, path, os.O_PATH, resolve=sc.RESOLVE_IN_ROOT)
    except FileNotFoundError:
        if path == b"/":
            raise
    parent = _target(root, os.path.dirname(path), True)
    name = os.path.basename(path)
    try:
        if directory:
            os.mkdir(name, 0o755, dir_fd=parent)
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            os.close(os.open(name, flags, 0o644, dir_fd=parent))
        return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    finally:
        os.close(parent)


def _pivot(root: int) -> None:
    """The new root becomes /, the host's goes away for good."""
    try:
        os.chdir(root)
        sc.pivot_root(b".", b".")
        sc.umount2(b".", sc.MNT_DETACH)
        os.chdir("/")
    except OSError as error:
        raise AssemblyFailed(f"pivot to the merged root: {error.strerror}") from None
    os.close(root)
