"""One mount served by this process, from its layers to its end.

The order matters: layers are locked and opened before anything is mounted (merged may lie below
its own lower), INIT is answered and requests are served before the mount is attached, and only
then trio is imported, which waits for signals and the control socket beside the requests.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mount_helpers import syscalls
from mount_helpers.mountinfo import mount_at, read_mounts
from sdeefs import descriptors, log, privileges, refusals
from sdeefs.control import Control
from sdeefs.options import Options
from sdeefs.refusals import Refused

if TYPE_CHECKING:
    from sdeefs.core.filesystem import Filesystem
    from sdeefs.transports.transport import Transport, TransportOptions
    from sdeefs.watch import Watch

logger = logging.getLogger("sdeefs")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_STACKED = ("overlay", "fuse", "ecryptfs")
#: Seconds in which nothing but requests is served.
_FIRST_REQUESTS = 0.1


async def _back_to(interval: float) -> None:
    """When all have started, threads take turns as before."""
    import trio

    await trio.sleep(0)
    sys.setswitchinterval(interval)


class Session:
    """A mount and its server. `merged` None: the mount stays detached, `mount_fd` is handed over."""

    filesystem: Filesystem
    transport: Transport

    def __init__(self, options: Options, merged: bytes | None) -> None:
        self.options = options
        self.merged = merged
        self.mount_fd: int | None = None
        self.minor = 0
        self.control: Control | None = None
        self.watch: Watch | None = None
        self.started = time.time()
        self._locks: list[int] = []
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._ended = threading.Event()
        self._tell: Any = None  # what to call when the transport has ended
        self._opened = False
        self._attached = False  # until then what is at merged is another's
        self._left_mounted = False  # for want of descriptors
        self._usable = False  # from now on what fails is for the log

        def real(path: bytes | None) -> str | None:
            return None if path is None else os.fsdecode(os.path.realpath(path))

        # Now, while the working directory is the caller's.
        self._places = {
            "merged": None if merged is None else os.fsdecode(merged),
            "upper": real(options.upper),
            "work": real(options.work),
            "lowers": [real(p) for p in options.lowers],
        }

    # --- start ---------------------------------------------------------------------------------

    def open(self) -> None:
        """All up to a mount that answers. Raises Refused or OSError, and leaves nothing then."""
        # Held back until somebody waits for them; threads inherit this and never get one.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        privileges.settle()
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        from sdeefs.core.filesystem import Filesystem

        transport = descriptors.transport_for(self.options)
        descriptors.make_room()
        self._locks = refusals.lock_layers(self.options)
        userxattr = not privileges.on_host()
        settings = self.options.settings(userxattr=userxattr)
        if "max_directories" not in self.options.fields:
            settings = replace(settings, max_directories=descriptors.directories_to_keep())
        self.filesystem = Filesystem(settings)
        self._opened = True
        self._start_watch()
        device = self._mount()
        try:
            self.transport = self._make_transport(transport, device)
        except BaseException:
            os.close(device)
            self._take_away()
            raise
        try:
            if self.watch is not None:
                self.watch.kernel = self.transport
            self.transport.negotiate()
            self._check_path()
            thread = threading.Thread(target=self._serve, name="transport", daemon=True)
            thread.start()
            self._thread = thread
            self._attach()
            self.control = Control.open()
            if self.control is not None:
                self.control.record(self.record())
            self._usable = True
            if self._failure is not None:
                raise self._failure
        except BaseException:
            self._give_up()
            if self._failure is not None:  # why it ended says more than that it has
                raise self._failure from None
            raise

    def _start_watch(self) -> None:
        if self.options.watch is False:
            return
        from sdeefs.watch import Watch

        try:
            self.watch = Watch.open(self.filesystem)
        except OSError as error:
            if self.options.watch:
                raise Refused(f"watch=on: fanotify is refused: {error.strerror}") from None
            logger.info("lower is not watched: %s", error.strerror)

    def _mount(self) -> int:
        """Mount, detached where we may; returns the device."""
        from sdeefs.transports.mount_device import (
            FuseMount,
            mount_at,
            mount_by_fusermount,
            mount_detached,
        )

        options = self.options
        read_only = options.read_only or options.upper is None
        root = os.geteuid() == 0
        what = FuseMount(
            source=options.source,
            allow_other=root if options.allow_other is None else options.allow_other,
            read_only=read_only,
            attributes=options.attributes | (syscalls.MOUNT_ATTR_RDONLY if read_only else 0),
        )
        try:
            device, self.mount_fd = mount_detached(what)
            return device
        except OSError as error:
            if self.merged is None or error.errno not in (errno.EPERM, errno.ENOSYS):
                raise
            old_kernel = error.errno == errno.ENOSYS
        device = (
            mount_at(self.merged, what) if old_kernel else mount_by_fusermount(self.merged, what)
        )
        self.mount_fd = None
        self._attached = True
        return device

    def _transport_options(self) -> TransportOptions:
        from sdeefs.transports.transport import TransportOptions

        options = self.options
        passthrough = options.passthrough is not False and not (
            options.passthrough is None and options.writeback
        )
        made = TransportOptions(
            passthrough=passthrough,
            writeback=options.writeback is not False,
            shortcuts=options.shortcuts is not False,
            max_stack_depth=2 if self._stacked() else 1,
        )
        return made if options.threads is None else replace(made, threads=options.threads)

    def _stacked(self) -> bool:
        """Whether a layer lies on a filesystem that is stacked itself."""
        layers = [p for p in (*self.options.lowers, self.options.upper) if p is not None]
        devices = {os.stat(p).st_dev for p in layers}
        return any(
            os.makedev(*m.device) in devices and m.fstype.startswith(_STACKED)
            for m in read_mounts()
        )

    def _make_transport(self, wanted: str, device: int) -> Transport:
        from sdeefs.transports.choose import make, pick

        choice = pick(wanted)
        logger.info("transport %s: %s", choice.name, choice.reason)
        return make(choice.name, self.filesystem, device, self._transport_options())

    def _check_path(self) -> None:
        """A data path that was forced must be the one we got."""
        for name in ("passthrough", "writeback"):
            if getattr(self.options, name) and self.transport.data_path != name:
                raise Refused(
                    f"{name}=on: this kernel, account or transport ({self.transport.name})"
                    f" doesn't give it; the data path would be {self.transport.data_path}"
                )

    def _serve(self) -> None:
        try:
            self.transport.run()
        except BaseException as error:
            self._failure = error
            if self._usable:  # else open() raises it
                logger.error("the transport failed: %r", error, exc_info=True)
        finally:
            # Whoever still waits for an answer gets ENOTCONN, not silence.
            if self._failure is not None:
                self.transport.stop()
            self._ended.set()
            tell = self._tell
            if tell is not None:
                tell()

    def _attach(self) -> None:
        """Put the mount where it belongs, and wait for its first answer."""
        if self.mount_fd is not None:
            found = os.stat(".", dir_fd=self.mount_fd)
            if self.merged is not None:
                syscalls.attach(self.mount_fd, self.merged)
                self._attached = True
                # Ours would keep the mount alive after the last umount.
                os.close(self.mount_fd)
                self.mount_fd = None
        else:
            assert self.merged is not None
            found = os.stat(self.merged)
        self.minor = os.minor(found.st_dev)

    def record(self) -> dict[str, Any]:
        """What is fixed for the life of the mount."""
        return {
            "engine": "fuse",
            "pid": os.getpid(),
            **self._places,
            "minor": self.minor,
            "transport": self.transport.name,
            "data_path": self.transport.data_path,
            "started": self.started,
        }

    def status(self) -> dict[str, Any]:
        """What the server is doing; answers on the control socket."""
        return {
            **self.record(),
            "requests": self.transport.counters(),
            "core": self.filesystem.counts(),
            "watched": len(self.watch) if self.watch is not None else None,
            "open_descriptors": len(os.listdir("/proc/self/fd")),
        }

    # --- life ----------------------------------------------------------------------------------

    def run(self) -> int:
        """Wait until the mount is gone, whoever takes it away; returns the exit status."""
        # Whoever made the mount is just coming to use it: trio, which takes a tenth of a second of
        # the interpreter to import, stays out of the way, and is spared where it is all over by then.
        if self._ended.wait(_FIRST_REQUESTS):
            return 0 if self._failure is None else 1
        interval = sys.getswitchinterval()
        sys.setswitchinterval(0.0002)
        import trio

        try:
            trio.run(self._beside, interval)
        except Exception as error:
            logger.error("the server failed: %r", error, exc_info=not isinstance(error, OSError))
            return 1
        return 0 if self._failure is None else 1

    async def _beside(self, interval: float) -> None:
        import trio

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_back_to, interval)
            token = trio.lowlevel.current_trio_token()

            def over() -> None:
                try:
                    token.run_sync_soon(nursery.cancel_scope.cancel)
                except trio.RunFinishedError:
                    pass

            await nursery.start(self._signals)
            if self.control is not None:
                nursery.start_soon(self._answer)
            if self.watch is not None:
                nursery.start_soon(self._watch_lower, self.watch)
            self._tell = over
            if self._ended.is_set():
                over()

    async def _signals(self, task_status: Any) -> None:
        import trio

        with trio.open_signal_receiver(*_SIGNALS) as signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            task_status.started()
            async with trio.open_nursery() as nursery:
                ending = False
                async for number in signals:
                    if number == signal.SIGHUP:
                        log.reopen()
                    elif ending:
                        nursery.start_soon(self._cut)
                    else:
                        ending = True
                        nursery.start_soon(self._end)

    async def _end(self) -> None:
        """Unmount; what is still open after five seconds gets ENOTCONN."""
        import trio

        with trio.move_on_after(10):
            await trio.to_thread.run_sync(self._take_away, abandon_on_cancel=True)
            if self.merged is not None:
                await self._until_ended(5)
        await self._cut()

    async def _until_ended(self, seconds: float) -> bool:
        import trio

        with trio.move_on_after(seconds):
            while not self._ended.is_set():
                await trio.sleep(0.02)
        return self._ended.is_set()

    async def _cut(self) -> None:
        """Give the connection up, and make sure of it: a server that was told to end, ends."""
        self.transport.stop()
        if await self._until_ended(3):
            return
        from mount_helpers.fuse import abort_connection

        try:
            abort_connection(self.minor)
        except OSError as error:
            logger.warning("aborting the connection: %s", error.strerror)
        if not await self._until_ended(5):
            logger.error("the transport doesn't end; giving up")
            if self.control is not None:
                self.control.close()
            os._exit(1)

    async def _watch_lower(self, watch: Watch) -> None:
        import trio

        while True:
            with trio.move_on_after(watch.repeat() or float("inf")):
                await trio.lowlevel.wait_readable(watch.fd)
            try:
                watch.read()
            except OSError as error:
                logger.warning("reading events of lower: %s", error.strerror)
                await trio.sleep(1)

    async def _answer(self) -> None:
        """The control socket: each connection gets one JSON object."""
        import json

        import trio

        assert self.control is not None
        self.control.listener.setblocking(False)
        listener = trio.socket.from_stdlib_socket(self.control.listener)
        while True:
            try:
                connection, _ = await listener.accept()
            except OSError as error:
                logger.warning("the control socket failed: %s", error)
                await trio.sleep(1)
                continue
            with connection, trio.move_on_after(2):
                try:
                    stream = trio.SocketStream(connection)
                    await stream.send_all(json.dumps(self.status()).encode() + b"\n")
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass
                except Exception:
                    logger.exception("status failed")

    # --- end -----------------------------------------------------------------------------------

    def _take_away(self) -> None:
        """Unmount merged, if the mount there is still ours; what is open keeps it alive unseen."""
        if self.mount_fd is not None:
            os.close(self.mount_fd)
            self.mount_fd = None
        if self.merged is None or not self._attached:
            return
        mount = mount_at(self.merged)
        if mount is None or (self.minor and mount.device != (0, self.minor)):
            return
        if mount.fstype != refusals.OUR_TYPE:
            return
        try:
            syscalls.umount2(self.merged, syscalls.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno == errno.EPERM:
                from sdeefs.umount_command import fusermount

                fusermount(self.merged, lazy=True)
            elif error.errno == errno.EBUSY:
                self._write_back()
                syscalls.umount2(self.merged, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)

    def _write_back(self) -> None:
        """What the kernel still holds goes to upper, before its connection may be cut."""
        assert self.merged is not None
        try:
            fd = os.open(self.merged, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            syscalls.syncfs(fd)
        except OSError as error:
            logger.warning("syncfs of %s: %s", refusals.text(self.merged), error.strerror)
        finally:
            os.close(fd)

    def _give_up(self) -> None:
        """Something failed: the mount and its connection end, in whatever order is possible."""
        if self._usable:
            self._try_to_take_away()  # still served: what was written reaches upper
            if self._ended.wait(5):
                return
            self._left_mounted = False
        self.transport.stop()
        if self._thread is not None:
            self._ended.wait(5)  # its descriptors may be those that are missing
        self._try_to_take_away()

    def _try_to_take_away(self) -> None:
        """The last try, when all descriptors are free again, says why it failed."""
        try:
            self._take_away()
            self._left_mounted = False
        except (OSError, Refused) as error:
            if self._left_mounted:
                logger.error("unmounting %s: %s", self._places["merged"], error)
            self._left_mounted = True

    def close(self) -> None:
        """Give everything back. The mount is gone or goes with us."""
        if self.control is not None:
            self.control.close()
            self.control = None
        if self._thread is not None and not self._ended.is_set():
            self._give_up()
        if self._thread is not None:
            self._thread.join(10)
            if self._thread.is_alive():
                logger.warning("the transport doesn't end")
            self._thread = None
        if self.watch is not None:
            self.watch.close()
            self.watch = None
        if self._opened:
            self._opened = False
            self.filesystem.close()
        if self.mount_fd is not None:
            os.close(self.mount_fd)
            self.mount_fd = None
        if self._left_mounted:
            self._try_to_take_away()
        for fd in self._locks:
            os.close(fd)
        self._locks = []
