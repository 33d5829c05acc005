"""The root side: the instance of a user, made by a process of the daemon that serves them alone.

What belongs to the user (store, environment, upper) is opened with the user's own rights. Only
root can shift the ids of lower and mount overlayfs for them, so the merged mounts are made here,
detached, and handed to the child that is root of the new namespaces.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mount_helpers import syscalls as sc
from mount_helpers.mountinfo import parse_line
from mount_helpers.namespaces import user_namespace, write_id_maps
from sdee_launch import engines, environments, layers, plan, protocol, workload
from sdee_launch.accounts import Account, IdMaps, id_maps, lower_maps
from sdee_launch.assemble import Material, clone_private
from sdee_launch.config import Settings
from sdee_launch.engines import EngineProblem, Layers, Merged
from sdee_launch.environments import Busy, Denied, Environment, EnvironmentProblem
from sdee_launch.instance import Instance, InstanceProblem, Recipe, Spare, prepare

__all__ = [
    "EngineProblem",
    "EnvironmentProblem",
    "Instance",
    "InstanceProblem",
    "JobLayers",
    "as_user",
    "discard_spares",
    "make_instance",
    "open_environment",
    "prepare_store",
    "release",
    "settle",
]

#: Seconds to wait for an instance of the same environment that is just ending.
_ENDING = 20.0
_caches: dict[object, int] = {}


@dataclass(frozen=True)
class JobLayers:
    """Layers that take the place of an environment's own, as paths that the user may reach.

    `lowers`: generations (uppers that are only read), the topmost first. `place` holds `upper`,
    made if it isn't there, and the work directories beside it.
    """

    lowers: tuple[str, ...]
    place: str


@contextlib.contextmanager
def as_user(account: Account) -> Iterator[None]:
    """Act with the effective ids of the user; for a process with one thread. No-op for oneself."""
    if os.geteuid() == account.uid:
        yield
        return
    if sorted(os.getgroups()) != sorted(set(account.groups)):
        os.setgroups(account.groups)
    os.setegid(account.gid)
    os.seteuid(account.uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def open_environment(account: Account, name: str, settings: Settings) -> Environment:
    """The environment of a user, made if there is none. Raises EnvironmentProblem, OSError."""
    prepare_store(account, settings)
    with as_user(account), environments.open_store(account, settings) as store:
        return store.open(name, create=True)


def prepare_store(account: Account, settings: Settings) -> None:
    """A store in a directory that is root's, such as /var/lib/sdee, is made for the user."""
    path = environments.store_path(account, settings)
    parent = os.path.dirname(path)
    try:
        status = os.stat(parent)
    except OSError:
        return
    if status.st_uid != 0 or status.st_mode & 0o022:
        return
    try:
        os.mkdir(path, 0o700)
        os.chown(path, account.uid, account.gid)
    except FileExistsError:
        pass


