"""`sdeed`: the root daemon that makes instances for the users whom the kernel vouches for.

One trio loop takes requests on a unix socket, knows who asks by SO_PEERCRED, and bounds every
request in size, time and number for each user. It makes no process and opens nothing of a user's
itself: that is the keepers' work (keeper.py). What it knows is on disk below /run/sdee, so that a
new daemon takes over the live instances of the old one.

The listening socket comes from systemd (LISTEN_FDS) or is made here.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import trio

from sdee_launch import config, daemon_ops, instances, keeper, protocol
from sdee_launch.daemon_ops import Request
from sdee_launch.daemon_secrets import Secrets
from sdee_launch.daemon_wire import listening_socket, notify, receive, send
from sdee_launch.instances import Record, Registry
from sdee_launch.masks import RULE, Masks, Rule
from sdee_launch.protocol import Refused

log = logging.getLogger("sdeed")

STATE = "/run/sdee"
#: Seconds for a client to say what it wants, and to take the answer.
TALK_SECONDS = 10.0
_UCRED = struct.Struct("=iII")


@dataclass(frozen=True)
class Limits:
    """What one user may use of the daemon."""

    requests: int = 64  # at the same time
    instances: int = 32
    connections: int = 1024  # of all users, being answered at the same time
    mask_seconds: float = 60.0  # between two scans of lower for secrets


LIMITS = Limits()


class Keeper:
    """The daemon's end of one user's keeper process."""

    def __init__(self, sock: trio.socket.SocketType, pidfd: int) -> None:
        self._sock = sock
        self._pidfd = pidfd
        self._turn = trio.Lock()
        self.used_at = trio.current_time()
        self.busy = 0

    async def ask(
        self, message: dict[str, object], fds: tuple[int, ...] = ()
    ) -> tuple[dict[str, object], list[int]]:
        """Send a request and wait for its answer; the descriptors are the caller's.

        Raises Refused with what the keeper says, or if it died.
        """
        ours, its = socket.socketpair()
        self.busy += 1
        try:
            with trio.socket.from_stdlib_socket(ours) as answer:
                try:
                    async with self._turn:
                        await send(self._sock, message, [its.fileno(), *fds], keeper.MAX_MESSAGE)
                    its.close()
                    reply, got = await receive(answer, protocol.MAX_DESCRIPTORS, keeper.MAX_MESSAGE)
                except (OSError, EOFError) as error:
                    raise Refused(f"the process that makes instances died ({error})") from None
        finally:
            its.close()
            self.busy -= 1
            self.used_at = trio.current_time()
        if not reply.get("ok"):
            for fd in got:
                os.close(fd)
            raise Refused(str(reply.get("error")), str(reply.get("kind", "failed")))
        return reply, got

    def close(self) -> None:
        """Let the process end, when it has done what it is at."""
        self._sock.close()
        os.close(self._pidfd)

    def kill(self) -> None:
        """End the process now: it hangs on something of its user's."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


