"""The two engines that make a merged mount of layers, both as detached mounts.

`kernel` is overlayfs, with its layers given as descriptors; `fuse` is sdeefs in a process of its
own. Who calls decides which layers each one gets; `pick` tries and takes the first that works.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NoReturn

from mount_helpers import syscalls
from mount_helpers.namespaces import IdRange
from sdee_launch.init import set_title
from sdee_launch.spare import SpareProcess, keep_only

if TYPE_CHECKING:
    from sdeefs.public import Options, Server

KERNEL, FUSE = "kernel", "fuse"
#: The most layers that a server to be may get.
_MOST_LAYERS = 250


class EngineProblem(Exception):
    """Why an engine can't serve here, in one line."""


@dataclass
class Merged:
    """Detached merged mounts by mount point, and the processes that serve them. Owns them."""

    engine: str
    mounts: list[tuple[bytes, int]] = field(default_factory=list)
    servers: list[tuple[int, int]] = field(default_factory=list)  # pid, pidfd
    fds: list[int] = field(default_factory=list)  # more to close

    def close(self) -> None:
        """Close all descriptors; a server whose mount is nowhere attached ends by itself."""
        for fd in [*(m for _, m in self.mounts), *(p for _, p in self.servers), *self.fds]:
            os.close(fd)
        self.mounts, self.servers, self.fds = [], [], []


@dataclass(frozen=True)
class Layers:
    """The layers of one mount point as descriptors, the topmost lower first."""

    point: bytes
    lowers: tuple[int, ...]
    upper: int
    work: int


def _set_directory(fs: int, key: str, fd: int) -> None:
    try:
        syscalls.fsconfig_fd(fs, key, fd)
    except OSError as error:
        # Linux < 6.13 takes only paths.
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
        syscalls.fsconfig_string(fs, key, f"/proc/self/fd/{fd}")


def kernel_overlay(layers: Layers, volatile: bool = False) -> int:
    """A detached overlayfs mount. Raises EngineProblem."""
    shown = os.fsdecode(layers.point)
    fs = -1
    try:
        fs = syscalls.fsopen("overlay")
        syscalls.fsconfig_string(fs, "source", "sdee")
        for lower in layers.lowers:
            _set_directory(fs, "lowerdir+", lower)
        _set_directory(fs, "upperdir", layers.upper)
        _set_directory(fs, "workdir", layers.work)
        syscalls.fsconfig_flag(fs, "userxattr")
        _forget_volatile(layers.work)
        if volatile:
            syscalls.fsconfig_flag(fs, "volatile")
        syscalls.fsconfig_create(fs)
        mount = syscalls.fsmount(fs)
    except OSError as error:
        raise EngineProblem(f"overlayfs over {shown}: {error.strerror}") from None
    finally:
        if fs >= 0:
            os.close(fs)
    try:
        _check_upper(mount, layers, shown)
    except BaseException:
        os.close(mount)
        raise
    return mount


def kernel_read_only(point: bytes, lowers: Sequence[int]) -> int:
    """A detached overlayfs mount of lowers only, the topmost first. Raises EngineProblem.

    Itself a layer of another: that makes two overlayfs on each other, the most that Linux allows.
    """
    fs = empty = -1
    try:
        if len(lowers) < 2:  # overlayfs wants two, or an upper
            tmp = syscalls.fsopen("tmpfs")
            try:
                syscalls.fsconfig_create(tmp)
                empty = syscalls.fsmount(tmp)
            finally:
                os.close(tmp)
            lowers = (empty, *lowers)
        fs = syscalls.fsopen("overlay")
        syscalls.fsconfig_string(fs, "source", "sdee")
        for lower in lowers:
            _set_directory(fs, "lowerdir+", lower)
        syscalls.fsconfig_flag(fs, "userxattr")
        syscalls.fsconfig_create(fs)
        return syscalls.fsmount(fs)
    except OSError as error:
        raise EngineProblem(
            f"overlayfs of the host's {os.fsdecode(point)}: {error.strerror}"
        ) from None
    finally:
        for fd in (fs, empty):
            if fd >= 0:
                os.close(fd)


