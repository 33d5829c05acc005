"""Plays steps on one mount and says what came of them, in words that two mounts can agree on."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import stat
import struct
from dataclasses import dataclass, field

from tests.fslab.fslab_lab import acting_as
from tests.fslab.oracle_steps import ACTORS, Step
from tests.fslab.posix_place import fallocate, link_handle, rename2

#: Times after this are "now" in a comparison: only those that were set are compared exactly.
SET_BEFORE_NS = 1_500_000_000 * 10**9

Result = tuple[object, ...]


def when(time_ns: int) -> object:
    return time_ns if time_ns < SET_BEFORE_NS else "now"


def attributes(found: os.stat_result) -> Result:
    """What two mounts must agree on. Directories: links and sizes are the filesystem's own."""
    kind = stat.S_IFMT(found.st_mode)
    own = () if kind == stat.S_IFDIR else (found.st_nlink, found.st_size)
    return (
        oct(found.st_mode), found.st_uid, found.st_gid, found.st_rdev, when(found.st_mtime_ns), *own
    )  # fmt: skip


@dataclass
class Handle:
    fd: int
    stale: bool  # read-only, perhaps on the lower file: shows old data after a copy-up


@dataclass
class Player:
    """Plays on the tree at `root`; `upper` is where that tree's upper layer is, if known."""

    root: str
    upper: str | None = None
    umask: int = 0o022
    handles: dict[int, Handle] = field(default_factory=dict)

    def play(self, step: Step) -> Result:
        """The outcome: ("ok", …) or the errno's name."""
        try:
            with acting_as(ACTORS[step.actor], umask=self.umask):
                value = getattr(self, f"_{step.call}")(*step.arguments)
        except OSError as error:
            return (errno.errorcode.get(error.errno or 0, str(error)),)
        return ("ok", value)

    def stale(self, step: Step) -> bool:
        """Whether the step reads through a handle that may show old data."""
        if step.call not in ("read", "map_read", "seek_end", "copy_range", "fstat"):
            return False
        handle = self.handles.get(int(str(step.arguments[0])))
        return handle is not None and handle.stale

    def close(self) -> None:
        for handle in self.handles.values():
            os.close(handle.fd)
        self.handles.clear()

    def close_lost(self) -> None:
        """Close the handles on a server that has gone."""
        for handle in self.handles.values():
            try:
                os.close(handle.fd)
            except OSError:
                pass
        self.handles.clear()

    def _path(self, path: object) -> str:
        return f"{self.root}/{path}" if path else self.root

    def _fd(self, slot: int) -> int:
        if slot not in self.handles:
            raise OSError(errno.EBADF, "no handle")
        return self.handles[slot].fd

    # -- open handles --

    def _open(self, slot: int, path: str, flags: int, mode: int) -> None:
        self._close(slot)
        fd = os.open(self._path(path), flags, mode)
        in_upper = self.upper is not None and os.path.isfile(f"{self.upper}/{path}")
        in_upper = in_upper and not os.path.islink(f"{self.upper}/{path}")
        stale = flags & os.O_ACCMODE == os.O_RDONLY and not flags & os.O_TRUNC and not in_upper
        self.handles[slot] = Handle(fd, stale)

    def _close(self, slot: int) -> None:
        handle = self.handles.pop(slot, None)
        if handle is not None:
            os.close(handle.fd)

    def _close_all(self) -> None:
        self.close()

    def _read(self, slot: int, offset: int, size: int) -> object:
        return _short(os.pread(self._fd(slot), size, offset))

    def _write(self, slot: int, offset: int, data: bytes) -> int:
        return os.pwrite(self._fd(slot), data, offset)

    def _append(self, slot: int, data: bytes) -> tuple[int, int]:
        fd = self._fd(slot)
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EISDIR, "a directory")
        os.lseek(fd, 0, os.SEEK_END)
        return os.write(fd, data), os.lseek(fd, 0, os.SEEK_CUR)

    def _map_write(self, slot: int, offset: int, byte: int) -> str:
        fd = self._fd(slot)
        size = os.fstat(fd).st_size
        if not stat.S_ISREG(os.fstat(fd).st_mode) or offset >= size:
            return "beyond"
        if _privileged(fd):
            return "privileged"
        with mmap.mmap(fd, size) as area:
            area[offset] = byte
            area.flush()
        return "mapped"

    def _map_read(self, slot: int) -> object:
        fd = self._fd(slot)
        if not stat.S_ISREG(os.fstat(fd).st_mode) or not os.fstat(fd).st_size:
            return "empty"
        try:
            area = mmap.mmap(fd, 1, mmap.MAP_SHARED, mmap.PROT_READ)
        except ValueError:
            return "shorter"  # a stale handle's own file
        with area:
            return area[0]

    def _fstat(self, slot: int) -> Result:
        return attributes(os.fstat(self._fd(slot)))

    def _fsync(self, slot: int) -> None:
        os.fsync(self._fd(slot))

    def _seek_end(self, slot: int) -> object:
        fd = self._fd(slot)
        return "directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else os.lseek(fd, -1, os.SEEK_END)

    def _ftruncate(self, slot: int, size: int) -> None:
        os.ftruncate(self._fd(slot), size)
        with contextlib.suppress(OSError):
            os.utime(self._fd(slot))

    def _fallocate(self, slot: int, mode: int, offset: int, length: int) -> None:
        fallocate(self._fd(slot), mode, offset, length)
        with contextlib.suppress(OSError):
            os.utime(self._fd(slot))

    def _fchmod(self, slot: int, mode: int) -> None:
        os.fchmod(self._fd(slot), mode)

    def _fchown(self, slot: int, uid: int, gid: int) -> None:
        os.fchown(self._fd(slot), uid, gid)

    def _futime(self, slot: int, ns: int) -> None:
        os.utime(self._fd(slot), ns=(ns, ns + 1))

    def _flock(self, slot: int, kind: str) -> None:
        operation = {
            "shared": fcntl.LOCK_SH, "exclusive": fcntl.LOCK_EX, "unlock": fcntl.LOCK_UN
        }[kind]  # fmt: skip
        fcntl.flock(self._fd(slot), operation | fcntl.LOCK_NB)

    def _copy_range(self, source: int, target: int, start: int, to: int, count: int) -> int:
        done = 0
        while done < count:
            got = os.copy_file_range(
                self._fd(source), self._fd(target), count - done, start + done, to + done
            )
            if not got:
                break
            done += got
        return done

    def _tmpfile(self, slot: int, path: str, mode: int) -> None:
        self._close(slot)
        fd = os.open(self._path(path), os.O_TMPFILE | os.O_RDWR, mode)
        self.handles[slot] = Handle(fd, False)

    def _link_handle(self, slot: int, path: str) -> None:
        link_handle(self._fd(slot), self._path(path))

    # -- names --

    def _stat(self, path: str) -> Result:
        return attributes(os.lstat(self._path(path)))

    def _stat_followed(self, path: str) -> Result:
        return attributes(os.stat(self._path(path)))

    def _list(self, path: str) -> list[Result]:
        with os.scandir(self._path(path)) as entries:
            return sorted(
                (e.name, e.is_dir(follow_symlinks=False), e.is_file(follow_symlinks=False))
                for e in entries
            )

    def _access(self, path: str, mode: int) -> bool:
        return os.access(self._path(path), mode, effective_ids=True)

    def _readlink(self, path: str) -> str:
        return os.readlink(self._path(path))

    def _mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self._path(path), mode)

    def _rmdir(self, path: str) -> None:
        if not path:
            return
        os.rmdir(self._path(path))

    def _unlink(self, path: str) -> None:
        os.unlink(self._path(path))

    def _remove_tree(self, path: str) -> int:
        if not path:
            return 0
        return _remove_below(self._path(path))

    def _rename(self, old: str, new: str, flags: int) -> None:
        if old and new:
            rename2(self._path(old), self._path(new), flags)

    _rename_directory = _rename

    def _link(self, old: str, new: str) -> None:
        os.link(self._path(old), self._path(new), follow_symlinks=False)

    def _symlink(self, target: str, new: str) -> None:
        os.symlink(target, self._path(new))

    def _mknod(self, path: str, mode: int, device: int) -> None:
        os.mknod(self._path(path), mode, device)

    def _chmod(self, path: str, mode: int) -> None:
        if path:
            os.chmod(self._path(path), mode)

    def _chown(self, path: str, uid: int, gid: int) -> None:
        if path:
            os.chown(self._path(path), uid, gid, follow_symlinks=False)

    def _utime(self, path: str, ns: int | None) -> None:
        if ns is None:
            os.utime(self._path(path), follow_symlinks=False)
        else:
            os.utime(self._path(path), ns=(ns, ns + 1), follow_symlinks=False)

    def _truncate(self, path: str, size: int) -> None:
        os.truncate(self._path(path), size)
        with contextlib.suppress(OSError):
            os.utime(self._path(path))

    def _setxattr(self, path: str, name: str, value: bytes, flags: int) -> None:
        os.setxattr(self._path(path), name, value, flags, follow_symlinks=False)

    _setcap = _setxattr

    def _setacl(self, path: str, name: str, value: bytes, flags: int) -> None:
        try:
            self._setxattr(path, name, value, flags)
        except OSError as error:
            full = self._path(path)
            if error.errno != errno.EOPNOTSUPP or self.upper is None or os.path.islink(full):
                raise
            os.chmod(full, stat.S_IMODE(os.stat(full).st_mode))  # copies it up
            self._setxattr(path, name, value, flags)

    def _getxattr(self, path: str, name: str) -> bytes:
        return os.getxattr(self._path(path), name, follow_symlinks=False)

    def _removexattr(self, path: str, name: str) -> None:
        os.removexattr(self._path(path), name, follow_symlinks=False)

    def _listxattr(self, path: str) -> list[str]:
        return sorted(os.listxattr(self._path(path), follow_symlinks=False))