def make_instance(
    user: Account,
    environment: Environment | None,
    engine: str = "auto",
    binds: Sequence[str] = (),
    masks: Mapping[str, str] | None = None,
    settings: Settings | None = None,
    *,
    name: str = "",
    job: JobLayers | None = None,
    lasting: bool = False,
) -> Instance:
    """Make a user's instance; its init is a child of the caller. For processes with one thread.

    `masks`: the mask tree (masks.py) for each engine. `job`: layers in place of the environment's
    own, `environment` is None then. `lasting`: it lives until it is killed, with members or not.
    The caller calls `release` when it has told of the instance, and `settle` when there is time.
    Raises Denied where only the user can make it, EngineProblem, EnvironmentProblem,
    InstanceProblem, plan.PlanProblem, OSError.
    """
    settings = settings or Settings()
    own = environment.settings if environment is not None else None
    if engine == "auto":
        engine = own.engine if own is not None and own.engine != "auto" else settings.engine
    if environment is not None and not os.access(".", os.W_OK, dir_fd=environment.fd):
        # Overlayfs, and sdeefs as root's server, would write upper with root's rights.
        problem = EngineProblem if engine == engines.KERNEL else Denied
        raise problem(
            f"{environment.path}: root may not write there (NFS's root_squash): the daemon needs "
            "[environments] store on another filesystem; sdee without it (--rootless) doesn't"
        )
    maps = id_maps(user)
    made_plan = _plan(user, settings, [*settings.binds, *(own.binds if own else ()), *binds])
    volatile = settings.volatile if own is None or own.volatile is None else own.volatile
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as mounts:
        lock = None
        if environment is not None:
            name = environment.name
            with as_user(user):
                lock = _lock(environment)
            stack.callback(os.close, lock)
        with as_user(user):
            tops = _open_tops(environment, job, stack)
        kind = (user, maps, settings.namespaces)
        spare = _take_spare(kind) or _make_spare(kind)
        unless_used = stack.enter_context(contextlib.ExitStack())
        unless_used.callback(spare.discard)
        spare.begin(made_plan)
        merged = engines.pick(
            engine,
            {
                engines.KERNEL: lambda: _kernel(
                    made_plan.overlays, tops, (masks or {}).get("kernel"), maps, user, volatile
                ),
                engines.FUSE: lambda: _fuse(
                    made_plan.overlays, tops, (masks or {}).get("fuse"), maps, user, volatile
                ),
            },
        )
        mounts.callback(merged.close)
        private: dict[str, int] = {}
        if environment is not None:
            with as_user(user):
                opened = environment.open_private(made_plan)
            for key, fd in opened.items():
                mounts.callback(os.close, fd)
                private[key] = clone_private(fd)
                mounts.callback(os.close, private[key])
        extra, files, links = _daemon_inside(name, mounts)
        guard = settings.guard()
        recipe = Recipe(
            name=name,
            plan=made_plan,
            material=Material(merged.mounts, private, extra, files, links),
            guard=guard,
            servers=merged.servers,
            lock=lock,
            lasting=lasting,
            namespaces=settings.namespaces,
        )
        unless_used.pop_all()
        pid = spare.become(recipe)
        # The kernel takes its time to close mounts that are attached nowhere.
        _next.closing = mounts.pop_all()
        _next.kind, _next.engine = kind, merged.engine
        servers = [pid_ for pid_, _ in merged.servers]
        manager = workload.workload()
        join: dict[str, object] = {
            **guard.as_json(),
            "namespaces": list(settings.namespaces),
            "environment": dict(manager.environment()) if manager is not None else {},
        }
        return Instance(pid, merged.engine, servers, join)


#: Whose init it is, its maps, and its private namespaces beside the usual.
_Kind = tuple[Account, IdMaps, tuple[str, ...]]


@dataclass
class _Next:
    """What is left over from the last instance, and what stands ready for the next."""

    closing: contextlib.ExitStack | None = None
    kind: _Kind | None = None
    spare: tuple[_Kind, Spare] | None = None
    engine: str = ""
    server: engines.SpareServer | None = None


_next = _Next()


def release() -> None:
    """Close what the last instance was made of: it has it now."""
    if _next.closing is not None:
        _next.closing.close()
        _next.closing = None


def settle() -> None:
    """Have an init and a server ready for another instance. Raises OSError, InstanceProblem."""
    if _next.kind is not None and _next.spare is None:
        _next.spare = (_next.kind, _make_spare(_next.kind))
    if _next.engine == engines.FUSE and _next.server is None:
        _next.server = engines.SpareServer()
    _next.kind, _next.engine = None, ""


def discard_spares() -> None:
    """End what stands ready."""
    if _next.spare is not None:
        _next.spare[1].discard()
        _next.spare = None
    if _next.server is not None:
        _next.server.discard()
        _next.server = None


def _make_spare(kind: _Kind) -> Spare:
    """An init to be. Its owner, who may join its namespaces, is the user. Raises InstanceProblem."""
    user, maps, namespaces = kind
    with as_user(user):
        return prepare(True, lambda pid: _write_maps(pid, maps), namespaces)


def _take_spare(kind: _Kind) -> Spare | None:
    """The one that stands ready, if it is of this kind and still there."""
    if _next.spare is None:
        return None
    found, spare = _next.spare
    _next.spare = None
    if found == kind and spare.alive():
        return spare
    spare.discard()
    return None


def _take_server() -> engines.SpareServer | None:
    """The server that stands ready, if it is still there."""
    server, _next.server = _next.server, None
    if server is None or server.alive():
        return server
    server.discard()
    return None


def _write_maps(pid: int, maps: IdMaps) -> None:
    """As root, though the caller acts as the user just now."""
    euid, egid = os.geteuid(), os.getegid()
    os.seteuid(0)
    os.setegid(0)
    try:
        write_id_maps(pid, *maps)
    finally:
        os.setegid(egid)
        os.seteuid(euid)


