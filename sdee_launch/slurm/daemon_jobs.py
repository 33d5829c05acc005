"""The daemon's operations for jobs: submit, prepare, join, save, end.

What touches files of a user is done by node.py, in a process beside the user's keeper.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
from dataclasses import replace

import trio

from sdee_launch import environments, instances
from sdee_launch.daemon import Daemon
from sdee_launch.daemon_ops import STARTERS, Reply, Request, operation
from sdee_launch.daemon_requests import ENGINES, join_instance, owner_of
from sdee_launch.protocol import Refused
from sdee_launch.slurm import broadcast, filters, identity, records, sender

log = logging.getLogger("sdeed")

#: Seconds in which a generation must reach a node and be unpacked there.
PREPARE_SECONDS = 1800.0
#: Seconds between looks whether jobs that a crash interrupted are over.
LOOK_AGAIN = 20.0
#: The last reasons why jobs could not start here, newest last; for `sdee node`.
ERRORS: list[dict[str, object]] = []
#: Jobs whose instances are being made now; and whether their Epilog was here meanwhile.
_prepared_now: dict[int, bool] = {}

_NODE = "sdee_launch.slurm.node"


def _of_instance(daemon: Daemon, pid: int) -> instances.Record | None:
    """The live instance that a process is in."""
    try:
        namespace = os.stat(f"/proc/{pid}/ns/pid").st_ino
    except OSError:
        return None
    for record in daemon.registry.of():
        try:
            if os.stat(f"/proc/{record.init.pid}/ns/pid").st_ino == namespace:
                return record
        except OSError:
            continue
    return None


@operation("job-submit", seconds=PREPARE_SECONDS)
async def job_submit(daemon: Daemon, request: Request) -> Reply:
    """Take a snapshot of the caller's environment, for a job; what its Prolog is to know."""
    owner = await owner_of(request.uid)
    environment = request.get("environment", str)
    if not environments.valid_name(environment):
        raise Refused(environments.name_problem(environment), "bad-request")
    generation = request.get("generation", int, 0)
    inside = _of_instance(daemon, request.pid)
    if inside is not None and inside.uid == owner.uid and inside.job and not generation:
        # Submitted by a job: its own upper is private, and gone before the new job starts.
        known = records.read(inside.job)
        if known is not None and known.reference.partition("@")[0] == environment:
            return Reply({"variables": known.variables})
    reply, _ = await daemon.call(
        owner.uid,
        f"{_NODE}:submit",
        {
            "uid": owner.uid,
            "environment": environment,
            "generation": generation,
            "exclude": list(request.strings("exclude")),
            "transport": request.get("transport", str, ""),
            "outputs": list(request.strings("outputs")),
        },
    )
    result = _result(reply)
    variables = dict(_mapping(result["variables"]))
    engine = request.get("engine", str, "auto")
    if engine not in ENGINES:
        raise Refused(f"engine {engine[:40]!r}: one of {', '.join(ENGINES)}", "bad-request")
    if engine != "auto":
        variables["engine"] = engine
    if variables["transport"] == "sbcast":
        sender.promise(daemon, owner.uid, str(variables["identity"]), str(variables["source"]))
    if request.get("keep", bool, False):
        variables["keep"] = "1"
    return Reply({"variables": variables, "warning": result.get("warning", "")})


@operation("deploy-exclude")
async def deploy_exclude(daemon: Daemon, request: Request) -> Reply:
    """From inside an environment of the caller's: change what of it doesn't travel."""
    owner = await owner_of(request.uid)
    environment = request.get("environment", str)
    if not environments.valid_name(environment):
        raise Refused(environments.name_problem(environment), "bad-request")
    if owner.uid == 0:
        raise Refused("root has no environments: they are for users", "denied")
    reply, _ = await daemon.call(
        owner.uid,
        f"{_NODE}:exclude",
        {
            "uid": owner.uid,
            "environment": environment,
            "add": list(request.strings("add")),
            "remove": list(request.strings("remove")),
        },
    )
    return Reply({"patterns": reply.get("result")})


@operation("job-prepare", admin=True, seconds=PREPARE_SECONDS)
async def job_prepare(daemon: Daemon, request: Request) -> Reply:
    """From Prolog: bring the generation here and make the job's instance.

    A Prolog that takes too long is killed by Slurm: what was being made for it ends when it is there.
    """
    job = request.get("job", int)
    while job in _prepared_now:  # for an earlier run of it, which was requeued
        await trio.sleep(0.1)
    _prepared_now[job] = False
    try:
        reply = await _prepare(daemon, request, job)
        record = records.read(job)
        if _prepared_now[job] and record is not None:
            await _end(daemon, record)
            raise Refused(f"job {job} has ended meanwhile")
        return reply
    finally:
        del _prepared_now[job]


