"""Making an instance: clone into new namespaces, give them their id maps, assemble, become init.

The maker stays outside and gets told by one line on a pipe whether it worked. What differs between
site and rootless mode is who makes the merged mounts and who may write the id maps: both come in
as arguments.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

from mount_helpers import syscalls as sc
from sdee_launch import init, join, membership
from sdee_launch.assemble import AssemblyFailed, Material, assemble, gather
from sdee_launch.plan import Plan
from sdee_launch.privileges import Guard
from sdee_launch.spare import SpareProcess, keep_only

#: Seconds in which an instance must stand.
PATIENCE = 60.0
_MOST_FDS = 200  # in one message; Linux takes 253
_FLAGS = {"uts": sc.CLONE_NEWUTS, "ipc": sc.CLONE_NEWIPC}


class InstanceProblem(Exception):
    """Why an instance can't be made, in one line."""


@dataclass(frozen=True)
class Recipe:
    """One instance: decided before it is made."""

    name: str
    plan: Plan
    material: Material
    guard: Guard
    servers: Sequence[tuple[int, int]] = ()  # pid, pidfd
    lock: int | None = None  # held by init for as long as it lives
    lasting: bool = False
    namespaces: Sequence[str] = ()  # uts, ipc: private as well


@dataclass
class Instance:
    """A live instance, as its maker knows it."""

    init: int
    engine: str
    servers: list[int] = field(default_factory=list)
    #: What a session needs to join: the guard, variables, more namespaces.
    join: dict[str, object] = field(default_factory=dict)
    maps: object = None

    def descriptors(self) -> dict[str, int]:
        """Descriptors of the namespaces and of the root, by name; the caller's. Raises OSError."""
        found: dict[str, int] = {}
        try:
            for name in ("user", "mnt", "pid", *self.more_namespaces()):
                found[name] = os.open(f"/proc/{self.init}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
            flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            found["root"] = os.open(f"/proc/{self.init}/root", flags)
        except OSError:
            for fd in found.values():
                os.close(fd)
            raise
        return found

    def more_namespaces(self) -> list[str]:
        """Private namespaces beside user, mnt and pid."""
        more = self.join.get("namespaces")
        return [str(n) for n in more] if isinstance(more, list) else []

    def kill(self) -> None:
        """End it at once."""
        try:
            os.kill(self.init, signal.SIGKILL)
        except ProcessLookupError:
            pass


class Spare(SpareProcess):
    """An init to be: it waits in new user and PID namespaces for the recipe of an instance.

    Made before it is needed, it spares a request the clone.
    """

    def begin(self, plan: Plan) -> None:
        """Let it start on what a plan takes from the host; `become` follows, with the same plan."""
        try:
            _send(self._channel, pickle.dumps(plan), [])
        except OSError:
            pass  # it has ended: `become` says why

    def become(self, recipe: Recipe, seconds: float = PATIENCE) -> int:
        """Let it be the init of an instance; its pid. Closes this. Raises InstanceProblem."""
        member = membership.make()
        try:
            data, fds = _pack(recipe)
            try:
                _send(self._channel, data, [member, *fds])
            except OSError:
                pass  # it has ended, and may have said why
            _wait_ready(self._channel, seconds)
        except BaseException:
            self.discard()
            raise
        finally:
            os.close(member)
        self._close()
        return self.pid


def prepare(
    new_user_namespace: bool,
    write_maps: Callable[[int], None] | None,
    namespaces: Sequence[str] = (),
) -> Spare:
    """Clone an init to be, a child of the caller.

    With `new_user_namespace` its owner is the effective user; `write_maps(pid)` is called once it
    is there. Without, it belongs to the caller's own. For processes with one thread.
    Raises InstanceProblem.
    """
    ours, its = socket.socketpair()
    flags = sc.CLONE_NEWPID
    if new_user_namespace:
        flags |= sc.CLONE_NEWUSER
    for name in namespaces:
        flags |= _FLAGS[name]
    try:
        pid = sc.clone(flags)
    except OSError as error:
        ours.close()
        its.close()
        raise InstanceProblem(f"new namespaces: {error.strerror}") from None
    if not pid:
        _child(its)
    its.close()
    spare = Spare(pid, ours)
    try:
        if write_maps is not None:
            write_maps(pid)
        ours.send(b"x")
    except OSError as error:
        spare.discard()
        raise InstanceProblem(f"the id maps of the instance: {error.strerror}") from None
    return spare


def create(
    recipe: Recipe,
    new_user_namespace: bool,
    write_maps: Callable[[int], None] | None,
    seconds: float = PATIENCE,
) -> int:
    """`prepare`, `begin` and `become` in one: the pid of the init. Raises InstanceProblem."""
    spare = prepare(new_user_namespace, write_maps, recipe.namespaces)
    spare.begin(recipe.plan)
    return spare.become(recipe, seconds)


def _wait_ready(channel: socket.socket, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    text = b""
    while not text.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([channel], [], [], left)[0]:
            raise InstanceProblem(f"not ready within {seconds:g} s")
        try:
            part = channel.recv(4096)
        except ConnectionResetError:
            part = b""
        if not part:
            raise InstanceProblem("its init ended before it was ready")
        text += part
    if text != b"ok\n":
        raise InstanceProblem(text.decode("utf-8", "replace").strip())


def _pack(recipe: Recipe) -> tuple[bytes, list[int]]:
    """A recipe with places in the list of descriptors where it has descriptors."""
    fds: list[int] = []

    def place(fd: int) -> int:
        fds.append(fd)
        return len(fds) - 1

    material = recipe.material
    packed = replace(
        recipe,
        material=replace(
            material,
            mounts=[(point, place(fd)) for point, fd in material.mounts],
            private={name: place(fd) for name, fd in material.private.items()},
            extra=[(target, place(fd)) for target, fd in material.extra],
        ),
        servers=[(pid, place(fd)) for pid, fd in recipe.servers],
        lock=None if recipe.lock is None else place(recipe.lock),
    )
    return pickle.dumps(packed), fds


def _unpack(data: bytes, fds: Sequence[int]) -> Recipe:
    packed = pickle.loads(data)  # from our own parent
    assert isinstance(packed, Recipe)
    material = packed.material
    return replace(
        packed,
        material=replace(
            material,
            mounts=[(point, fds[n]) for point, n in material.mounts],
            private={name: fds[n] for name, n in material.private.items()},
            extra=[(target, fds[n]) for target, n in material.extra],
        ),
        servers=[(pid, fds[n]) for pid, n in packed.servers],
        lock=None if packed.lock is None else fds[packed.lock],
    )


def _send(channel: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    rest = list(fds)
    while len(rest) > _MOST_FDS:
        socket.send_fds(channel, [b"+"], rest[:_MOST_FDS])
        del rest[:_MOST_FDS]
    socket.send_fds(channel, [b"."], rest)
    channel.sendall(len(data).to_bytes(4, "big") + data)


def _receive(channel: socket.socket) -> tuple[bytes, list[int]] | None:
    """What `_send` sent; None if the maker is gone."""
    fds: list[int] = []
    more = b"+"
    while more == b"+":
        more, got, _, _ = socket.recv_fds(channel, 1, _MOST_FDS, socket.MSG_CMSG_CLOEXEC)
        fds += got
    if not more:
        return None
    head = channel.recv(4, socket.MSG_WAITALL)
    data = channel.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
    return data, fds


def _child(channel: socket.socket) -> NoReturn:
    """The child of `prepare`."""
    try:
        channel = keep_only(channel)
        if not channel.recv(1):
            os._exit(1)
        _become_root()
        for number in range(1, signal.NSIG):
            if signal.getsignal(number) not in (signal.SIG_DFL, None):
                signal.signal(number, signal.SIG_DFL)
        os.setsid()
        os.umask(0o022)
        init.set_title("sdee-spare init")
        begun = _receive(channel)
        if begun is None:
            os._exit(0)
        try:
            sc.unshare(sc.CLONE_NEWNS)
            gathered = gather(pickle.loads(begun[0]))
            got = _receive(channel)
            if got is None:
                os._exit(0)
            data, (member, *fds) = got
            recipe = _unpack(data, fds)
            assemble(recipe.plan, recipe.material, gathered)
            join.apply_guard(
                recipe.guard.capabilities, recipe.guard.seccomp, recipe.guard.no_new_privs
            )
            others = [fd for _, fd in recipe.servers]
            if recipe.lock is not None:
                others.append(recipe.lock)
            kept = init.keep_only(member, [*others, channel.fileno()])
            channel.detach()
            os.write(kept[-1], b"ok\n")
            os.close(kept[-1])
            init.set_title(f"sdee-init {recipe.name}")
            init.run(kept[: len(recipe.servers)], recipe.lasting)
        except (AssemblyFailed, OSError) as error:
            line = str(error).replace("\n", " ")
            channel.sendall(f"{line}\n".encode("utf-8", "replace"))
        except BaseException:
            line = traceback.format_exc().strip().replace("\n", " | ")
            channel.sendall(f"{line[-1500:]}\n".encode("utf-8", "replace"))
    finally:
        os._exit(1)


def _become_root() -> None:
    """All ids 0 in the new user namespace; groups of the maker's stay."""
    if os.getresgid() != (0, 0, 0):
        os.setresgid(0, 0, 0)
    if os.getresuid() != (0, 0, 0):
        os.setresuid(0, 0, 0)