_last_plan: tuple[object, plan.Plan] | None = None


def _plan(user: Account, settings: Settings, binds: Sequence[str]) -> plan.Plan:
    """The plan of an instance; the last one where nothing that it is made from has changed."""
    global _last_plan
    with open("/proc/self/mountinfo", "rb") as file:
        mountinfo = file.read()
    wanted = [plan.parse_bind(text) for text in binds]
    manager = workload.workload()
    if manager is not None:
        wanted += [
            plan.Bind(os.fsencode(b.source), os.fsencode(b.target), b.readonly)
            for b in manager.binds()
        ]
    # On a host with a hundred mounts this is a good part of an instance's making.
    key = (mountinfo, user, settings, wanted)
    if _last_plan is None or _last_plan[0] != key:
        mounts = [parse_line(line) for line in mountinfo.splitlines(keepends=True)]
        files = {m.point for m in mounts if plan.below(m.point, b"/etc") and _is_file(m.point)}
        _last_plan = (key, plan.make_plan(mounts, files, user, settings, wanted))
    return _last_plan[1]


def _is_file(point: bytes) -> bool:
    try:
        return not os.path.isdir(point)
    except OSError:
        return False


def _lock(environment: Environment) -> int:
    deadline = time.monotonic() + _ENDING
    while True:
        fd = environments.try_lock(environment)
        if fd is not None:
            environment.remove_record()
            return fd
        if time.monotonic() > deadline:
            raise Busy(
                f"{environment.name} is alive elsewhere, or being changed: without this daemon, "
                "or on another node"
            )
        time.sleep(0.005)


@dataclass
class Tops:
    """The tops of the user's layers, as descriptors."""

    lowers: list[int]
    upper: int
    place: int  # where work directories are


def _open_tops(
    environment: Environment | None, job: JobLayers | None, stack: contextlib.ExitStack
) -> Tops:
    def kept(fd: int) -> int:
        stack.callback(os.close, fd)
        return fd

    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    if job is not None:
        place = kept(os.open(job.place, flags))
        try:
            os.mkdir("upper", 0o755, dir_fd=place)
            os.chmod("upper", 0o755, dir_fd=place)
        except FileExistsError:
            pass
        upper = kept(os.open("upper", flags | os.O_NOFOLLOW, dir_fd=place))
        return Tops([kept(os.open(p, flags)) for p in job.lowers], upper, place)
    assert environment is not None
    return Tops([], kept(environment.directory("upper")), environment.fd)


def _parts(point: bytes, tops: Tops, merged: Merged, user: Account) -> tuple[list[int], int, int]:
    """(generations, upper, work) for one mount point, kept in `merged`; upper -1: none."""
    with as_user(user):
        upper = layers.upper_part(tops.upper, point)
        if upper is None:
            return [], -1, -1
        merged.fds.append(upper)
        work = layers.work_part(tops.place, point)
        merged.fds.append(work)
        lowers = []
        for top in tops.lowers:
            fd = layers.part_of(top, point)
            if fd is not None:
                merged.fds.append(fd)
                lowers.append(fd)
    return lowers, upper, work


def _bare(point: bytes) -> int:
    """A detached clone of the filesystem mounted at `point`, without what is mounted below."""
    flags = sc.OPEN_TREE_CLONE | sc.OPEN_TREE_CLOEXEC
    try:
        return sc.open_tree(sc.AT_FDCWD, point, flags)
    except OSError as error:
        raise EngineProblem(f"{os.fsdecode(point)}: {error.strerror}") from None


def _shifted(point: bytes, maps: IdMaps) -> int:
    """`_bare`, with the ids of the host's files shown as those of the instance."""
    fd = _bare(point)
    try:
        key = ("userns", maps)
        if key not in _caches:
            _caches[key] = user_namespace(*lower_maps(maps))
        sc.mount_setattr(
            fd, b"", sc.AT_EMPTY_PATH, attr_set=sc.MOUNT_ATTR_IDMAP, userns_fd=_caches[key]
        )
    except OSError as error:
        os.close(fd)
        raise EngineProblem(
            f"{os.fsdecode(point)}: its filesystem can't be id-mapped: {error.strerror}"
        ) from None
    return fd


