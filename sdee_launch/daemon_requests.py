"""What any user may ask of the daemon: join, ps, kill, status; and what root may: node.

A user is what SO_PEERCRED says, and every answer is about that user's own instances. Only root may
name another user (`uid`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import asdict

import trio

import sdeefs
from sdee_launch import instances, mask_live, masks, membership
from sdee_launch.accounts import Account, account_of
from sdee_launch.daemon import Daemon
from sdee_launch.daemon_ops import Reply, Request, operation
from sdee_launch.environments import name_problem, valid_name
from sdee_launch.instances import Process, Record
from sdee_launch.process_list import describe_process
from sdee_launch.protocol import Refused

VERSION = sdeefs.__version__
ENGINES = ("auto", "kernel", "fuse")


async def owner_of(uid: int) -> Account:
    """Look an account up, for at most ten seconds. Raises Refused if there is none."""
    try:
        with trio.fail_after(10):
            return await trio.to_thread.run_sync(account_of, uid, abandon_on_cancel=True)
    except KeyError:
        raise Refused(f"uid {uid} has no account on this node", "denied") from None
    except trio.TooSlowError:
        raise Refused(f"the name service does not answer for uid {uid}") from None


async def join_instance(
    daemon: Daemon,
    owner: Account,
    environment: str,
    engine: str = "auto",
    binds: tuple[str, ...] = (),
    job: int = 0,
    options: dict[str, object] | None = None,
) -> tuple[Record, list[int]]:
    """The live instance of an environment, made if there is none, and its descriptors.

    `descriptor_names` says what they are; the last one is a membership, which keeps the instance
    alive while it is open. They are the caller's to close. With `job` it is that job's own
    instance. Raises Refused.
    """
    key = f"job={job}" if job else environment
    async with daemon.exclusive(owner.uid, key):
        while True:
            record = daemon.registry.get(owner.uid, key)
            made = record is None
            if record is None:
                record = await _make(daemon, owner, environment, engine, binds, job, options or {})
            fds = _descriptors(record)
            if fds is not None:
                if not made:
                    try:
                        _check_fits(record, engine, binds)
                    except Refused:
                        for fd in fds:
                            os.close(fd)
                        raise
                return record, fds
            # It is just ending: the next one must wait, or two would share an upper.
            if made:
                raise Refused(f"the instance of {environment} ended at once", "gone")
            await daemon.wait_ended(record)


def descriptor_names(record: Record) -> list[str]:
    """What the descriptors of `join_instance` are, in their order."""
    return ["user", "mnt", "pid", *_more(record), "root", "member"]


def _more(record: Record) -> list[str]:
    more = record.extra.get("namespaces")
    return [str(name) for name in more] if isinstance(more, list) else []


def _descriptors(record: Record) -> list[int] | None:
    """In the order of `descriptor_names`; None if the instance is gone or going."""
    pidfd = record.init.open()
    if pidfd is None:
        return None
    try:
        member = membership.hold(record.init.pid)
    except (membership.Ended, PermissionError):
        return None
    finally:
        os.close(pidfd)
    fds = instances.namespaces(record.init, _more(record))
    if fds is None:
        os.close(member)
        return None
    return [*fds, member]


def _check_fits(record: Record, engine: str, binds: tuple[str, ...]) -> None:
    if engine not in ("auto", record.engine):
        raise Refused(
            f"{record.environment} is alive with the engine {record.engine}; "
            f"leave it first (sdee kill {record.environment})",
            "busy",
        )
    if binds and binds != record.binds:
        raise Refused(
            f"{record.environment} is alive with other binds; leave it first "
            f"(sdee kill {record.environment})",
            "busy",
        )


async def _make(
    daemon: Daemon,
    owner: Account,
    environment: str,
    engine: str,
    binds: tuple[str, ...],
    job: int,
    options: dict[str, object],
) -> Record:
    if len(daemon.registry.of(owner.uid)) >= daemon.limits.instances:
        raise Refused(
            f"{daemon.limits.instances} instances are alive, the most that one user may have",
            "busy",
        )
    await daemon.secrets.ready.wait()
    gids = frozenset((owner.gid, *owner.groups))
    trees: dict[str, str] = {}
    try:
        for kind in (masks.KERNEL, masks.FUSE):
            known = daemon.masks.known_tree(owner.uid, gids, kind)
            if known is None:
                known = await trio.to_thread.run_sync(daemon.masks.tree, owner.uid, gids, kind)
            trees[kind] = known
        return await _make_with(daemon, owner, environment, engine, binds, job, options, trees)
    finally:
        for path in trees.values():
            daemon.masks.release(path)


async def _make_with(
    daemon: Daemon,
    owner: Account,
    environment: str,
    engine: str,
    binds: tuple[str, ...],
    job: int,
    options: dict[str, object],
    trees: dict[str, str],
) -> Record:
    reply, fds = await daemon.ask_keeper(
        owner.uid,
        {
            "do": "make",
            "owner": asdict(owner),
            "environment": environment,
            "engine": engine,
            "binds": list(binds),
            "masks": trees,
            "job": job,
            **options,
        },
    )
    for fd in fds:
        os.close(fd)
    pid, chosen, servers = reply["init"], str(reply["engine"]), reply.get("servers")
    if not isinstance(pid, int):
        raise Refused(f"the instance of {environment} was not made")
    start = instances.start_time(pid)
    if start is None:
        raise Refused(f"the instance of {environment} ended at once", "gone")
    extra = reply.get("join")
    record = Record(
        uid=owner.uid,
        environment=environment,
        init=Process(pid, start),
        engine=chosen,
        mask=trees[masks.FUSE if chosen == "fuse" else masks.KERNEL],
        binds=binds,
        servers=tuple(_processes(servers)),
        made_at=time.time(),
        job=job,
        extra=extra if isinstance(extra, dict) else {},
    )
    await daemon.keep(record)
    if not daemon.masks.in_force(record.mask):  # another scan, while it was being made
        gids = (owner.gid, *owner.groups)
        with contextlib.suppress(OSError):  # hidden it is, but for names in the cache
            await trio.to_thread.run_sync(mask_live.hide, daemon.masks, record, gids)
    return record


def _processes(pids: object) -> list[Process]:
    found = []
    for pid in pids if isinstance(pids, list) else []:
        start = instances.start_time(int(pid))
        if start is not None:
            found.append(Process(int(pid), start))
    return found


def _subject(request: Request) -> int | None:
    """Whose instances a request is about; None: everybody's."""
    wanted = request.fields.get("uid")
    if wanted is None or wanted == request.uid:
        return None if request.uid == 0 and wanted is None else request.uid
    if request.uid != 0:
        raise Refused("only root may ask about others", "denied")
    return request.get("uid", int)