def _check_upper(mount: int, layers: Layers, shown: str) -> None:
    """Overlayfs also mounts, with less, over an upper that can't keep what it must."""
    root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
    try:
        if os.fstatvfs(root).f_flag & os.ST_RDONLY:
            raise EngineProblem(f"overlayfs over {shown} is read-only: the upper's filesystem")
    finally:
        os.close(root)
    try:
        os.setxattr(layers.work, "user.sdee.trial", b"y")
        os.removexattr(layers.work, "user.sdee.trial")
    except OSError as error:
        raise EngineProblem(
            f"the upper's filesystem keeps no user xattrs: {error.strerror}"
        ) from None


def _forget_volatile(work: int) -> None:
    """An upper that was volatile refuses to mount again, for what it may have lost when the machine
    crashed; whoever chose volatile knows."""
    with contextlib.suppress(OSError):
        os.unlink("work/incompat/volatile/dirty", dir_fd=work)
    for name in ("work/incompat/volatile", "work/incompat"):
        with contextlib.suppress(OSError):
            os.rmdir(name, dir_fd=work)


def id_map_option(name: str, ranges: Sequence[IdRange]) -> str:
    """A map of sdeefs: as merged shows ids, as the layer has them."""
    return f"{name}=" + ":".join(f"{r.outside}:{r.inside}:{r.count}" for r in ranges)


def fuse_mount(
    layers: Layers, words: Sequence[str], fork: bool = False, spare: SpareServer | None = None
) -> tuple[int, int, int]:
    """A detached sdeefs mount in a server of its own: (mount, pid, pidfd). Raises EngineProblem.

    `fork`: this process has one thread; the server is a fork of it, `spare` if there is one.
    """
    from sdeefs import public

    fds = [*layers.lowers, layers.upper, layers.work]
    options = [
        "lowerdir=" + ":".join(f"/proc/self/fd/{fd}" for fd in layers.lowers),
        f"upperdir=/proc/self/fd/{layers.upper}",
        f"workdir=/proc/self/fd/{layers.work}",
        "userxattr",
        "redirect_dir=off",
        "fsname=sdee",
        *words,
    ]
    try:
        parsed = public.parse([",".join(options)])
        if fork:
            server = (spare or SpareServer()).start(parsed, fds)
        else:
            server = public.start_server(parsed, pass_fds=fds)
    except (public.Refused, public.UsageError, OSError) as error:
        raise EngineProblem(f"sdeefs over {os.fsdecode(layers.point)}: {error}") from None
    return server.mount_fd, server.pid, server.pidfd


class SpareServer(SpareProcess):
    """A server to be: a fork of this process that waits for the options of its mount."""

    def __init__(self) -> None:
        from sdeefs import public

        public.preload()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            pid = os.fork()
            if not pid:
                _serve(theirs)
        super().__init__(pid, ours)

    def start(self, options: Options, fds: Sequence[int]) -> Server:
        """Mount and serve. `fds`: the layers, lowers first, then upper and work. Closes this.

        Raises public.Refused, public.UsageError, OSError.
        """
        from sdeefs import public

        try:
            socket.send_fds(self._channel, [pickle.dumps(options)], list(fds))
            server = public.receive_server(self._channel, self.pid)
        except BaseException:
            self.discard()
            raise
        self._close()
        return server


def _serve(channel: socket.socket) -> NoReturn:
    """In the fork: a server and nothing else."""
    from sdeefs import public

    status = 1
    try:
        os.setsid()
        channel = keep_only(channel)
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.close(null)
        set_title("sdee-spare server")
        data, fds, _, _ = socket.recv_fds(channel, 1 << 16, _MOST_LAYERS, socket.MSG_CMSG_CLOEXEC)
        if data:
            *lowers, upper, work = [b"/proc/self/fd/%d" % fd for fd in fds]
            options = replace(pickle.loads(data), lowers=tuple(lowers), upper=upper, work=work)
            set_title("sdeefs serve")
            status = public.run_server(options, channel)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def pick(engine: str, makers: dict[str, Callable[[], Merged]]) -> Merged:
    """Make the mounts with this engine; `auto` takes the first of `makers` that works.

    Raises EngineProblem with every reason.
    """
    if engine != "auto" and engine not in makers:
        raise EngineProblem(f"there is no engine {engine}")
    wanted = list(makers) if engine == "auto" else [engine]
    reasons = []
    for name in wanted:
        try:
            return makers[name]()
        except EngineProblem as error:
            reasons.append(f"{name}: {error}")
    raise EngineProblem("; ".join(reasons))