def _mask_layer(tree: str, maps: IdMaps | None) -> int:
    """The open mask layer; kept for the next instance of the same user."""
    from sdee_launch import masks

    key = ("mask", tree, maps)
    if key not in _caches:
        for old in [k for k in _caches if isinstance(k, tuple) and k[0] == "mask"]:
            if old[2] == maps:
                os.close(_caches.pop(old))
        _caches[key] = masks.open_layer(tree, *lower_maps(maps)) if maps else masks.open_layer(tree)
    return _caches[key]


def _mask_part(tree: str | None, maps: IdMaps | None, point: bytes, merged: Merged) -> list[int]:
    from sdee_launch import masks

    if tree is None:
        return []
    part = masks.sub_layer(_mask_layer(tree, maps), point)
    if part is None:
        return []
    merged.fds.append(part)
    return [part]


def _kernel(
    points: Sequence[bytes],
    tops: Tops,
    mask: str | None,
    maps: IdMaps,
    user: Account,
    volatile: bool,
) -> Merged:
    merged = Merged(engines.KERNEL)
    try:
        for point in points:
            lowers, upper, work = _parts(point, tops, merged, user)
            if upper < 0:
                continue
            masked = _mask_part(mask, maps, point, merged)
            lower = _shifted(point, maps)
            merged.fds.append(lower)
            if lowers:
                # A generation lies below / itself, and overlayfs takes no lower that is inside
                # another one (ELOOP). An overlay of the host's layers is a filesystem apart.
                lower = engines.kernel_read_only(point, (*masked, lower))
                merged.fds.append(lower)
            else:
                lowers = masked
            mount = engines.kernel_overlay(Layers(point, (*lowers, lower), upper, work), volatile)
            merged.mounts.append((point, mount))
            # Overlayfs makes work/work as root's; the user must be able to remove it one day.
            with contextlib.suppress(OSError):
                os.chown("work", user.uid, user.gid, dir_fd=work, follow_symlinks=False)
        return merged
    except BaseException:
        merged.close()
        raise


def _fuse(
    points: Sequence[bytes],
    tops: Tops,
    mask: str | None,
    maps: IdMaps,
    user: Account,
    volatile: bool,
) -> Merged:
    merged = Merged(engines.FUSE)
    words = [
        engines.id_map_option("lower_uidmap", maps[0]),
        engines.id_map_option("lower_gidmap", maps[1]),
        "secrets=" + ":".join(str(n) for n in (user.uid, user.gid, *user.groups)),
    ]
    if volatile:
        words.append("volatile")
    try:
        for point in points:
            lowers, upper, work = _parts(point, tops, merged, user)
            if upper < 0:
                continue
            own = [f"unmapped_lowers={len(lowers)}"] if lowers else []
            lowers += _mask_part(mask, None, point, merged)
            lower = _bare(point)
            merged.fds.append(lower)
            mount, pid, pidfd = engines.fuse_mount(
                Layers(point, (*lowers, lower), upper, work),
                [*words, *own],
                fork=True,
                spare=_take_server(),
            )
            merged.mounts.append((point, mount))
            merged.servers.append((pid, pidfd))
        return merged
    except BaseException:
        merged.close()
        raise


def _daemon_inside(
    name: str, stack: contextlib.ExitStack
) -> tuple[list[tuple[bytes, int]], dict[str, bytes], dict[str, str]]:
    """The daemon's socket, seen inside: a directory, for a new daemon makes a new socket in it."""
    files = {"sdee/inside": name.encode() + b"\n"}
    path = os.environ.get("SDEED_SOCKET") or protocol.SOCKET_PATH
    try:
        fd = sc.open_tree(
            sc.AT_FDCWD, os.path.dirname(path), sc.OPEN_TREE_CLONE | sc.OPEN_TREE_CLOEXEC
        )
    except OSError:
        return [], files, {}
    tight = sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV | sc.MOUNT_ATTR_NOEXEC
    sc.mount_setattr(fd, b"", sc.AT_EMPTY_PATH, attr_set=tight | sc.MOUNT_ATTR_RDONLY)
    # `assemble` closes it in the child; this copy is the maker's.
    stack.callback(os.close, fd)
    links = {"sdee/sdeed.sock": f"host/{os.path.basename(path)}"}
    return [(b"/run/sdee/host", fd)], files, links