def _environment(request: Request) -> str:
    name = request.get("env", str, "default")
    if not valid_name(name):
        raise Refused(name_problem(name), "bad-request")
    return name


@operation("join")
async def join(daemon: Daemon, request: Request) -> Reply:
    """The descriptors of the caller's instance of an environment: user, mnt, pid, root."""
    name = _environment(request)
    engine = request.get("engine", str, "auto")
    if engine not in ENGINES:
        raise Refused(f"engine {engine[:40]!r}: one of {', '.join(ENGINES)}", "bad-request")
    owner = await owner_of(request.uid)
    if owner.uid == 0:
        raise Refused("root has no environments: they are for users", "denied")
    record, fds = await join_instance(
        daemon, owner, name, engine, request.strings("binds", most=64)
    )
    return Reply(
        {
            **record.extra,
            "env": record.environment,
            "engine": record.engine,
            "init": record.init.pid,
            "fds": descriptor_names(record),
        },
        fds,
    )


@operation("ps")
async def ps(daemon: Daemon, request: Request) -> Reply:
    """Live instances and their processes."""
    subject = _subject(request)

    def look() -> list[dict[str, object]]:
        return [describe(record) for record in records]

    records = daemon.registry.of(subject)
    return Reply({"instances": await trio.to_thread.run_sync(look)})


def describe(record: Record) -> dict[str, object]:
    """An instance with its processes, as `ps` and `node` tell it."""
    return {
        "env": record.environment,
        "uid": record.uid,
        "engine": record.engine,
        "job": record.job,
        "since": record.made_at,
        "init": record.init.pid,
        "servers": [server.pid for server in record.servers],
        "processes": [p for p in map(describe_process, instances.members(record.init)) if p],
    }


@operation("kill")
async def kill(daemon: Daemon, request: Request) -> Reply:
    """End an instance (`env`, or `job`), or signal one of its processes (`pid`, `signal`)."""
    subject = _subject(request)
    if subject is None:
        subject = 0
    job = request.get("job", int, 0)
    name = f"job={job}" if job else _environment(request)
    record = daemon.registry.get(subject, name)
    if record is None:
        raise Refused(f"{name} is not alive on this node", "missing")
    pid = request.get("pid", int, 0)
    if not pid:
        await daemon.end(record)
        return Reply({"ended": record.environment})
    number = request.get("signal", int, int(signal.SIGTERM))
    if not 0 < number < signal.NSIG:
        raise Refused(f"{number} is no signal", "bad-request")
    start = instances.start_time(pid)
    if start is None or pid not in instances.members(record.init):
        raise Refused(f"{pid} is no process of {name}", "missing")
    instances.kill(Process(pid, start), number)
    return Reply({"signalled": pid})


@operation("status")
async def status(daemon: Daemon, request: Request) -> Reply:
    """What the caller may know of the daemon."""
    return Reply(
        {
            "version": VERSION,
            "pid": os.getpid(),
            "up": time.time() - daemon.started_at,
            "instances": [record.key[1] for record in daemon.registry.of(request.uid)],
            "masks": daemon.masks.complete,
        }
    )


@operation("node", admin=True, seconds=300)
async def node(daemon: Daemon, request: Request) -> Reply:
    """For root: all instances, the masks, counters; with `rescan` a scan for secrets first."""
    if request.get("rescan", bool, False):
        await daemon.rescan()
    records = daemon.registry.of()
    described = await trio.to_thread.run_sync(lambda: [describe(r) for r in records])
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    return Reply(
        {
            "version": VERSION,
            "pid": os.getpid(),
            "up": time.time() - daemon.started_at,
            "instances": described,
            "masks": {
                "complete": daemon.masks.complete,
                "age": now - daemon.masks.scanned_at if daemon.masks.complete else None,
            },
            "requests": dict(daemon.counts),
        }
    )
