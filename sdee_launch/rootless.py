"""Without a daemon and without privilege: the caller makes the instance in a user namespace.

A child (the maker) leaves for a user namespace of its own, gets the caller's subordinate ids by
newuidmap(1) and newgidmap(1), or the one id that everybody may give, and there makes the merged
mounts and the instance. The maker then ends; init and the servers of sdeefs live on by themselves.

The kernel engine serves where it gives root's semantics, and that is where the lower's files belong
to ids that the namespace has: never over a host's /, whose files are nobody's here. sdeefs shows
them as root's (`squash_overflow`). Without subordinate ids root is the only id that there is.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from mount_helpers import syscalls as sc
from mount_helpers.mountinfo import read_mounts
from mount_helpers.namespaces import IdRange
from sdee_launch import config, engines, environments, instance, layers, membership, plan
from sdee_launch.accounts import Account, IdMaps, id_maps, my_account
from sdee_launch.assemble import Material, clone_private
from sdee_launch.engines import EngineProblem, Layers, Merged
from sdee_launch.environments import Environment, EnvironmentProblem
from sdee_launch.session import NotEntered, Target

_PATIENCE = 90.0
_PROGRAMS = ("newuidmap", "newgidmap")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Without subordinate ids root is the only id inside, and chown(2) to another one is EINVAL before
#: any filesystem hears of it. What makes apt and tar do without, for as far as they can.
_ONE_ID_FILES = {"sdee/apt.conf": b'APT::Sandbox::User "root";\n'}
_ONE_ID_VARIABLES = {"APT_CONFIG": "/run/sdee/apt.conf", "TAR_OPTIONS": "--no-same-owner"}
_ONE_ID = (
    "sdee: {} has root as its only id: chown to others fails; sdee doctor tells how to get more"
)


def find(environment: str, engine: str, binds: Sequence[str]) -> Target:
    """Join the live instance of an environment, or make it. Raises NotEntered."""
    if os.geteuid() == 0:
        raise NotEntered("root has no environments: they are for users")
    account = my_account()
    try:
        settings = config.load(account.home)
        with (
            environments.open_store(account, settings) as store,
            store.open(environment, create=True) as opened,
        ):
            return _join_or_make(account, settings, opened, engine, binds)
    except (EnvironmentProblem, config.ConfigError, plan.PlanProblem) as error:
        raise NotEntered(str(error)) from None
    except OSError as error:
        name = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        raise NotEntered(f"{name}{error.strerror or error}") from None


def _join_or_make(
    account: Account,
    settings: config.Settings,
    environment: Environment,
    engine: str,
    binds: Sequence[str],
) -> Target:
    deadline = time.monotonic() + _PATIENCE
    while True:
        lock = environments.try_lock(environment)
        if lock is not None:
            try:
                record = _make(account, settings, environment, engine, binds, lock)
            finally:
                os.close(lock)
        else:
            record = environment.read_record() or {}
            _check_fits(environment, record, engine, binds)
        try:
            return _join(environment.name, record)
        except membership.Ended:
            pass
        if time.monotonic() > deadline:
            node = record.get("node")
            where = f" on {node}" if node and node != os.uname().nodename else ""
            raise NotEntered(
                f"{environment.name} is in use{where}, and its instance can't be joined from here"
            )
        time.sleep(0.02)


def _check_fits(
    environment: Environment, record: dict[str, object], engine: str, binds: Sequence[str]
) -> None:
    if not _alive(record):
        return
    name = environment.name
    if engine not in ("auto", record.get("engine")):
        raise NotEntered(
            f"{name} is alive with the engine {record.get('engine')}; leave it first "
            f"(sdee kill {name})"
        )
    if binds and list(binds) != record.get("binds"):
        raise NotEntered(f"{name} is alive with other binds; leave it first (sdee kill {name})")


def start_time(pid: int) -> int:
    """When a process started, in ticks since boot; 0 if there is none, or none but its name."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rsplit(b")", 1)[1].split()
        return 0 if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return 0


