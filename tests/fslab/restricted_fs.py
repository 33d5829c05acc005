"""A filesystem that can as little as some networks': no xattrs, no device nodes, no rename flags.

python restricted_fs.py SOURCE MOUNTPOINT shows SOURCE so, through FUSE, until it is unmounted.
"""

from __future__ import annotations

import errno
import os
import stat
import sys

import pyfuse3
import trio


class Restricted(pyfuse3.Operations):
    """Inodes are those of SOURCE; each is held by an O_PATH descriptor."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, source: str) -> None:
        super().__init__()
        self.fds = {pyfuse3.ROOT_INODE: os.open(source, os.O_PATH | os.O_DIRECTORY)}
        self.root = os.fstat(self.fds[pyfuse3.ROOT_INODE]).st_ino

    def _attributes(self, fd: int) -> pyfuse3.EntryAttributes:
        seen = os.fstat(fd)
        entry = pyfuse3.EntryAttributes()
        for name in (
            "st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size", "st_atime_ns",
            "st_mtime_ns", "st_ctime_ns", "st_blksize", "st_blocks",
        ):  # fmt: skip
            setattr(entry, name, getattr(seen, name))
        entry.st_ino = pyfuse3.ROOT_INODE if seen.st_ino == self.root else seen.st_ino
        entry.generation = 0
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    def _entry(self, parent: int, name: bytes) -> pyfuse3.EntryAttributes:
        fd = _call(os.open, name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self.fds[parent])
        entry = self._attributes(fd)
        if entry.st_ino in self.fds:
            os.close(fd)
        else:
            self.fds[entry.st_ino] = fd
        return entry

    def _link(self, inode: int) -> str:
        return f"/proc/self/fd/{self.fds[inode]}"

    async def lookup(self, parent, name, ctx=None):  # type: ignore[no-untyped-def]
        return self._entry(parent, name)

    async def getattr(self, inode, ctx=None):  # type: ignore[no-untyped-def]
        return self._attributes(self.fds[inode])

    async def setattr(self, inode, attr, fields, fh, ctx):  # type: ignore[no-untyped-def]
        path = self._link(inode)
        if fields.update_size:
            _call(os.truncate, fh if fh is not None else path, attr.st_size)
        if fields.update_uid or fields.update_gid:
            uid = attr.st_uid if fields.update_uid else -1
            gid = attr.st_gid if fields.update_gid else -1
            _call(os.chown, path, uid, gid)
        if fields.update_mode:
            _call(os.chmod, path, stat.S_IMODE(attr.st_mode))
        if fields.update_atime or fields.update_mtime:
            seen = os.fstat(self.fds[inode])
            atime = attr.st_atime_ns if fields.update_atime else seen.st_atime_ns
            mtime = attr.st_mtime_ns if fields.update_mtime else seen.st_mtime_ns
            _call(os.utime, path, ns=(atime, mtime))
        return self._attributes(self.fds[inode])

    async def readlink(self, inode, ctx):  # type: ignore[no-untyped-def]
        return _call(os.readlink, b"", dir_fd=self.fds[inode])

    def _made(self, parent, name, ctx):  # type: ignore[no-untyped-def]
        inherited = os.fstat(self.fds[parent]).st_mode & stat.S_ISGID
        gid = -1 if inherited else ctx.gid
        _call(os.chown, name, ctx.uid, gid, dir_fd=self.fds[parent], follow_symlinks=False)
        return self._entry(parent, name)

    async def mknod(self, parent, name, mode, rdev, ctx):  # type: ignore[no-untyped-def]
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise pyfuse3.FUSEError(errno.EPERM)
        _call(os.mknod, name, mode & ~ctx.umask, rdev, dir_fd=self.fds[parent])
        return self._made(parent, name, ctx)

    async def mkdir(self, parent, name, mode, ctx):  # type: ignore[no-untyped-def]
        _call(os.mkdir, name, mode & ~ctx.umask, dir_fd=self.fds[parent])
        return self._made(parent, name, ctx)

    async def symlink(self, parent, name, target, ctx):  # type: ignore[no-untyped-def]
        _call(os.symlink, target, name, dir_fd=self.fds[parent])
        return self._made(parent, name, ctx)

    async def link(self, inode, parent, name, ctx):  # type: ignore[no-untyped-def]
        _call(os.link, self._link(inode), name, dst_dir_fd=self.fds[parent], follow_symlinks=True)
        return self._entry(parent, name)

    async def unlink(self, parent, name, ctx):  # type: ignore[no-untyped-def]
        _call(os.unlink, name, dir_fd=self.fds[parent])

    async def rmdir(self, parent, name, ctx):  # type: ignore[no-untyped-def]
        _call(os.rmdir, name, dir_fd=self.fds[parent])

    async def rename(self, parent, name, to_parent, to_name, flags, ctx):  # type: ignore[no-untyped-def]
        if flags:
            raise pyfuse3.FUSEError(errno.EINVAL)
        source, target = self.fds[parent], self.fds[to_parent]
        _call(os.rename, name, to_name, src_dir_fd=source, dst_dir_fd=target)

    async def forget(self, inodes):  # type: ignore[no-untyped-def]
        # Descriptors are kept: the trees of tests are small, and counts needn't be.
        return

    async def open(self, inode, flags, ctx):  # type: ignore[no-untyped-def]
        fd = _call(os.open, self._link(inode), flags & ~(os.O_CREAT | os.O_NOFOLLOW))
        return pyfuse3.FileInfo(fh=fd)

    async def create(self, parent, name, mode, flags, ctx):  # type: ignore[no-untyped-def]
        where = self.fds[parent]
        fd = _call(os.open, name, flags | os.O_CREAT, mode & ~ctx.umask, dir_fd=where)
        return pyfuse3.FileInfo(fh=fd), self._made(parent, name, ctx)

    async def read(self, fh, offset, size):  # type: ignore[no-untyped-def]
        return _call(os.pread, fh, size, offset)

    async def write(self, fh, offset, data):  # type: ignore[no-untyped-def]
        return _call(os.pwrite, fh, data, offset)

    async def fsync(self, fh, datasync):  # type: ignore[no-untyped-def]
        _call(os.fsync, fh)

    async def flush(self, fh):  # type: ignore[no-untyped-def]
        return

    async def release(self, fh):  # type: ignore[no-untyped-def]
        os.close(fh)

    async def opendir(self, inode, ctx):  # type: ignore[no-untyped-def]
        return inode

    async def readdir(self, inode, start, token):  # type: ignore[no-untyped-def]
        names = sorted(_call(os.listdir, self._link(inode)))
        for index, name in enumerate(names):
            if index < start:
                continue
            try:
                entry = self._entry(inode, os.fsencode(name))
            except pyfuse3.FUSEError:
                continue
            if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, index + 1):
                return

    async def statfs(self, ctx):  # type: ignore[no-untyped-def]
        seen = os.statvfs(self._link(pyfuse3.ROOT_INODE))
        answer = pyfuse3.StatvfsData()
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files"):
            setattr(answer, name, getattr(seen, name))
        answer.f_ffree, answer.f_favail, answer.f_namemax = seen.f_ffree, seen.f_favail, 255
        return answer


def _call(function, *arguments, **keywords):  # type: ignore[no-untyped-def]
    """The call's result; its errno for the caller."""
    try:
        return function(*arguments, **keywords)
    except OSError as error:
        raise pyfuse3.FUSEError(error.errno) from None


def main() -> None:
    """Serve until unmounted."""
    os.umask(0)
    source, point = sys.argv[1:3]
    options = {*pyfuse3.default_options, "fsname=restricted", "allow_other", "default_permissions"}
    pyfuse3.init(Restricted(source), point, options)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