async def _prepare(daemon: Daemon, request: Request, job: int) -> Reply:
    uid = request.get("uid", int)
    node = request.get("node", str, os.uname().nodename)
    variables = {name: str(value) for name, value in _mapping(request.fields.get("wanted")).items()}
    reference = variables.get("ref", "")
    record = records.Record(job, uid, reference, node=node, variables=variables)
    started = time.monotonic()
    try:
        owner = await owner_of(uid)
        if owner.uid == 0:
            raise Refused("root has no environments: they are for users", "denied")
        reply, _ = await daemon.call(
            uid, f"{_NODE}:prepare", {"uid": uid, "job": job, "variables": variables}
        )
        prepared = _result(reply)
        record = replace(
            record, place=str(prepared["place"]), deployed=_integer(prepared["bytes"]),
            keep=variables.get("keep") == "1",
        )  # fmt: skip
        live, fds = await join_instance(
            daemon, owner, reference.partition("@")[0], variables.get("engine", "auto"),
            binds=_strings(prepared.get("binds")), job=job, options=_mapping(prepared["options"]),
        )  # fmt: skip
        for fd in fds:
            os.close(fd)
        record = replace(
            record, init=live.init.pid, started=live.init.start, engine=live.engine,
            seconds=round(time.monotonic() - started, 3),
        )  # fmt: skip
    except (Refused, OSError, KeyError) as error:
        reason = str(error)
        log.error("job %d of uid %d: %s", job, uid, reason)
        ERRORS.append({"job": job, "uid": uid, "time": time.time(), "reason": reason})
        del ERRORS[:-20]
        failed = replace(record, failure=reason or type(error).__name__)
        await trio.to_thread.run_sync(records.write, failed)
        if failed.place:
            await daemon.call(uid, f"{_NODE}:clear", {"uid": uid, "job": job})
        raise Refused(reason) from None
    await trio.to_thread.run_sync(records.write, record)
    try:
        await daemon.call(uid, f"{_NODE}:report", {"uid": uid, "job": job})
    except Refused as error:  # the list of jobs is a comfort, no job fails for it
        log.warning("job %d: no report: %s", job, error)
    return Reply({"engine": record.engine, "bytes": record.deployed, "seconds": record.seconds})


@operation("job-join", admin=True)
async def job_join(daemon: Daemon, request: Request) -> Reply:
    """From the plugin, for a step: the job's namespaces, and what its tasks must give up."""
    job = request.get("job", int)
    record = records.read(job)
    if record is None:
        raise Refused(f"job {job} has no environment on this node", "missing")
    if record.failure:
        raise Refused(f"{record.node}: {record.failure}")
    process = instances.Process(record.init, record.started)
    fds = instances.namespaces(process)
    if fds is None:
        raise Refused(f"the instance of the environment on {record.node} has ended", "missing")
    live = daemon.registry.get(record.uid, f"job-{job}") or daemon.registry.get(
        record.uid, f"job={job}"
    )
    guard = filters.of(live.extra if live is not None else {})
    if guard.seccomp:
        fds.append(filters.descriptor(guard))
    variables = {
        **identity.environment(),
        "SDEE_ENVIRONMENT": record.reference.partition("@")[0],
        "SDEE_GENERATION": record.reference.partition("@")[2],
        "SDEE_JOB": str(job),
    }
    return Reply(
        {
            "fds": ["user", "mnt", "pid", "root", "seccomp"][: len(fds)],
            "bounding": f"{guard.capabilities:x}",
            "no_new_privs": "1" if guard.no_new_privs else "0",
            "environment": "\n".join(f"{name}={value}" for name, value in variables.items()),
        },
        fds,
    )


@operation("job-save", seconds=PREPARE_SECONDS)
async def job_save(daemon: Daemon, request: Request) -> Reply:
    """Make a new generation of what the caller's job has, as it is now on this node."""
    job = request.get("job", int, 0)
    if not job:
        inside = _of_instance(daemon, request.pid)
        job = inside.job if inside is not None else 0
    record = records.read(job) if job else None
    if record is None or request.uid not in (0, record.uid):
        raise Refused("no job of yours with an environment is on this node", "missing")
    if record.failure:
        raise Refused(f"job {job} has no instance here: {record.failure}")
    reply, _ = await daemon.call(record.uid, f"{_NODE}:save", {"job": job})
    return Reply(_result(reply))