def boot_id() -> str:
    """The number of this boot of this machine."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def alive_init(record: dict[str, object]) -> int:
    """The pid of the init that a record tells of, 0 if it is gone or on another node."""
    return int(str(record.get("init", 0))) if _alive(record) else 0


def _alive(record: dict[str, object]) -> bool:
    pid, started = record.get("init"), record.get("started")
    if not isinstance(pid, int) or not isinstance(started, int) or pid <= 1 or not started:
        return False
    return record.get("boot") == boot_id() and start_time(pid) == started


def _join(name: str, record: dict[str, object]) -> Target:
    """Raises membership.Ended."""
    pid = alive_init(record)
    if not pid:
        raise membership.Ended
    try:
        member = membership.hold(pid)
    except PermissionError:
        raise NotEntered(f"the instance of {name} was made by another account") from None
    join = record.get("join")
    join = join if isinstance(join, dict) else {}
    known = instance.Instance(pid, str(record.get("engine")), join=join)
    try:
        fds = known.descriptors()
    except OSError:
        os.close(member)
        raise membership.Ended from None
    return Target(name, {**fds, "member": member}, join)


def _make(
    account: Account,
    settings: config.Settings,
    environment: Environment,
    engine: str,
    binds: Sequence[str],
    lock: int,
) -> dict[str, object]:
    """Have a maker make the instance; gives its record. Raises NotEntered."""
    environment.remove_record()
    own = environment.settings
    if engine == "auto":
        engine = own.engine if own.engine != "auto" else settings.engine

    def work(maps: IdMaps) -> dict[str, object]:
        return _in_maker(account, settings, environment, engine, binds, lock, len(maps[0]) == 1)

    record = in_user_namespace(account, work)
    if "error" in record:
        raise NotEntered(str(record["error"]))
    if record.pop("one_id", False) and os.isatty(2):
        print(_ONE_ID.format(environment.name), file=sys.stderr)
    record.update(
        {
            "started": start_time(int(str(record["init"]))),
            "boot": boot_id(),
            "node": os.uname().nodename,
            "binds": list(binds),
            "since": time.time(),
        }
    )
    environment.write_record(record)
    return record


def in_user_namespace(
    account: Account,
    work: Callable[[IdMaps], dict[str, object]],
    seconds: float | None = _PATIENCE,
) -> dict[str, object]:
    """Run `work` in a child that is root of a user namespace with the account's ids; its answer.

    The child has a mount namespace of its own. What goes wrong is told as {"error": …}.
    Raises NotEntered if there can't be such a namespace.
    """
    ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
    go_read, go_write = os.pipe2(os.O_CLOEXEC)
    told_read, told_write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        os.close(ready_read)
        os.close(go_write)
        os.close(told_read)
        _maker(account, work, ready_write, go_read, told_write)
    for fd in (ready_write, go_read, told_write):
        os.close(fd)
    text = b""
    try:
        word = os.read(ready_read, 64)
        if word != b"0":
            number = int(word or b"5")
            raise NotEntered(
                f"a user namespace: {os.strerror(number)} (user.max_user_namespaces, "
                "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns: "
                "sdee doctor tells more)"
            )
        maps = _give_ids(pid, account)
        os.write(go_write, json.dumps([[list(_plain(r)) for r in m] for m in maps]).encode())
        os.close(go_write)
        go_write = -1
        text = _read_all(told_read, seconds)
    finally:
        for fd in (ready_read, go_write, told_read):
            if fd >= 0:
                os.close(fd)
        if not text:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    try:
        answer = json.loads(text)
    except ValueError:
        return {"error": "the process that makes instances died"}
    return answer if isinstance(answer, dict) else {}


def _plain(r: IdRange) -> tuple[int, int, int]:
    return r.inside, r.outside, r.count


def _read_all(fd: int, seconds: float | None) -> bytes:
    deadline = None if seconds is None else time.monotonic() + seconds
    text = b""
    while not text.endswith(b"\n"):
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([fd], [], [], left)[0]:
            raise NotEntered(f"not ready within {seconds:g} s")
        part = os.read(fd, 65536)
        if not part:
            break
        text += part
    return text


def _give_ids(pid: int, account: Account) -> IdMaps:
    """Write the maps of the maker: with subordinate ids, where that works."""
    maps = id_maps(account)
    if len(maps[0]) > 1 and len(maps[1]) > 1 and all(_program(p) for p in _PROGRAMS):
        for name, ranges in zip(_PROGRAMS, maps, strict=True):
            words = [str(n) for r in ranges for n in _plain(r)]
            program = _program(name)
            assert program is not None
            child = os.posix_spawn(program, [name, str(pid), *words], os.environ)
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
                raise NotEntered(f"{name} refused {' '.join(words)}: see /etc/subuid, /etc/subgid")
        return maps
    single = (IdRange(0, account.uid, 1),), (IdRange(0, account.gid, 1),)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {os.getuid()} 1"),
        ("gid_map", f"0 {os.getgid()} 1"),
    ):
        with open(f"/proc/{pid}/{name}", "w") as file:
            file.write(text)
    return single


def _program(name: str) -> str | None:
    for place in (os.environ.get("PATH", "") + ":" + _PATH).split(":"):
        path = os.path.join(place or "/", name)
        if os.access(path, os.X_OK):
            return path
    return None


def _maker(
    account: Account,
    work: Callable[[IdMaps], dict[str, object]],
    ready: int,
    go: int,
    told: int,
) -> NoReturn:
    try:
        try:
            sc.unshare(sc.CLONE_NEWUSER | sc.CLONE_NEWNS)
        except OSError as error:
            os.write(ready, str(error.errno).encode())
            os._exit(1)
        os.write(ready, b"0")
        text = os.read(go, 1 << 16)
        if not text:
            os._exit(1)
        maps = tuple(tuple(IdRange(*r) for r in m) for m in json.loads(text))
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        # Whatever happens on the terminal, the instance isn't this session's.
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        answer = work(maps)  # type: ignore[arg-type]
    except NotEntered as error:
        answer = {"error": str(error)}
    except OSError as error:
        name = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        answer = {"error": f"{name}{error.strerror or error}"}
    except Exception as error:
        traceback.print_exc()
        answer = {"error": f"{type(error).__name__}: {error}"}
    try:
        os.write(told, json.dumps(answer).encode() + b"\n")
    finally:
        os._exit(0)


def _in_maker(
    account: Account,
    settings: config.Settings,
    environment: Environment,
    engine: str,
    binds: Sequence[str],
    lock: int,
    one_id: bool,
) -> dict[str, object]:
    """As root of the new user namespace: the merged mounts and the instance."""
    try:
        mounts = read_mounts()
        files = {
            m.point for m in mounts if plan.below(m.point, b"/etc") and not os.path.isdir(m.point)
        }
        wanted = [*settings.binds, *environment.settings.binds, *binds]
        made_plan = plan.make_plan(
            mounts, files, account, settings, [plan.parse_bind(b) for b in wanted]
        )
        sc.mount(None, "/", None, sc.MS_REC | sc.MS_SLAVE)
        volatile = settings.volatile or bool(environment.settings.volatile)
        # Its descriptors must be of this mount namespace, not of the one that was left.
        fd = os.open(environment.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        here = Environment(environment.name, fd, environment.path, environment.settings)
        merged = engines.pick(
            engine,
            {
                engines.KERNEL: lambda: _kernel(made_plan.overlays, here, volatile),
                engines.FUSE: lambda: _fuse(made_plan.overlays, here, volatile, _make_mask(here)),
            },
        )
        private = {k: clone_private(v) for k, v in here.open_private(made_plan).items()}
        guard = settings.guard()
        written = {"sdee/inside": environment.name.encode() + b"\n"}
        if one_id:
            written.update(_ONE_ID_FILES)
        recipe = instance.Recipe(
            name=environment.name,
            plan=made_plan,
            material=Material(merged.mounts, private, files=written),
            guard=guard,
            servers=merged.servers,
            lock=lock,
            namespaces=settings.namespaces,
        )
        try:
            pid = instance.create(recipe, False, None)
        except BaseException:
            merged.close()
            for server, _ in merged.servers:
                os.kill(server, signal.SIGKILL)
            raise
    except (
        EngineProblem, EnvironmentProblem, instance.InstanceProblem, plan.PlanProblem,
    ) as error:  # fmt: skip
        raise NotEntered(str(error)) from None
    return {
        "init": pid,
        "engine": merged.engine,
        "one_id": one_id,
        "servers": [server for server, _ in merged.servers],
        "join": {
            **guard.as_json(),
            "namespaces": list(settings.namespaces),
            "environment": _ONE_ID_VARIABLES if one_id else {},
        },
    }


def _layers_of(point: bytes, environment: Environment, merged: Merged) -> Layers | None:
    top = environment.directory("upper")
    try:
        upper = layers.upper_part(top, point)
    finally:
        os.close(top)
    if upper is None:
        return None
    merged.fds.append(upper)
    work = layers.work_part(environment.fd, point)
    merged.fds.append(work)
    try:
        # Not below: what is mounted there comes by itself. Locked together with what is mounted
        # on it, a clone of / alone is refused; then the directory itself, as it is.
        lower = sc.open_tree(sc.AT_FDCWD, point, sc.OPEN_TREE_CLONE | sc.OPEN_TREE_CLOEXEC)
    except OSError:
        lower = os.open(point, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    merged.fds.append(lower)
    return Layers(point, (lower,), upper, work)


def _kernel(points: Sequence[bytes], environment: Environment, volatile: bool) -> Merged:
    merged = Merged(engines.KERNEL)
    try:
        for point in points:
            found = _layers_of(point, environment, merged)
            if found is None:
                continue
            if os.stat(point).st_uid != 0:
                raise EngineProblem(
                    f"the files of {os.fsdecode(point)} are the host root's, whom a user "
                    "namespace can't stand for: sdeefs can (--engine fuse), or sdeed"
                )
            merged.mounts.append((point, engines.kernel_overlay(found, volatile)))
        return merged
    except BaseException:
        merged.close()
        raise


def _make_mask(environment: Environment) -> int:
    """A layer with stand-ins for what the user can't read and package tools need; the caller's.

    As the site's masks have it, of which sdeefs wants only these.
    """
    from sdee_launch import stand_ins

    mask = environment.directory("mask", create=0o755)
    for path in stand_ins.known():
        shown = os.path.join(b"/", path)
        if os.access(shown, os.R_OK) or not os.path.lexists(shown):
            continue
        content = stand_ins.content(path) or b""
        *parents, name = path.split(b"/")
        at = os.dup(mask)
        above = b""
        for part in parents:
            above += b"/" + part
            try:
                os.mkdir(part, 0o755, dir_fd=at)
            except FileExistsError:
                pass
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = below
            os.fchmod(at, os.stat(above).st_mode & 0o1777)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(name, flags, 0o640, dir_fd=at)
            os.write(fd, content)
            os.close(fd)
        except FileExistsError:
            pass
        os.close(at)
    return mask


def _fuse(points: Sequence[bytes], environment: Environment, volatile: bool, mask: int) -> Merged:
    merged = Merged(engines.FUSE, fds=[mask])
    # The ids of what lower has and we have no names for are nobody's: then the others' bits count.
    words = ["squash_overflow", "secrets=0:0"]
    if volatile:
        words.append("volatile")
    try:
        for point in points:
            found = _layers_of(point, environment, merged)
            if found is None:
                continue
            part = layers.part_of(mask, point)
            own = words
            if part is not None:
                merged.fds.append(part)
                found = Layers(point, (part, *found.lowers), found.upper, found.work)
                own = [*words, "unmapped_lowers=1"]
            mount, pid, pidfd = engines.fuse_mount(found, own)
            merged.mounts.append((point, mount))
            merged.servers.append((pid, pidfd))
        return merged
    except BaseException:
        for pid, _ in merged.servers:
            os.kill(pid, signal.SIGKILL)
        merged.close()
        raise
