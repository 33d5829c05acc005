"""A job's own layer laid onto the generation it ran on: one tree that can be a generation.

Both layers are uppers of the same lower, so whiteouts and opaque marks of the job's layer stay: the
host below may have the name too. Runs inside the user's namespace.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat

from sdee_launch.deploy.apply import Places
from sdee_launch.deploy.walk import DIRECTORY, Found, Walk, remove_tree, xattrs

OPAQUE = b"user.overlay.opaque"


def flatten(lowers: list[int], upper: int, target: int) -> None:
    """Make in the empty directory `target` what `lowers` (topmost first) under `upper` are as one
    upper. Arguments are descriptors on one filesystem. Raises OSError."""
    for layer in [*reversed(lowers), upper]:
        _lay(layer, target)


def _lay(layer: int, target: int) -> None:
    """Put one layer on top of what `target` has."""
    places = Places(target)
    times: list[tuple[bytes, int]] = []
    first: dict[int, bytes] = {}
    others = Places(target)
    try:
        walk = Walk(layer, lambda _: False)
        for found in walk:
            entry = found.entry
            if not entry.path:
                _directory(target, found)
                times.append((b"", entry.mtime_ns))
                continue
            dirfd, name = places.parent(entry.path)
            if entry.kind == "d":
                fd = _make_directory(places, entry.path, dirfd, name, entry.xattrs)
                try:
                    _directory(fd, found)
                finally:
                    os.close(fd)
                times.append((entry.path, entry.mtime_ns))
                continue
            _remove(places, entry.path, dirfd, name)
            dirfd, name = places.parent(entry.path)
            group = walk.group(found.status) if entry.kind == "f" else 0
            if group in first:
                source_dir, source = others.parent(first[group])
                os.link(source, name, src_dir_fd=source_dir, dst_dir_fd=dirfd)
                continue
            if group:
                first[group] = entry.path
            # Uppers are only read from here on: another name is as good as a copy.
            try:
                os.link(
                    found.name, name, src_dir_fd=found.dirfd, dst_dir_fd=dirfd,
                    follow_symlinks=False,
                )  # fmt: skip
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
                    raise
                _copy(found.dirfd, found.name, dirfd, name, found.status)
        for path, mtime in reversed(times):
            os.utime(places.directory(path), ns=(mtime, mtime))
    finally:
        places.close()
        others.close()


def _make_directory(
    places: Places, path: bytes, dirfd: int, name: bytes, marks: tuple[tuple[bytes, bytes], ...]
) -> int:
    """The directory in target, emptied if the layer's hides what is below."""
    opaque = dict(marks).get(OPAQUE) == b"y"
    try:
        status = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
    except FileNotFoundError:
        status = None
    if status is not None and (opaque or not stat.S_ISDIR(status.st_mode)):
        # A directory over a whiteout is opaque already, as overlayfs writes it.
        _remove(places, path, dirfd, name)
        dirfd, name = places.parent(path)
        status = None
    if status is None:
        os.mkdir(name, 0o700, dir_fd=dirfd)
    return os.open(name, DIRECTORY, dir_fd=dirfd)


def _directory(fd: int, found: Found) -> None:
    """Owner, mode and xattrs; an opaque mark that target has already stays."""
    os.chown(fd, found.status.st_uid, found.status.st_gid)
    os.chmod(fd, stat.S_IMODE(found.status.st_mode))
    for key, value in found.marks:
        os.setxattr(fd, key, value)


def _remove(places: Places, path: bytes, dirfd: int, name: bytes) -> None:
    try:
        os.unlink(name, dir_fd=dirfd)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        places.directory(path.rpartition(b"/")[0])
        remove_tree(name, dirfd)


def _copy(source: int, source_name: bytes, dirfd: int, name: bytes, status: os.stat_result) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFREG:
        old = os.open(source_name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=source)
        new = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=dirfd)
        with os.fdopen(old, "rb") as reader, os.fdopen(new, "wb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
            writer.flush()
            os.fchown(writer.fileno(), status.st_uid, status.st_gid)
            os.fchmod(writer.fileno(), stat.S_IMODE(status.st_mode))
            for key, value in xattrs(reader.fileno()):
                with contextlib.suppress(OSError):
                    os.setxattr(writer.fileno(), key, value)
            os.utime(writer.fileno(), ns=(status.st_mtime_ns, status.st_mtime_ns))
        return
    if kind == stat.S_IFLNK:
        os.symlink(os.readlink(source_name, dir_fd=source), name, dir_fd=dirfd)
    else:
        os.mknod(name, status.st_mode, status.st_rdev, dir_fd=dirfd)
    os.chown(name, status.st_uid, status.st_gid, dir_fd=dirfd, follow_symlinks=False)