def _privileged(fd: int) -> bool:
    """Whether a file has what a write takes away. Linux leaves it where the server can't know."""
    if os.fstat(fd).st_mode & (stat.S_ISUID | stat.S_ISGID):
        return True
    try:
        return "security.capability" in os.listxattr(fd)
    except OSError:
        return False


def _short(data: bytes) -> object:
    """Short data as it is, long data by length and hash."""
    return data if len(data) < 80 else (len(data), hashlib.sha1(data).hexdigest())


def _remove_below(path: str) -> int:
    """rm -r, in the order of names; the number of objects removed."""
    removed = 0
    for name in sorted(os.listdir(path)):
        inner = f"{path}/{name}"
        if stat.S_ISDIR(os.lstat(inner).st_mode):
            removed += _remove_below(inner)
        else:
            os.unlink(inner)
            removed += 1
    os.rmdir(path)
    return removed + 1


def kinds(root: str) -> dict[str, int]:
    """path -> S_IFMT of everything below root."""
    found = {}
    for directory, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = os.path.join(directory, name)
            found[os.path.relpath(path, root)] = stat.S_IFMT(os.lstat(path).st_mode)
    return found


def snapshot(root: str, inodes: bool = False, groups: bool = True) -> dict[str, Result]:
    """Everything below root that two trees must agree on; `inodes`: and that d_ino is st_ino (of
    kernel overlayfs that can't be asked: after a rename in upper it isn't always so)."""
    found: dict[str, Result] = {}
    links: dict[int, str] = {}
    pending = [""]
    while pending:
        directory = pending.pop()
        with os.scandir(os.path.join(root, directory)) as entries:
            listed = sorted((e.name, e.inode()) for e in entries)
        for name, inode in listed:
            path = os.path.join(directory, name)
            full = os.path.join(root, path)
            seen = os.lstat(full)
            assert not inodes or seen.st_ino == inode, (
                f"{full}: d_ino {inode} isn't st_ino {seen.st_ino}"
            )
            kind = stat.S_IFMT(seen.st_mode)
            row: list[object] = list(attributes(seen))
            if kind == stat.S_IFDIR:
                pending.append(path)
            elif seen.st_nlink > 1 and kind == stat.S_IFREG:
                row.append(("first link", links.setdefault(seen.st_ino, path)))
            if kind == stat.S_IFLNK:
                row.append(os.readlink(full))
            elif kind == stat.S_IFREG:
                with open(full, "rb") as file:
                    row.append(_short(file.read()))
            row.append(
                [
                    (x, os.getxattr(full, x, follow_symlinks=False))
                    for x in sorted(os.listxattr(full, follow_symlinks=False))
                ]
            )
            found[path] = tuple(row)
    return found