class Daemon:
    """What operations work with."""

    def __init__(
        self,
        template: socket.socket,
        state: str = STATE,
        limits: Limits = LIMITS,
        rule: Rule = RULE,
    ) -> None:
        self.state = state
        self.limits = limits
        self.registry = Registry(state)
        self.masks = Masks(os.path.join(state, "masks"), rule)
        self.secrets = Secrets(self.masks, self.registry, limits.mask_seconds)
        self.nursery: trio.Nursery
        self.started_at = time.time()
        self.counts: Counter[str] = Counter()
        self._template = trio.socket.from_stdlib_socket(template)
        self._template_turn = trio.Lock()
        self._keepers: dict[int, Keeper] = {}
        self._locks: dict[tuple[int, str], trio.Lock] = {}
        self._in_flight: Counter[int] = Counter()
        self._ended: dict[int, trio.Event] = {}  # by the init's pid

    # -- keepers

    async def keeper(self, uid: int) -> Keeper:
        """The keeper of a user, started if there is none."""
        async with self._template_turn:
            found = self._keepers.get(uid)
            if found is None:
                ours, its = socket.socketpair()
                try:
                    await send(self._template, {"uid": uid}, [its.fileno()], keeper.MAX_MESSAGE)
                except BaseException:
                    ours.close()
                    raise
                finally:
                    its.close()
                sock = trio.socket.from_stdlib_socket(ours)
                hello, _ = await receive(sock, 0, keeper.MAX_MESSAGE)
                pidfd = os.pidfd_open(int(str(hello["pid"])))
                found = self._keepers[uid] = Keeper(sock, pidfd)
            found.used_at = trio.current_time()
            return found

    async def ask_keeper(
        self, uid: int, message: dict[str, object], fds: tuple[int, ...] = ()
    ) -> tuple[dict[str, object], list[int]]:
        """`Keeper.ask`, with a new keeper if the old one was found dead."""
        for last in (False, True):
            found = await self.keeper(uid)
            try:
                return await found.ask(message, fds)
            except trio.Cancelled:
                if message["do"] == "make":
                    found.kill()
                    self._drop(uid, found)
                raise
            except Refused as error:
                if last or "died" not in str(error):
                    raise
                self._drop(uid, found)
        raise AssertionError("not reached")

    def _drop(self, uid: int, found: Keeper) -> None:
        if self._keepers.get(uid) is found:
            del self._keepers[uid]
            found.close()

    async def call(
        self,
        uid: int,
        target: str,
        arguments: dict[str, object],
        fds: tuple[int, ...] = (),
    ) -> tuple[dict[str, object], list[int]]:
        """Call `module:function` as root in a process of its own, beside the keeper of `uid`.

        With `fds`, the function gets them as the keyword `fds`. Its result is `result` of the
        reply, unless it gives (fields, descriptors) itself.
        """
        message: dict[str, object] = {"do": "call", "target": target, "arguments": arguments}
        if fds:
            message["with_fds"] = True
        return await self.ask_keeper(uid, message, fds)

    # -- instances

    @contextlib.asynccontextmanager
    async def exclusive(self, uid: int, environment: str) -> AsyncIterator[None]:
        """Nobody else makes, ends or changes this environment of this user meanwhile."""
        lock = self._locks.setdefault((uid, environment), trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked() and not lock.statistics().tasks_waiting:
                self._locks.pop((uid, environment), None)

    async def keep(self, record: Record) -> None:
        """Take a new instance into the registry, and end what belongs to it when it ends."""
        pidfd = record.init.open()
        if pidfd is None:
            await self._clear(record)
            raise Refused(f"the instance of {record.environment} ended at once", "gone")
        self.registry.add(record)
        self._watch(record, pidfd)

    def _watch(self, record: Record, pidfd: int) -> None:
        self._ended[record.init.pid] = trio.Event()
        self.nursery.start_soon(self._until_ended, record, pidfd)
        for server in record.servers:
            self.nursery.start_soon(self._until_server_ended, record, server)

    async def _until_server_ended(self, record: Record, server: instances.Process) -> None:
        """An instance whose root nobody serves any more can only end."""
        pidfd = server.open()
        if pidfd is not None:
            try:
                await trio.lowlevel.wait_readable(pidfd)
            finally:
                os.close(pidfd)
        if instances.kill(record.init):
            log.error("the server %d of %s ended: so does the instance", server.pid, record.key[1])

    async def _until_ended(self, record: Record, pidfd: int) -> None:
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        await self._clear(record)
        event = self._ended.pop(record.init.pid, None)
        if event is not None:
            event.set()

    async def _clear(self, record: Record) -> None:
        """The init is gone, and with it all processes and mounts; its servers follow."""
        for server in record.servers:
            await _end_process(server)
        self.registry.remove(record)
        log.info("instance %s of uid %d ended", record.key[1], record.uid)

    async def wait_ended(self, record: Record) -> None:
        """Until an instance is gone."""
        event = self._ended.get(record.init.pid)
        if event is not None:
            await event.wait()

    async def end(self, record: Record) -> None:
        """Kill an instance and wait until nothing of it is left."""
        instances.kill(record.init)
        await self.wait_ended(record)

    # -- the life of the daemon

    async def serve(self, listener: socket.socket) -> None:
        """Take requests until cancelled. Live instances stay."""
        listen = trio.socket.from_stdlib_socket(listener)
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            for record in self.registry.load():
                pidfd = record.init.open()
                if pidfd is None:
                    await self._clear(record)
                else:
                    self._watch(record, pidfd)
            self.masks.prune(r.mask for r in self.registry.of())
            for starter in daemon_ops.STARTERS:
                await starter(self)
            nursery.start_soon(self.secrets.scan_and_again)
            nursery.start_soon(self.secrets.watch)
            nursery.start_soon(self._close_idle_keepers)
            log.info("ready; %d live instances", len(self.registry.of()))
            notify("READY=1")
            while True:
                try:
                    client, _ = await listen.accept()
                except OSError as error:  # out of descriptors, for one: others will be closed
                    log.error("accept: %s", error.strerror)
                    await trio.sleep(0.1)
                    continue
                nursery.start_soon(self._serve_client, client)

    async def rescan(self) -> None:
        """Scan lower for secrets now. Raises OSError, ValueError, RuntimeError."""
        await self.secrets.scan()

    async def _close_idle_keepers(self) -> None:
        while True:
            await trio.sleep(60)
            live = {record.uid for record in self.registry.of()}
            for uid, found in list(self._keepers.items()):
                idle = trio.current_time() - found.used_at
                if uid not in live and not found.busy and idle > 300:
                    self._drop(uid, found)

    # -- one client

    async def _serve_client(self, client: trio.socket.SocketType) -> None:
        with client:
            try:
                raw = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
                pid, uid, gid = _UCRED.unpack(raw)
                limit = self.limits.requests if uid else sys.maxsize
                if (
                    self._in_flight[uid] >= limit
                    or self._in_flight.total() >= self.limits.connections
                ):
                    self.counts["busy"] += 1
                    with trio.move_on_after(1):
                        await _send_reply(client, _no("too many requests at once", "busy"), [])
                    return
                self._in_flight[uid] += 1
                try:
                    await self._answer(client, uid, gid, pid)
                finally:
                    self._in_flight[uid] -= 1
                    if not self._in_flight[uid]:
                        del self._in_flight[uid]
            except (OSError, EOFError):
                self.counts["broken"] += 1
            except Exception:
                log.exception("a client")

    async def _answer(self, client: trio.socket.SocketType, uid: int, gid: int, pid: int) -> None:
        fds: list[int] = []
        reply: dict[str, object]
        out: list[int] = []
        try:
            with trio.move_on_after(TALK_SECONDS) as talk:
                try:
                    fields, fds = await receive(client, 8, protocol.MAX_REQUEST)
                except ValueError as error:
                    reply = _no(f"a bad request: {error}", "bad-request")
                    await _send_reply(client, reply, [])
                    return
            if talk.cancelled_caught:
                self.counts["slow"] += 1
                return
            reply, out = await self._perform(fields, fds, uid, gid, pid)
            with trio.move_on_after(TALK_SECONDS):
                await _send_reply(client, reply, out)
        finally:
            for fd in {*fds, *out}:
                os.close(fd)

    async def _perform(
        self, fields: dict[str, object], fds: list[int], uid: int, gid: int, pid: int
    ) -> tuple[dict[str, object], list[int]]:
        """Run the operation: the reply, and descriptors that go with it."""
        name = fields.get("op")
        found = daemon_ops.OPERATIONS.get(name) if isinstance(name, str) else None
        if found is None:
            return _no("there is no such operation", "unknown-op"), []
        if found.admin and uid != 0:
            return _no(f"{found.name} is for root", "denied"), []
        if len(fds) > found.descriptors:
            return _no(f"{found.name} takes {found.descriptors} descriptors", "bad-request"), []
        self.counts[found.name] += 1
        request = Request(found.name, fields, uid, gid, pid, tuple(fds))
        try:
            with trio.fail_after(found.seconds):
                result = await found.handler(self, request)
        except Refused as error:
            return _no(str(error), error.kind), []
        except trio.TooSlowError:
            return _no(f"{found.name} took longer than {found.seconds:.0f} s", "failed"), []
        except OSError as error:
            what = f"{error.filename!s}: " if error.filename else ""
            return _no(f"{what}{error.strerror or error}", "failed"), []
        except Exception:
            log.exception("%s for uid %d", found.name, uid)
            return _no(f"{found.name} failed; the daemon's log says why", "failed"), []
        return {"ok": True, **result.fields}, result.fds


async def _end_process(process: instances.Process) -> None:
    """SIGTERM, and SIGKILL if that doesn't help: a server whose mount is gone ends by itself."""
    for number, patience in ((0, 2.0), (signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0)):
        fd = process.open()
        if fd is None:
            return
        try:
            if number:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, number)
            with trio.move_on_after(patience):
                await trio.lowlevel.wait_readable(fd)
        finally:
            os.close(fd)


