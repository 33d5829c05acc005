"""The layers of a mount, opened once before it: root descriptors, and what upper's file system can.

Everything after this goes by descriptors from here, never by a path from `/`: merged may be mounted
over its own lower, and users may write to the trees.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from mount_helpers import syscalls
from sdeefs.core import credentials
from sdeefs.core.formats import OverlayNames, encode_handle, fd_path, get_xattr, xattr_path
from sdeefs.core.settings import Settings, WhiteoutForm

FS_IOC_GETFSUUID = 0x80111500  # Linux >= 6.9: struct fsuuid2 {len, uuid[16]}
EXT4_IOC_GETFSUUID = 0x8008662C
FICLONE = 0x40049409
_NO_UUID = bytes(16)
#: Beside a name in the index, where there are no xattrs: a link whose target is overlay.nlink.
INDEX_NLINK = b".nlink"
_WALK = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS


class Layer:
    """One tree. `private`: the descriptor is a clone of the mount, in which nothing else is mounted."""

    __slots__ = (
        "dev",
        "fd",
        "fsid",
        "index",
        "last",
        "private",
        "readable",
        "uuid",
        "walk",
        "xwhiteouts",
    )

    def __init__(self, index: int, fd: int, private: bool) -> None:
        self.index = index
        self.fd = fd
        self.private = private
        self.dev = os.fstat(fd).st_dev
        self.fsid = 0
        self.readable = _open_readable(fd)  # open_by_handle_at takes no O_PATH descriptor
        self.uuid = file_system_uuid(self.readable)
        self.xwhiteouts = False  # zero-size files with overlay.whiteout may be whiteouts here
        self.last = False
        self.walk = _WALK if private else _WALK | syscalls.RESOLVE_NO_XDEV

    def open_directory(self, path: bytes) -> int:
        """An O_PATH descriptor of a directory, by its path from the layer's root."""
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        if not path:
            return os.open(b".", flags, dir_fd=self.fd)
        try:
            return syscalls.openat2(self.fd, path, flags, 0, self.walk)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EPERM, errno.ENAMETOOLONG):
                raise
        return self._walk_slowly(path, flags)

    def _walk_slowly(self, path: bytes, flags: int) -> int:
        """Without openat2 (Linux < 5.6), and for paths longer than PATH_MAX."""
        at = self.fd
        for part in path.split(b"/"):
            below = os.open(part, flags, dir_fd=at)
            if at != self.fd:
                os.close(at)
            at = below
            if not self.private and os.fstat(at).st_dev != self.dev:
                os.close(at)
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
        return at

    def close(self) -> None:
        """Give back the descriptors."""
        for fd in (self.fd, self.readable):
            if fd >= 0:
                os.close(fd)
        self.fd = self.readable = -1

    def handle(self, dir_fd: int, name: bytes) -> bytes | None:
        """overlay.origin's value for an object of this layer; None where it can't be told."""
        if self.uuid is None:
            return None
        try:
            flags = 0 if name else syscalls.AT_EMPTY_PATH
            handle, _ = syscalls.name_to_handle_at(dir_fd, name, flags)
        except OSError:
            return None
        return encode_handle(handle, self.uuid, upper=False)


def _open_readable(fd: int) -> int:
    try:
        return os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    except OSError:
        return -1


def file_system_uuid(fd: int) -> bytes | None:
    """The uuid that overlayfs puts into origins; None where user space can't learn it."""
    if fd < 0:
        return None
    buffer = bytearray(17)
    unnamed = False
    try:
        fcntl.ioctl(fd, FS_IOC_GETFSUUID, buffer)
        return bytes(buffer[1:17]) if buffer[0] == 16 else _NO_UUID
    except OSError as error:
        # Linux >= 6.9 answers so for a file system without one (squashfs); older ones always.
        unnamed = error.errno == errno.ENOTTY and _kernel() >= (6, 9)
    request = bytearray(struct.pack("=II", 16, 0) + bytes(16))
    try:
        fcntl.ioctl(fd, EXT4_IOC_GETFSUUID, request)
        return bytes(request[8:24])
    except OSError:
        return _NO_UUID if unnamed else None


def _kernel() -> tuple[int, int]:
    words = os.uname().release.split("-")[0].split(".")
    try:
        return int(words[0]), int(words[1])
    except (ValueError, IndexError):
        return 0, 0


