"""Making an instance: clone into new namespaces, give them their id maps, assemble, become init.

The maker stays outside and gets told by one line on a pipe whether it worked. What differs between
site and rootless mode is who makes the merged mounts and who may write the id maps: both come in
as arguments.
"""

from __future__ import annotations

import os
import select
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mount_helpers import syscalls as sc
from sdee_launch import init, join, membership
from sdee_launch.assemble import AssemblyFailed, Material, assemble
from sdee_launch.plan import Plan
from sdee_launch.privileges import Guard

#: Seconds in which an instance must stand.
PATIENCE = 60.0
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


def create(
    recipe: Recipe,
    new_user_namespace: bool,
    write_maps: Callable[[int], None] | None,
    seconds: float = PATIENCE,
) -> int:
    """Make the instance; gives the pid of its init, a child of the caller.

    With `new_user_namespace` its owner is the effective user; `write_maps(pid)` is called once it
    is there. Without, it belongs to the caller's own. For processes with one thread.
    Raises InstanceProblem.
    """
    member = membership.make()
    go_read, go_write = os.pipe2(os.O_CLOEXEC)
    told_read, told_write = os.pipe2(os.O_CLOEXEC)
    flags = sc.CLONE_NEWNS | sc.CLONE_NEWPID
    if new_user_namespace:
        flags |= sc.CLONE_NEWUSER
    for name in recipe.namespaces:
        flags |= _FLAGS[name]
    try:
        pid = sc.clone(flags)
    except OSError as error:
        for fd in (member, go_read, go_write, told_read, told_write):
            os.close(fd)
        raise InstanceProblem(f"new namespaces: {error.strerror}") from None
    if not pid:
        _child(recipe, go_read, go_write, told_read, told_write, member)
    for fd in (member, go_read, told_write):
        os.close(fd)
    try:
        try:
            if write_maps is not None:
                write_maps(pid)
            os.write(go_write, b"x")
        except OSError as error:
            raise InstanceProblem(f"the id maps of the instance: {error.strerror}") from None
        finally:
            os.close(go_write)
        _wait_ready(told_read, seconds)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(told_read)
    return pid


def _wait_ready(told: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    text = b""
    while not text.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([told], [], [], left)[0]:
            raise InstanceProblem(f"not ready within {seconds:g} s")
        part = os.read(told, 4096)
        if not part:
            raise InstanceProblem("its init ended before it was ready")
        text += part
    if text != b"ok\n":
        raise InstanceProblem(text.decode("utf-8", "replace").strip())


def _child(
    recipe: Recipe, go_read: int, go_write: int, told_read: int, told_write: int, member: int
) -> None:
    """The child of `create`: never returns."""
    try:
        try:
            os.close(go_write)
            os.close(told_read)
            if not os.read(go_read, 1):
                os._exit(1)
            _become_root()
            for number in range(1, signal.NSIG):
                if signal.getsignal(number) not in (signal.SIG_DFL, None):
                    signal.signal(number, signal.SIG_DFL)
            os.setsid()
            os.umask(0o022)
            assemble(recipe.plan, recipe.material)
            init.set_title(f"sdee-init {recipe.name}")
            join.apply_guard(
                recipe.guard.capabilities, recipe.guard.seccomp, recipe.guard.no_new_privs
            )
            others = [fd for _, fd in recipe.servers]
            if recipe.lock is not None:
                others.append(recipe.lock)
            told = [told_write]
            kept = init.keep_only(member, [*others, *told])
            os.write(kept[-1], b"ok\n")
            os.close(kept[-1])
            init.run(kept[: len(recipe.servers)], recipe.lasting)
        except (AssemblyFailed, OSError) as error:
            line = str(error).replace("\n", " ")
            os.write(told_write, f"{line}\n".encode("utf-8", "replace"))
        except BaseException:
            line = traceback.format_exc().strip().replace("\n", " | ")
            os.write(told_write, f"{line[-1500:]}\n".encode("utf-8", "replace"))
    finally:
        os._exit(1)


def _become_root() -> None:
    """All ids 0 in the new user namespace; groups of the maker's stay."""
    if os.getresgid() != (0, 0, 0):
        os.setresgid(0, 0, 0)
    if os.getresuid() != (0, 0, 0):
        os.setresuid(0, 0, 0)
