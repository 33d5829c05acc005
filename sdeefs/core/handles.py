"""Open files: which descriptor, which way the kernel reads and writes, and what a write takes away."""

from __future__ import annotations

import ctypes
import errno
import os
import stat

from sdeefs.core import credentials
from sdeefs.core.api import Caller, Entry, Io, Opened, SetAttributes
from sdeefs.core.attributes import is_privileged
from sdeefs.core.formats import fd_path
from sdeefs.core.nodes import UPPER, Directory, Node
from sdeefs.core.renames import Renames

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
#: What of open(2)'s flags reaches the descriptor of a layer's file.
_KEPT = os.O_ACCMODE | os.O_TRUNC | os.O_SYNC | os.O_DSYNC | os.O_NOATIME


def bad_handle() -> OSError:
    """EBADF."""
    return OSError(errno.EBADF, os.strerror(errno.EBADF))


class OpenFile:
    """A file handle."""

    __slots__ = ("fd", "io", "lower", "node", "writable")

    def __init__(self, node: Node, fd: int, writable: bool, io: Io) -> None:
        self.node = node
        self.fd = fd
        self.writable = writable
        self.io = io
        self.lower = node.layer != UPPER

    def follow_copy_up(self, upper_fd: int) -> None:
        """Reads go to the copy from now on: its descriptor takes the place of the old one."""
        if not self.lower:
            return
        fresh = os.open(fd_path(upper_fd), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.dup2(fresh, self.fd, inheritable=False)
        finally:
            os.close(fresh)
        self.lower = False


class Handles(Renames):
    """The room of open files."""

    def __init__(self, settings: object) -> None:
        super().__init__(settings)
        self._files: dict[int, OpenFile] = {}
        self._next_handle = 1

    def _file(self, handle: int) -> OpenFile:
        try:
            return self._files[handle]
        except KeyError:
            raise bad_handle() from None

    def _new_handle(self) -> int:
        handle = self._next_handle
        self._next_handle = handle + 1
        return handle

    def _open_flags(self, flags: int) -> int:
        wanted = flags & _KEPT
        if self.writeback and flags & os.O_ACCMODE == os.O_WRONLY:
            wanted = wanted & ~os.O_ACCMODE | os.O_RDWR  # the kernel fills pages through it
        if self.settings.volatile:
            wanted &= ~(os.O_SYNC | os.O_DSYNC)
        return wanted

    def _open_file(self, node: Node, flags: int, kill: bool) -> Opened:
        if node.kind != stat.S_IFREG:
            if isinstance(node, Directory):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            raise OSError(
                errno.ELOOP if node.kind == stat.S_IFLNK else errno.ENXIO, os.strerror(errno.ENXIO)
            )
        truncates = bool(flags & os.O_TRUNC)
        writable = flags & os.O_ACCMODE != os.O_RDONLY or truncates
        self._review(node)
        extra = node.extra
        if extra is not None and extra.secret and not (writable and truncates):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if writable:
            self._writable()
            if node.layer != UPPER:
                self._copy_up(node, 0 if truncates else 1 << 63)
            credentials.settle()
        wanted = self._open_flags(flags)
        if truncates and wanted & os.O_ACCMODE == os.O_RDONLY:
            wanted |= os.O_RDWR
        fd = self._open_data(node, wanted)
        try:
            if extra is not None and extra.secret:
                self._reveal(node)
            if truncates and kill:
                self._strip_privileges(node, fd)
            elif truncates and not self.killpriv:
                self._strip_capability(node, fd)
            return self._opened(node, fd, writable)
        except BaseException:
            os.close(fd)
            raise

    def _open_data(self, node: Node, flags: int) -> int:
        if flags & os.O_NOATIME:
            try:
                return self._checked(node, self._reopen(node, flags))
            except PermissionError:
                flags &= ~os.O_NOATIME
        try:
            return self._checked(node, self._reopen(node, flags))
        except PermissionError:
            if self.writeback and flags & os.O_ACCMODE == os.O_RDWR:
                narrow = flags & ~os.O_ACCMODE | os.O_WRONLY
                return self._checked(node, self._reopen(node, narrow))
            raise
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from error
            raise

    @staticmethod
    def _checked(node: Node, fd: int) -> int:
        """Never one file's data under another's name."""
        if not node.is_of(os.fstat(fd)):
            os.close(fd)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return fd

    def _reveal(self, node: Node) -> None:
        """A secret whose data was cut off is an ordinary file."""
        node.more().secret = False
        path, follow = self._xattr_place(node)
        try:
            os.removexattr(path, self.names.secret, follow_symlinks=follow)
        except OSError:
            pass

    def _opened(self, node: Node, fd: int, writable: bool) -> Opened:
        extra = node.more()
        handles = extra.handles
        if handles:
            io = handles[0].io
            if io is Io.PASSTHROUGH and writable and extra.privileged is None:
                st = os.fstat(fd)
                if is_privileged(st.st_mode):
                    extra.privileged = st.st_mtime_ns
        elif writable and is_privileged(os.fstat(fd).st_mode):
            # Linux <= 6.18 with KILLPRIV_V2 leaves setuid and setgid when it writes through: such a
            # file is written by requests, which say when the bits are to go.
            io = Io.CACHED
        elif extra.work_name is not None:
            io = Io.CACHED  # the kernel would open the backing file with O_TMPFILE once more
        elif self.passthrough and (node.layer == UPPER or not self.writable):
            io = Io.PASSTHROUGH
        else:
            # What may yet be copied up goes through the page cache: the kernel allows one backing
            # file per inode, and a reader that was there before must see what a writer writes.
            io = Io.CACHED
        keep = False
        if io is Io.CACHED:
            st = os.fstat(fd)
            now = (st.st_mtime_ns, st.st_size)
            keep = bool(handles) or extra.opened == now
            extra.opened = now
        else:
            extra.opened = None
        handle = self._new_handle()
        file = OpenFile(node, fd, writable, io)
        self._files[handle] = file
        handles.append(file)
        return Opened(handle, io, fd, keep)

    def _create(
        self, parent: Directory, name: bytes, mode: int, flags: int, umask: int, caller: Caller
    ) -> tuple[Entry, Opened]:
        wanted = self._open_flags(flags) & ~(os.O_TRUNC | os.O_NOATIME)
        try:
            node, fd, st = self._create_file(parent, name, mode, wanted, umask, caller)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            node, found = self._find_node(parent, name)  # it came into being meanwhile
            opened = self._open_file(node, flags & ~os.O_CREAT, False)
            return self._entry(node, found.st), opened
        return self._hand_over(node, fd, st, flags)

    def _tmpfile(
        self, parent: Directory, mode: int, flags: int, umask: int, caller: Caller
    ) -> tuple[Entry, Opened]:
        wanted = self._open_flags(flags) & ~(os.O_TRUNC | os.O_NOATIME)
        node, fd, st = self._create_nameless(parent, mode, wanted, umask, caller)
        return self._hand_over(node, fd, st, flags)

    def _hand_over(
        self, node: Node, fd: int, st: os.stat_result, flags: int
    ) -> tuple[Entry, Opened]:
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        return self._entry(node, st), self._opened(node, fd, writable)

    def _release(self, handle: int) -> None:
        file = self._files.pop(handle, None)
        if file is None:
            return
        node = file.node
        extra = node.extra
        if extra is not None:
            if extra.privileged is not None:
                self._check_privileges(node)
            try:
                extra.handles.remove(file)
            except ValueError:
                pass
            if not any(other.writable for other in extra.handles):
                extra.privileged = None  # who writes from now on is told of, or opens anew
            if file.io is Io.CACHED and file.writable:
                st = os.fstat(file.fd)
                extra.opened = (st.st_mtime_ns, st.st_size)
        os.close(file.fd)
        if node.count <= 0:
            self.table.drop(node)
            self._close_dropped()

    def _note_privileges(self, node: Node, change: SetAttributes) -> None:
        """setuid or setgid was set on a file that the kernel writes by itself.

        Linux <= 6.18 tells nobody of such writes, which must take the bits away: they show by mtime.
        """
        extra = node.more()
        mode = change.mode
        if mode is not None:
            extra.privileged = None
            if is_privileged(mode):
                for file in extra.handles:
                    if file.writable and file.io is Io.PASSTHROUGH:
                        extra.privileged = 0
        if extra.privileged is not None:
            extra.privileged = self._stat(node).st_mtime_ns

    def _check_privileges(self, node: Node) -> None:
        extra = node.more()
        if self._stat(node).st_mtime_ns != extra.privileged:
            extra.privileged = None
            self._strip_privileges(node, -1)

    def _writer(self, handle: int) -> OpenFile:
        file = self._file(handle)
        if not file.writable:
            raise bad_handle()
        return file

    # data: without the lock

    def read(self, handle: int, offset: int, size: int) -> bytes:
        """Read from an open file."""
        try:
            return os.pread(self._files[handle].fd, size, offset)
        except KeyError:
            raise bad_handle() from None

    def write(
        self, handle: int, offset: int, data: bytes | memoryview, kill_suid_sgid: bool
    ) -> int:
        """Write to an open file."""
        file = self._writer(handle)
        credentials.settle()
        if kill_suid_sgid:
            with self.lock:
                self._strip_privileges(file.node, file.fd)
        done = os.pwrite(file.fd, data, offset)
        total = len(data)
        while 0 < done < total:
            try:
                more = os.pwrite(file.fd, data[done:], offset + done)
            except OSError:
                break
            if more <= 0:
                break
            done += more
        return done

    def lseek(self, handle: int, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE; the other kinds are the kernel's own."""
        return os.lseek(self._file(handle).fd, offset, whence)

    def _before_write(self, file: OpenFile, caller: Caller) -> None:
        """With KILLPRIV_V2 a change of data takes setuid, setgid and capabilities away. Where the
        kernel doesn't say so, it is a matter of who asks: root (CAP_FSETID) keeps the bits."""
        if not self.killpriv:
            return
        with self.lock:
            if caller.uid != 0:
                self._strip_privileges(file.node, file.fd)
            else:
                self._strip_capability(file.node, file.fd)

    def _fallocate(self, handle: int, mode: int, offset: int, length: int, caller: Caller) -> None:
        file = self._writer(handle)
        credentials.settle()
        self._before_write(file, caller)
        while _libc.fallocate(file.fd, mode, offset, length):
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))
