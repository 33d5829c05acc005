"""What the rest of sdee asks of deployment. Every function works with the user's rights alone.

At submit: `submit` takes a snapshot of an upper into a state directory. On a node: `ensure` brings
that generation into the node's cache, reading only what it lacks; `release` gives it back. Where
nodes don't see the state directory, `write_bundle` makes one file of it for sbcast, which
`unpack_bundle` turns into a source directory again. `save` makes a generation of what a job wrote.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from sdee_launch.accounts import Account
from sdee_launch.deploy import bundle, entries, generations
from sdee_launch.deploy.cache import DEFAULT, FULL, Ensured, ensure, release
from sdee_launch.deploy.entries import Entry
from sdee_launch.deploy.errors import Damaged, DeployProblem
from sdee_launch.deploy.exclude import DEFAULTS, Excluded
from sdee_launch.deploy.generations import Generation, State
from sdee_launch.deploy.inside import run_inside
from sdee_launch.deploy.save import flatten
from sdee_launch.deploy.walk import DIRECTORY, Walk, remove_tree

__all__ = [
    "DEFAULT",
    "DEFAULTS",
    "Damaged",
    "DeployProblem",
    "Ensured",
    "Generation",
    "Plan",
    "Submitted",
    "biggest",
    "ensure",
    "plan",
    "release",
    "save",
    "submit",
    "unpack_bundle",
    "write_bundle",
]


@dataclass(frozen=True)
class Submitted:
    """A generation and the state directory's identity; `reused`: nothing had changed."""

    identity: str
    generation: Generation
    reused: bool


@dataclass(frozen=True)
class Plan:
    """What a push would do: counts, bytes, and the biggest directories of what is new."""

    entries: int
    new_files: int
    new_bytes: int
    removed: int
    content: int
    excluded: int
    excluded_bytes: int
    biggest: tuple[tuple[str, int], ...]


def _as_submitted(record: dict[str, object]) -> Submitted:
    about = record["generation"]
    assert isinstance(about, dict)
    generation = Generation(**{**about, "packages": tuple(about["packages"])})
    return Submitted(str(record["identity"]), generation, bool(record["reused"]))