def inodes(root: str) -> dict[str, int]:
    """path -> inode number of everything below root."""
    return {path: os.lstat(os.path.join(root, path)).st_ino for path in kinds(root)}


def differences(ours: dict[str, Result], theirs: dict[str, Result]) -> list[str]:
    """The paths whose rows differ, each with both rows."""
    lines = []
    for path in sorted(ours.keys() | theirs.keys()):
        if ours.get(path) != theirs.get(path):
            lines.append(f"{path}: {ours.get(path)} here, {theirs.get(path)} there")
    return lines


# -- what lower is made of --------------------------------------------------------------------------


def build_lower(root: str, xattrs: bool = True) -> None:
    """A small tree with one of everything, all times long ago; without xattrs: no devices too."""
    for path, mode in (
        ("a", 0o755), ("a/b", 0o755), ("a/b/c", 0o777), ("d", 0o777), ("e", 0o755), ("s", 0o755),
        ("t", 0o755), ("u", 0o755), ("u/v", 0o755),
    ):  # fmt: skip
        os.mkdir(f"{root}/{path}")
        os.chmod(f"{root}/{path}", mode)
    for index, path in enumerate(
        ("f0", "f1", "f2", "a/f0", "a/f1", "a/b/f0", "a/b/c/f0", "d/f0", "d/f1", "s/f0", "t/f0")
    ):
        fd = os.open(f"{root}/{path}", os.O_CREAT | os.O_WRONLY, 0o644)
        os.write(fd, path.encode() * (index * 700 + 1))
        os.close(fd)
        os.chmod(f"{root}/{path}", (0o644, 0o666, 0o755, 0o4755, 0o600)[index % 5])
    os.link(f"{root}/a/f1", f"{root}/d/h0")
    os.link(f"{root}/a/f1", f"{root}/u/h1")
    with open(f"{root}/u/sparse", "wb") as file:
        file.truncate(300_000)
        file.seek(200_000)
        file.write(b"in the middle")
    os.symlink("../f0", f"{root}/a/l0")
    os.symlink("nowhere", f"{root}/l1")
    os.symlink("a/b", f"{root}/l2")
    os.mkfifo(f"{root}/u/p", 0o644)
    os.mknod(f"{root}/u/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.chown(f"{root}/s", 0, 60003)
    os.chmod(f"{root}/s", 0o2777)
    os.chmod(f"{root}/t", 0o1777)
    os.chown(f"{root}/d/f1", 60001, 60001)
    os.chown(f"{root}/t/f0", 60002, 60002)
    os.chown(f"{root}/a/b/c/f0", 60001, 60003)
    if xattrs:
        _set_xattrs(root)
    else:
        os.unlink(f"{root}/u/null")
    for index, (directory, directories, files) in enumerate(os.walk(root, topdown=False)):
        for name in sorted((*files, *directories, ".")):
            moment = 900_000_000_000_000_000 + index * 10**9 + len(name)
            os.utime(f"{directory}/{name}", ns=(moment, moment), follow_symlinks=False)


def _set_xattrs(root: str) -> None:
    os.setxattr(f"{root}/f1", "user.a", b"lower")
    os.setxattr(f"{root}/a", "user.b", b"lower")
    os.setxattr(f"{root}/d", "system.posix_acl_default", _DEFAULT_ACL)
    os.setxattr(f"{root}/f2", "system.posix_acl_access", _DEFAULT_ACL)
    os.setxattr(
        f"{root}/a/f0", "security.capability", struct.pack("<IIIII", 0x02000001, 0x400, 0, 0, 0)
    )


_DEFAULT_ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *row)
    for row in (
        (1, 7, 0xFFFFFFFF), (2, 6, 60001), (4, 5, 0xFFFFFFFF), (16, 7, 0xFFFFFFFF),
        (32, 4, 0xFFFFFFFF),
    )
)  # fmt: skip
