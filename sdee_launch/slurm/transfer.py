"""Between a job and sdee_launch.deploy: where generations are kept, and how they reach a node.

`shared`: the state directory lies where all nodes see it, below the user's home unless the site
says otherwise; each node reads what it lacks. `sbcast`: it lies on the login node, whose daemon
sends one file to all nodes of a job when it starts (broadcast.py).
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from sdee_launch import environments
from sdee_launch.accounts import Account
from sdee_launch.config import Settings
from sdee_launch.deploy import api, cache
from sdee_launch.deploy.errors import DeployProblem
from sdee_launch.deploy.generations import State
from sdee_launch.deploy.inside import run_inside
from sdee_launch.site import as_user
from sdee_launch.slurm.records import Record

TRANSPORTS = ("shared",)
SHARED_SPOOL = "{home}/.local/share/sdee/spool"
LOCAL_SPOOL = "/var/lib/sdee/spool/{uid}"
#: More than so many bytes in one package are worth a word.
WARN_BYTES = 1_000_000_000


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

    def variables(self) -> dict[str, str]:
        """As they travel: Prolog sees SPANK_SDEE_REF and so on."""
        return {
            "ref": f"{self.environment}@{self.generation}",
            "identity": self.identity,
            "source": self.source,
            "transport": self.transport,
        }


def parse(variables: dict[str, str]) -> Reference:
    """The reverse of `Reference.variables`. Raises TransferError."""
    name, _, number = variables.get("ref", "").partition("@")
    transport = variables.get("transport", "shared")
    source = variables.get("source", "")
    if not environments.valid_name(name) or not number.isdigit() or transport not in TRANSPORTS:
        raise TransferError("what the job asks for isn't understood")
    if not source.startswith("/"):
        raise TransferError(f"{source[:80]!r} is no place of generations")
    return Reference(name, int(number), variables.get("identity", ""), source, transport)


def cache_directory(settings: Settings) -> str:
    """Where this node keeps generations."""
    return str(settings.section("deploy").get("cache", api.DEFAULT))


def _transport(settings: Settings, wanted: str) -> str:
    chosen = wanted or str(settings.section("deploy").get("transport", "shared"))
    if chosen not in TRANSPORTS:
        raise TransferError(f"transport {chosen[:40]!r}: one of {', '.join(TRANSPORTS)}")
    return chosen


def _state(account: Account, settings: Settings, environment: str, transport: str) -> str:
    default = SHARED_SPOOL if transport == "shared" else LOCAL_SPOOL
    pattern = default
    if transport == "shared":
        pattern = str(settings.section("deploy").get("spool", default))
    top = pattern.format(home=account.home, user=account.name, uid=account.uid)
    if transport == "sbcast":
        _own_directory(top, account)
    return os.path.join(top, environment)


def _own_directory(path: str, account: Account) -> None:
    """A directory of the user's in one of root's."""
    os.makedirs(os.path.dirname(path), mode=0o711, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
        os.chown(path, account.uid, account.gid)


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
    way = _transport(settings, transport)
    state = _state(account, settings, environment, way)
    site = [
        *settings.section("deploy").get("exclude", ()),
        *settings.section("jobs").get("exclude", ()),
    ]
    warning = ""
    try:
        if generation:
            identity = run_inside(account, lambda: _known(state, generation))
        else:
            with (
                as_user(account),
                environments.open_store(account, settings) as store,
                store.open(environment) as opened,
            ):
                upper, own = f"{opened.path}/upper", opened.settings.exclude
            done = api.submit(
                account, upper, state, [*site, *own, *exclude],
                checksum=bool(settings.section("deploy").get("checksum", False)),
                level=int(settings.section("deploy").get("level", 3)),
            )  # fmt: skip
            identity, generation = done.identity, done.generation.number
            if not done.reused and done.generation.package_bytes > WARN_BYTES:
                size = done.generation.package_bytes / 1e9
                warning = f"{size:.1f} GB travel to each node; sdee deploy plan shows what they are"
    except DeployProblem as error:
        raise TransferError(str(error)) from None
    reference = Reference(environment, generation, identity, state, way)
    return {"variables": reference.variables(), "warning": warning}


def _known(state: str, generation: int) -> str:
    if not os.path.isdir(state):
        raise DeployProblem(f"there is no generation {generation}")
    with State(state) as opened:
        opened.about(generation)
        return opened.identity


def fetch(
    account: Account, settings: Settings, job: int, variables: dict[str, str], source: str = ""
) -> tuple[str, int]:
    """The generation's tree in this node's cache, and the bytes that it took. Raises TransferError.

    `source`: in place of the state directory, an unpacked bundle.
    """
    reference = parse(variables)
    limit = str(settings.section("deploy").get("cache_limit", "0"))
    try:
        done = api.ensure(
            account, cache_directory(settings), source or reference.source, reference.identity,
            reference.generation, f"job-{job}", limit=parse_size(limit),
        )  # fmt: skip
    except (DeployProblem, OSError) as error:
        raise TransferError(str(error)) from None
    return done.tree, done.bytes_read


def release(account: Account, settings: Settings, job: int) -> None:
    """The job uses its generation no more; what is too much in the cache goes."""
    where = cache_directory(settings)
    try:
        api.release(account, where, f"job-{job}")
        limit = settings.section("deploy").get("cache_limit")
        if limit:
            cache.prune(account, where, parse_size(str(limit)))
    except (DeployProblem, OSError) as error:
        raise TransferError(str(error)) from None


def parse_size(text: str) -> int:
    """Bytes of `500M`, `20G`, `1.5T` or a plain number. Raises TransferError."""
    units = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    plain = text.strip().upper().removesuffix("B").removesuffix("I")
    factor = units.get(plain[-1:], 1)
    try:
        return int(float(plain.rstrip("KMGT")) * factor)
    except ValueError:
        raise TransferError(f"{text!r} is no size") from None


def save(account: Account, settings: Settings, record: Record) -> dict[str, object]:
    """A new generation of what a job has: its generation and its own layer. Raises TransferError."""
    reference = parse(record.variables)
    tree = f"{cache_directory(settings)}/{account.uid}/{reference.identity}/{reference.generation}/tree"
    state = _state(account, settings, reference.environment, "shared")
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
    where = cache_directory(settings)
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