def submit(
    account: Account,
    upper: str,
    state: str,
    exclude: Iterable[str] = (),
    *,
    checksum: bool = False,
    level: int = 3,
    keep: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Submitted:
    """The generation of what `upper` has now; `exclude` adds to the defaults.

    Raises DeployProblem. `progress(entries, bytes)` is called in the child.
    """
    excluded = Excluded([*DEFAULTS, *exclude])

    def work() -> dict[str, object]:
        with State(state) as opened:
            fd = os.open(upper, DIRECTORY)
            try:
                before = opened.numbers()
                made = generations.snapshot(
                    opened, fd, excluded, checksum=checksum, level=level, progress=progress
                )
                opened.prune(keep)
            except OSError as error:
                if error.errno in FULL:
                    raise DeployProblem(f"{state}: {error.strerror}") from None
                raise
            finally:
                os.close(fd)
            return {
                "identity": opened.identity,
                "generation": asdict(made),
                "reused": made.number in before,
            }

    return _as_submitted(run_inside(account, work))


def plan(account: Account, upper: str, state: str, exclude: Iterable[str] = ()) -> Plan:
    """What `submit` would do, by size and time alone. Raises DeployProblem."""
    excluded = Excluded([*DEFAULTS, *exclude])

    def work() -> dict[str, object]:
        old: Iterable[Entry] = ()
        with State(state) as opened:
            numbers = opened.numbers()
            fd = os.open(upper, DIRECTORY)
            try:
                if numbers:
                    old = opened.read(numbers[-1])
                return asdict(_plan(old, fd, excluded))
            finally:
                os.close(fd)

    record = run_inside(account, work)
    largest = tuple((str(p), int(n)) for p, n in record.pop("biggest"))
    return Plan(biggest=largest, **record)


def _plan(old: Iterable[Entry], upper: int, excluded: Excluded) -> Plan:
    counts = dict.fromkeys(
        ("entries", "new_files", "new_bytes", "removed", "content", "excluded", "excluded_bytes"), 0
    )
    directories: dict[str, int] = {}

    def counted(path: bytes) -> bool:
        if not excluded(path):
            return False
        counts["excluded"] += 1
        counts["excluded_bytes"] += _disk_use(upper, path)
        return True

    walk = Walk(upper, counted)
    for before, found in entries.merge(old, walk):
        if found is None:
            counts["removed"] += 1
            continue
        counts["entries"] += 1
        if found.kind != "f":
            continue
        size, time = found.status.st_size, found.status.st_mtime_ns
        counts["content"] += size
        if before is None or (before.size, before.mtime_ns) != (size, time):
            counts["new_files"] += 1
            counts["new_bytes"] += size
            _count(directories, found.path, size)
    return Plan(biggest=_biggest(directories), **counts)


def _count(directories: dict[str, int], path: bytes, size: int) -> None:
    """Add a file to its directory's bytes; what is more than four levels deep counts above."""
    top = "/".join(os.fsdecode(path).split("/")[:-1][:4]) or "."
    directories[top] = directories.get(top, 0) + size


def _biggest(directories: dict[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(directories.items(), key=lambda one: -one[1])[:5])


def biggest(account: Account, state: str, number: int) -> tuple[tuple[str, int], ...]:
    """The directories with the most bytes in the package of a generation. Raises DeployProblem."""

    def work() -> list[tuple[str, int]]:
        directories: dict[str, int] = {}
        with State(state) as opened:
            for entry in opened.read(number):
                if entry.kind == "f" and entry.generation == number:
                    _count(directories, entry.path, entry.size)
        return list(_biggest(directories))

    return tuple((str(path), int(size)) for path, size in run_inside(account, work))


def _disk_use(upper: int, path: bytes) -> int:
    """Bytes of the files below a path that stays behind (0 where it can't be walked)."""
    try:
        status = os.stat(path, dir_fd=upper, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode):
            return status.st_size
        fd = os.open(path, DIRECTORY, dir_fd=upper)
        try:
            return sum(
                found.status.st_size for found in Walk(fd, lambda _: False) if found.kind == "f"
            )
        finally:
            os.close(fd)
    except (OSError, DeployProblem):
        return 0


def write_bundle(account: Account, state: str, number: int, have: int, path: str) -> int:
    """One file for sbcast, in a place of the user's; returns its bytes. Raises DeployProblem."""

    def work() -> int:
        with State(state) as opened, open(path, "wb") as file:
            return bundle.write(opened, number, have, file)

    return int(run_inside(account, work))


def unpack_bundle(account: Account, path: str, directory: str) -> None:
    """The source directory that `ensure` takes, made of a bundle. Raises DeployProblem."""

    def work() -> None:
        remove_tree(directory)
        os.makedirs(directory, mode=0o700)
        with open(path, "rb") as file:
            bundle.read(file, directory)

    run_inside(account, work)


def save(
    account: Account,
    lowers: Sequence[str],
    upper: str,
    state: str,
    exclude: Iterable[str] = (),
) -> Submitted:
    """Make a new generation in `state` of a job's layers, lowers topmost first. Raises DeployProblem.

    The tree is put together beside upper, on its filesystem, and removed again.
    """
    excluded = Excluded([*DEFAULTS, *exclude])

    def work() -> dict[str, object]:
        place = upper.rstrip("/") + ".save"
        remove_tree(place)
        os.mkdir(place, 0o700)
        opened_layers = [os.open(path, DIRECTORY) for path in [*lowers, upper, place]]
        try:
            *below, top, target = opened_layers
            flatten(below, top, target)
            with State(state) as opened:
                before = opened.numbers()
                made = generations.snapshot(opened, target, excluded)
                return {
                    "identity": opened.identity,
                    "generation": asdict(made),
                    "reused": made.number in before,
                }
        finally:
            for fd in opened_layers:
                os.close(fd)
            remove_tree(place)

    return _as_submitted(run_inside(account, work))