def open_lower(index: int, path: bytes) -> Layer:
    """A lower: a read-only private clone of its mount where that is permitted."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        clone = syscalls.open_tree(
            fd,
            b"",
            syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC | syscalls.AT_EMPTY_PATH,
        )
    except OSError:
        return Layer(index, fd, private=False)
    os.close(fd)
    try:
        attributes = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOATIME
        syscalls.mount_setattr(
            clone, b"", syscalls.AT_EMPTY_PATH, attributes, syscalls.MOUNT_ATTR__ATIME
        )
    except OSError:
        pass  # only access times of lower are at stake: nothing here writes to it
    return Layer(index, clone, private=True)


def give_file_system_ids(layers: list[Layer]) -> None:
    """Layers of one file system share an id; upper's (else the first lower's) is 0."""
    known: dict[int, int] = {}
    for layer in layers:
        layer.fsid = known.setdefault(layer.dev, len(known))


class Upper:
    """The writable layer with its work directory, and how its file system wants to be written."""

    def __init__(self, settings: Settings, names: OverlayNames) -> None:
        assert settings.upper is not None
        self.names = names
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        self.layer = Layer(0, os.open(settings.upper, flags), private=True)
        self.read_only = settings.read_only
        self.work = self.work_root = self.index = -1
        self.serial = 0
        self.index_names: set[bytes] = set()
        self.index_inodes: dict[int, bytes] = {}  # without xattrs: what an inode is in the index
        self.whiteouts = WhiteoutForm.CHARDEV
        self.xattrs = not settings.noxattr
        self.rename_whiteout = False
        self.exchange = False
        self.override = bool(settings.override_stat)
        self._spare_whiteout: bytes | None = None
        if not self.read_only:
            work = settings.work if settings.work is not None else settings.upper + b".work"
            self._open_work(work, settings)
        elif settings.whiteouts is WhiteoutForm.PREFIX:
            self.whiteouts = WhiteoutForm.PREFIX
        root_opaque = get_xattr(fd_path(self.layer.fd), names.opaque, follow=True)
        self.layer.xwhiteouts = root_opaque == b"x" or self.whiteouts is WhiteoutForm.XATTR

    def _open_work(self, path: bytes, settings: Settings) -> None:
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        self.work_root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        if os.fstat(self.work_root).st_dev != self.layer.dev:
            raise OSError(
                errno.EXDEV, "the work directory must be on upper's file system", os.fsdecode(path)
            )
        self.work = self._subdirectory(b"work")
        try:
            empty_directory(self.work)
        except PermissionError:  # kernel overlayfs's, mounted by another user: nobody may read it
            os.close(self.work)
            os.rmdir(b"work", dir_fd=self.work_root)
            self.work = self._subdirectory(b"work")
        self._probe(settings)
        if settings.index:
            self._open_index()

    def _open_index(self) -> None:
        """work/index: the inodes of upper that stand for hard-linked ones of lower, by origin."""
        self.index = self._subdirectory(b"index")
        names = [name for name in names_in(self.index) if not name.endswith(INDEX_NLINK)]
        self.index_names = set(names)
        if self.xattrs:
            return
        for name in names:
            st = os.stat(name, dir_fd=self.index, follow_symlinks=False)
            self.index_inodes[st.st_ino] = name

    def _subdirectory(self, name: bytes) -> int:
        try:
            os.mkdir(name, 0o700, dir_fd=self.work_root)
        except FileExistsError:
            pass
        return os.open(
            name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.work_root
        )

    def _probe(self, settings: Settings) -> None:
        """Try in the work directory what this file system and this account can."""
        plain = self.temporary()
        os.close(os.open(plain, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600, dir_fd=self.work))
        if self.xattrs:
            try:
                os.setxattr(xattr_path(self.work, plain), self.names.prefix + b"probe", b"0")
            except OSError:
                self.xattrs = False
        form = settings.whiteouts
        if form is WhiteoutForm.AUTO:
            form = self._probe_whiteouts()
        self.whiteouts = form
        other = self.temporary()
        try:
            os.close(os.open(other, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600, dir_fd=self.work))
            syscalls.renameat2(self.work, plain, self.work, other, syscalls.RENAME_EXCHANGE)
            self.exchange = True
        except OSError:
            pass
        if form is WhiteoutForm.CHARDEV:
            third = self.temporary()
            try:
                syscalls.renameat2(self.work, plain, self.work, third, syscalls.RENAME_WHITEOUT)
                self.rename_whiteout = True
            except OSError:
                pass
        if settings.override_stat is None:
            self.override = not credentials.has(credentials.CAP_CHOWN) and os.geteuid() != 0
        empty_directory(self.work)

    def _probe_whiteouts(self) -> WhiteoutForm:
        if not self.xattrs:
            return WhiteoutForm.PREFIX  # opaque directories can't be had in another way
        name = self.temporary()
        try:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=self.work)
            os.unlink(name, dir_fd=self.work)
        except OSError:
            return WhiteoutForm.XATTR
        return WhiteoutForm.CHARDEV

    def temporary(self) -> bytes:
        """A name that is free in the work directory."""
        self.serial += 1
        return b"#%x" % self.serial

    def make_whiteout(self) -> bytes:
        """The name in the work directory of a whiteout (not of the PREFIX form) to be moved or linked."""
        name = self.temporary()
        if self.whiteouts is WhiteoutForm.CHARDEV:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=self.work)
            return name
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o444, dir_fd=self.work))
        os.setxattr(xattr_path(self.work, name), self.names.whiteout, b"y")
        return name

    def whiteout_to_link(self) -> bytes:
        """A whiteout that stays in the work directory and is linked into place, as overlayfs does."""
        if self._spare_whiteout is None:
            self._spare_whiteout = self.make_whiteout()
        return self._spare_whiteout

    def renew_whiteout(self) -> None:
        """The one to link has too many links, or is gone."""
        if self._spare_whiteout is not None:
            discard(self.work, self._spare_whiteout)
            self._spare_whiteout = None

    def close(self) -> None:
        """Leave an empty work directory."""
        if self.work >= 0:
            try:
                empty_directory(self.work)
            except OSError:
                pass
        for fd in (self.index, self.work, self.work_root):
            if fd >= 0:
                os.close(fd)
        self.index = self.work = self.work_root = -1
        self.layer.close()


def names_in(path_fd: int) -> list[bytes]:
    """The names in a directory that is held by an O_PATH descriptor."""
    fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=path_fd)
    try:
        return [os.fsencode(name) for name in os.listdir(fd)]
    finally:
        os.close(fd)


def empty_directory(path_fd: int) -> None:
    """Remove all that is in a directory, never following a link."""
    for name in names_in(path_fd):
        discard(path_fd, name)


def discard(dir_fd: int, name: bytes) -> None:
    """Remove an object of whatever kind, with what is in it."""
    try:
        os.unlink(name, dir_fd=dir_fd)
        return
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EPERM):
            raise
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    below = os.open(name, flags, dir_fd=dir_fd)
    try:
        empty_directory(below)
    finally:
        os.close(below)
    os.rmdir(name, dir_fd=dir_fd)
