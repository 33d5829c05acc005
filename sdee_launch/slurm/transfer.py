"""Between a job and sdee_launch.deploy: how a generation is published, fetched, let go and saved.

`shared`: the state directory lies where all nodes see it; each node reads what it lacks. `sbcast`:
it lies on the login node, whose daemon sends one file to all nodes of a job (broadcast.py).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdee_launch import environments
from sdee_launch.accounts import Account, account_of
from sdee_launch.config import ENGINES, Settings
from sdee_launch.deploy import api, cache, places
from sdee_launch.deploy.errors import DeployProblem
from sdee_launch.deploy.generations import State
from sdee_launch.deploy.inside import run_inside
from sdee_launch.environments import EnvironmentSettings, NoSuchEnvironment
from sdee_launch.plan import PlanProblem, parse_bind
from sdee_launch.site import as_user
from sdee_launch.slurm import broadcast
from sdee_launch.slurm.records import Record

#: A package of more than this is worth a word, where the site doesn't say `[deploy] warn_size`.
WARN_SIZE = "1G"
#: Of an environment's binds: how many may travel, as many as a login may ask for, and their bytes as
#: a variable of the job. (The plugin has room for twice as much.)
MOST_BINDS = 64
MOST_BYTES = 16_000


class TransferError(Exception):
    """Why a generation can't be published or fetched, in one line."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What the submit side tells the nodes, checked: it came through the user's hands."""

    environment: str
    generation: int
    identity: str
    source: str
    transport: str
    #: The environment's own when the job was submitted, as --bind has them.
    binds: tuple[str, ...] = ()

    def variables(self) -> dict[str, str]:
        """As they travel: Prolog sees SPANK_SDEE_REF and so on."""
        variables = {
            "ref": f"{self.environment}@{self.generation}",
            "identity": self.identity,
            "source": self.source,
            "transport": self.transport,
        }
        return {**variables, "binds": json.dumps(self.binds)} if self.binds else variables


def parse(variables: dict[str, str]) -> Reference:
    """The reverse of `Reference.variables`. Raises TransferError."""
    name, _, number = variables.get("ref", "").partition("@")
    transport = variables.get("transport", "shared")
    source = variables.get("source", "")
    if (
        not environments.valid_name(name)
        or not number.isdigit()
        or transport not in places.TRANSPORTS
    ):
        raise TransferError("what the job asks for isn't understood")
    if not source.startswith("/"):
        raise TransferError(f"{source[:80]!r} is no place of generations")
    binds = _parse_binds(variables.get("binds", "[]"))
    return Reference(name, int(number), variables.get("identity", ""), source, transport, binds)


def _parse_binds(text: str) -> tuple[str, ...]:
    """Binds that a node's daemon may be asked for, as it is by a login. Raises TransferError."""
    try:
        binds = json.loads(text) if len(text) <= MOST_BYTES else None
    except (ValueError, RecursionError):
        binds = None
    if not isinstance(binds, list) or not all(isinstance(bind, str) for bind in binds):
        raise TransferError("the binds that the job asks for aren't understood")
    return check_binds(binds)


def check_binds(binds: Sequence[str]) -> tuple[str, ...]:
    """The same, if a job may have them. Raises TransferError."""
    if len(binds) > MOST_BINDS or len(json.dumps(binds)) > MOST_BYTES:
        raise TransferError(
            f"{len(binds)} binds: more than {MOST_BINDS}, or too long ones, don't travel with a job"
        )
    try:
        for bind in binds:
            parse_bind(bind)
    except (PlanProblem, UnicodeError) as error:
        raise TransferError(str(error)) from None
    return tuple(binds)


def publish(
    account: Account,
    settings: Settings,
    environment: str,
    generation: int,
    exclude: list[str],
    transport: str,
) -> dict[str, object]:
    """A snapshot of an environment as it is now, or a generation that is there already.

    Raises TransferError, EnvironmentProblem.
    """
    site = [
        *settings.section("deploy").get("exclude", ()),
        *settings.section("jobs").get("exclude", ()),
    ]
    warning = ""
    try:
        way = places.transport(settings, transport)
        state = places.state_directory(account, settings, environment, way)
        upper, own = _present(account, settings, environment, bool(generation))
        binds = check_binds(own.binds)
        if generation:
            identity = run_inside(account, lambda: _known(state, generation))
        else:
            done = api.submit(
                account, upper, state, [*site, *own.exclude, *exclude],
                checksum=bool(settings.section("deploy").get("checksum", False)),
                level=int(settings.section("deploy").get("level", 3)),
            )  # fmt: skip
            identity, generation = done.identity, done.generation.number
            if not done.reused:
                warning = _warning(account, settings, environment, state, done.generation)
    except DeployProblem as error:
        raise TransferError(str(error)) from None
    reference = Reference(environment, generation, identity, state, way, binds)
    variables = {**reference.variables(), **_chosen(settings)}
    return {"variables": variables, "warning": warning}


def _present(
    account: Account, settings: Settings, environment: str, may_be_gone: bool
) -> tuple[str, EnvironmentSettings]:
    """The upper of an environment, and what its owner chose for it. Raises EnvironmentProblem.

    `may_be_gone`: its generations may be used when it is no more, or has another name.
    """
    try:
        with (
            as_user(account),
            environments.open_store(account, settings) as store,
            store.open(environment) as opened,
        ):
            return f"{opened.path}/upper", opened.settings
    except NoSuchEnvironment:
        if not may_be_gone:
            raise
        return "", EnvironmentSettings()