@operation("job-end", admin=True, seconds=PREPARE_SECONDS)
async def job_end(daemon: Daemon, request: Request) -> Reply:
    """From Epilog: end the instance and remove what the job wrote. Twice is harmless."""
    job = request.get("job", int)
    if job in _prepared_now:
        _prepared_now[job] = True
    record = records.read(job)
    if record is None:
        return Reply({})
    saved: dict[str, object] = {}
    problem = ""
    if record.keep and not record.failure:
        try:
            saved = _result((await daemon.call(record.uid, f"{_NODE}:save", {"job": job}))[0])
        except Refused as error:
            problem = str(error)
            ERRORS.append({"job": job, "uid": record.uid, "time": time.time(), "reason": problem})
    await _end(daemon, record)
    if problem:
        raise Refused(f"what job {job} wrote was not kept: {problem}")
    return Reply(saved)


async def _end(daemon: Daemon, record: records.Record) -> None:
    process = instances.Process(record.init, record.started)
    for live in daemon.registry.of(record.uid):
        if live.job == record.job:
            await daemon.end(live)
    if record.init:
        instances.kill(process)
    try:
        # A job that failed has no place, and may have left what came by sbcast.
        if record.place or record.job in broadcast.waiting():
            what: dict[str, object] = {"uid": record.uid, "job": record.job}
            await daemon.call(record.uid, f"{_NODE}:clear", what)
    except Refused as error:
        # The next start of sdeed tries again. Who has no record isn't kept for a job that is over.
        log.error("job %d: not all of it was removed: %s", record.job, error)
        reason = f"at its end: {error}"
        ERRORS.append({"job": record.job, "uid": record.uid, "time": time.time(), "reason": reason})
    await trio.to_thread.run_sync(records.forget, record.job)


@operation("job-node", admin=True)
async def job_node(daemon: Daemon, request: Request) -> Reply:
    """For `sdee node`: jobs on this node, caches, the last errors."""
    reply, _ = await daemon.call(0, f"{_NODE}:caches", {})
    return Reply(
        {
            "jobs": [records.as_json(record) for record in records.every()],
            "caches": reply["result"],
            "errors": list(ERRORS),
        }
    )


async def clean_up(daemon: Daemon) -> None:
    """At the daemon's start: what belongs to no job of this node's Slurm is removed.

    A crashed node lost its instances and /run with them; what a job wrote is still on disk.
    """
    for record in records.every():
        process = instances.Process(record.init, record.started)
        if not record.failure and not process_alive(process):
            # Slurm may still run the job: its next step must fail, not run outside.
            await trio.to_thread.run_sync(
                records.write, replace(record, failure="its instance ended with its daemon")
            )
    known = [record.job for record in records.every()]
    try:
        await daemon.call(0, f"{_NODE}:clear_others", {"known": known})
    except Refused as error:
        log.error("what crashed jobs left was not removed: %s", error)
    sender.start(daemon)
    if any(records.every()) or broadcast.waiting():
        daemon.nursery.start_soon(_end_jobs_without_epilog, daemon)


async def _end_jobs_without_epilog(daemon: Daemon) -> None:
    """Jobs that ended while there was no daemon: their Epilog found nobody to ask."""
    for record in list(records.every()):
        if await trio.to_thread.run_sync(over, record.job):
            try:
                await _end(daemon, record)
            except (Refused, OSError) as error:
                log.error("job %d: %s", record.job, error)
    # A place without a record may be that of a job whose Prolog still waits, or that runs elsewhere.
    while left := [job for job in broadcast.waiting() if records.read(job) is None]:
        for job in left:
            if await trio.to_thread.run_sync(over, job):
                await trio.to_thread.run_sync(broadcast.clear, job)
        await trio.sleep(LOOK_AGAIN)


def over(job: int) -> bool:
    """Whether Slurm says that a job has ended; not if Slurm says nothing."""
    try:
        done = subprocess.run(
            ["squeue", "-h", "-t", "all", "-j", str(job), "-o", "%T"],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return False
    if done.returncode:
        return "Invalid job id" in done.stderr
    live = {"PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "COMPLETING", "SIGNALING"}
    states = set(done.stdout.split())
    return not states & live


STARTERS.append(clean_up)


def process_alive(process: instances.Process) -> bool:
    """Whether it is still there."""
    fd = process.open()
    if fd is None:
        return False
    os.close(fd)
    return True


def _result(reply: dict[str, object]) -> dict[str, object]:
    return _mapping(reply.get("result"))


def _mapping(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise Refused("not an object", "bad-request")
    return value


def _strings(value: object) -> tuple[str, ...]:
    return tuple(str(x) for x in value) if isinstance(value, list) else ()


def _integer(value: object) -> int:
    return value if isinstance(value, int) else 0