def _no(message: str, kind: str) -> dict[str, object]:
    return {"ok": False, "error": message, "kind": kind}


async def _send_reply(
    sock: trio.socket.SocketType, message: dict[str, object], fds: list[int]
) -> None:
    try:
        await send(sock, message, fds, protocol.MAX_REPLY)
    except ValueError as error:
        await send(sock, _no(f"the answer is too long: {error}", "failed"), [], protocol.MAX_REPLY)


async def _run(daemon_arguments: tuple[socket.socket, str, Limits, Rule], path: str) -> None:
    template, state, limits, rule = daemon_arguments
    listener = listening_socket(path)
    daemon = Daemon(template, state, limits, rule)
    try:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(daemon.serve, listener)
                async for number in signals:
                    log.info("%s: the daemon ends, instances stay", signal.Signals(number).name)
                    nursery.cancel_scope.cancel()
                    break
    finally:
        notify("STOPPING=1")
        if not daemon.registry.of():
            daemon.masks.close()


def _configured() -> tuple[Limits, Rule]:
    """What the site's file says. Raises ConfigError."""
    site = config.site_settings()
    numbers = dict(site.section("daemon"))
    for name, value in numbers.items():
        if value < 1:
            raise config.ConfigError(f"{config.SITE_FILE}: daemon.{name}: at least 1")
    globs = site.section("masks")
    rule = Rule(
        RULE.blank + tuple(x.lstrip("/") for x in globs.get("blank", ())),
        RULE.public + tuple(x.lstrip("/") for x in globs.get("public", ())),
    )
    return replace(LIMITS, **numbers), rule


def main(arguments: list[str] | None = None) -> int:
    """`sdeed`, `sdee daemon`."""
    parser = argparse.ArgumentParser(prog="sdeed", description="The daemon of SDEE on one node.")
    parser.add_argument("--socket", default=protocol.SOCKET_PATH, help="default: %(default)s")
    parser.add_argument("--state", default=STATE, help="what survives a restart (%(default)s)")
    parser.add_argument("-v", "--verbose", action="store_true")
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING,
        format="sdeed: %(message)s",
        stream=sys.stderr,
    )
    if os.geteuid() != 0:
        print("sdeed: must be run by root (users without it: sdee works alone)", file=sys.stderr)
        return 1
    os.umask(0o022)
    os.chdir("/")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    os.makedirs(options.state, mode=0o755, exist_ok=True)
    from sdee_launch import daemon_requests  # noqa: F401 - registers the operations of every user

    daemon_ops.load_extensions()
    try:
        limits, rule = _configured()
    except config.ConfigError as error:
        print(f"sdeed: {error}", file=sys.stderr)
        return 1
    _, template = keeper.start_template()
    try:
        trio.run(_run, (template, options.state, limits, rule), options.socket)
    except OSError as error:
        print(f"sdeed: {error.filename or options.socket}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