def _chosen(settings: Settings) -> dict[str, str]:
    """What `[jobs]` says of every job, as it travels. Raises TransferError."""
    jobs = settings.section("jobs")
    engine = str(jobs.get("engine", "auto"))
    if engine not in ENGINES:
        raise TransferError(f"jobs.engine: one of {', '.join(ENGINES)}, not {engine[:40]!r}")
    chosen = {"engine": engine} if engine != "auto" else {}
    return {**chosen, "keep": "1"} if jobs.get("keep", False) else chosen


def _warning(
    account: Account, settings: Settings, environment: str, state: str, made: api.Generation
) -> str:
    """What the user is told of a generation that is larger than the site likes; else empty."""
    limit = places.parse_size(str(settings.section("deploy").get("warn_size") or WARN_SIZE))
    if made.package_bytes <= limit:
        return ""
    most = [
        f"{path} ({places.size_text(size)})"
        for path, size in api.biggest(account, state, made.number)[:3]
    ]
    return (
        f"{places.size_text(made.package_bytes)} travel to each node, most of it from"
        f" {', '.join(most)}; sdee deploy exclude --env {environment} --add PATH keeps a directory"
        " here"
    )


def _known(state: str, generation: int) -> str:
    if not os.path.isdir(state):
        raise DeployProblem(f"there is no generation {generation}")
    with State(state) as opened:
        opened.about(generation)
        return opened.identity


def fetch(
    account: Account, settings: Settings, job: int, variables: dict[str, str]
) -> tuple[str, int]:
    """The generation's tree in this node's cache, and the bytes that it took. Raises TransferError."""
    reference = parse(variables)
    key, where = f"job-{job}", places.cache_directory(settings)
    number, identity = reference.generation, reference.identity
    try:
        if reference.transport == "shared":
            done = api.ensure(account, where, reference.source, identity, number, key)
            return done.tree, done.bytes_read
        broadcast.open_inbox(account, job)
        place = f"{where}/{account.uid}/{identity}/{number}"
        if os.path.isdir(place):
            # A damaged one is brought anew: there is nothing to make it of here.
            with contextlib.suppress(DeployProblem):
                return api.ensure(account, where, f"{place}.none", identity, number, key).tree, 0
        source, size = broadcast.receive(account, job, identity, number, everything=False)
        try:
            tree = api.ensure(account, where, source, identity, number, key).tree
        except DeployProblem:
            # This node has lost what it was sent once.
            source, more = broadcast.receive(account, job, identity, number, everything=True)
            tree, size = api.ensure(account, where, source, identity, number, key).tree, size + more
        broadcast.empty(job)
        return tree, size
    except (DeployProblem, OSError) as error:
        raise TransferError(str(error)) from None


def release(account: Account, settings: Settings, job: int) -> None:
    """The job uses its generation no more; what is too much in the cache goes."""
    where = places.cache_directory(settings)
    broadcast.clear(job)
    try:
        api.release(account, where, f"job-{job}")
        limit = settings.section("deploy").get("cache_limit")
        if limit:
            cache.prune(account, where, places.parse_size(str(limit)))
    except (DeployProblem, OSError) as error:
        raise TransferError(str(error)) from None


def release_others(settings: Settings, known: list[int]) -> None:
    """Jobs that this node doesn't know use no generation: a crash has left their marks.

    All users' are tried. Raises TransferError with what failed for one of them.
    """
    problem = ""
    where = places.cache_directory(settings)
    keep = {f"job-{job}" for job in known}
    marks = [path.relative_to(where).parts for path in Path(where).glob("*/*/*/users/job-*")]
    for uid, key in sorted({(parts[0], parts[-1]) for parts in marks}):
        if uid.isdigit() and key not in keep:
            try:
                # A user who is gone leaves a cache that nobody asks for.
                with contextlib.suppress(KeyError):
                    api.release(account_of(int(uid)), where, key)
            except (DeployProblem, OSError) as error:
                problem = f"{key} of uid {uid}: {error}"
    if problem:
        raise TransferError(problem)


def save(account: Account, settings: Settings, record: Record) -> dict[str, object]:
    """A new generation of what a job has: its generation and its own layer. Raises TransferError."""
    reference = parse(record.variables)
    tree = f"{places.cache_directory(settings)}/{account.uid}/{reference.identity}/{reference.generation}/tree"
    state = places.state_directory(account, settings, reference.environment, "shared")
    try:
        done = api.save(account, [tree], f"{record.place}/upper", state)
    except (DeployProblem, OSError) as error:
        raise TransferError(str(error)) from None
    return {
        "reference": f"{reference.environment}@{done.generation.number}",
        "bytes": done.generation.package_bytes,
    }


def caches(settings: Settings) -> list[dict[str, object]]:
    """By user: generations in this node's cache and their bytes on disk."""
    where = places.cache_directory(settings)
    found: list[dict[str, object]] = []
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(where)):
            if name.isdigit():
                trees, size = _count(os.path.join(where, name))
                found.append({"uid": int(name), "generations": trees, "bytes": size})
    return found


def _count(top: str) -> tuple[int, int]:
    trees = size = 0
    seen: set[int] = set()
    for directory, names, files in os.walk(top):
        trees += "tree" in names and os.path.basename(directory).isdigit()
        for file in files:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(directory, file))
                if status.st_ino not in seen:
                    seen.add(status.st_ino)
                    size += status.st_blocks * 512
    return trees, size
