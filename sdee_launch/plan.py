"""What an instance is made of, decided from the host's mounts before anything is mounted.

`make_plan` is pure: it gets the mounts as /proc/self/mountinfo has them, the account and the
settings, and answers which filesystems are overlaid and, in order, what is put on top.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mount_helpers.mountinfo import Mount
from sdee_launch.accounts import Account
from sdee_launch.config import Settings

#: Made anew or taken from the host whole; mounts below them need no thought.
_OWN_PLACES = (b"/proc", b"/sys", b"/dev", b"/run", b"/tmp")
#: No directory of homes, even if an account lives in it: the system would vanish.
_NEVER_HIDDEN = frozenset(
    b"/ /usr /var /etc /opt /bin /sbin /lib /lib64 /dev /proc /sys /run /tmp /var/lib /var/run"
    b" /usr/local /srv /mnt".split()
)


class PlanProblem(Exception):
    """A bind that can't be: one line that names it."""


@dataclass(frozen=True)
class Bind:
    """A path of the host shown at `target`, with what is mounted below it."""

    source: bytes
    target: bytes
    readonly: bool = False
    optional: bool = True  # left out if the source isn't there; else that is an error
    nosuid: bool = True


@dataclass(frozen=True)
class Tmpfs:
    """A new filesystem in memory."""

    target: bytes
    mode: int
    size: str
    directories: tuple[tuple[str, int], ...] = ()  # (name, mode) made in it


@dataclass(frozen=True)
class Private:
    """The environment's directory private/NAME; a tmpfs where there is none."""

    name: str
    target: bytes
    mode: int


@dataclass(frozen=True)
class Proc:
    """A new /proc."""

    target: bytes = b"/proc"


@dataclass(frozen=True)
class Cover:
    """A file or directory that isn't shown."""

    target: bytes


Step = Bind | Tmpfs | Private | Proc | Cover


@dataclass(frozen=True)
class Plan:
    """`overlays`: mount points whose filesystem is a lower, / first. `steps`: on top, in order."""

    overlays: tuple[bytes, ...]
    steps: tuple[Step, ...]


def below(path: bytes, place: bytes) -> bool:
    """Whether `path` is `place` or lies below it."""
    return path == place or place == b"/" or path.startswith(place + b"/")


def visible(mounts: Sequence[Mount]) -> list[Mount]:
    """The topmost mount of each point that can be reached by its path, / first."""
    by_id = {m.mount_id: m for m in mounts}
    children: dict[int, list[Mount]] = {}
    for mount in mounts:
        if mount.parent_id in by_id and mount.parent_id != mount.mount_id:
            children.setdefault(mount.parent_id, []).append(mount)
    roots = [m for m in mounts if m.point == b"/" and m.parent_id not in by_id] or [
        m for m in mounts if m.point == b"/"
    ]
    found: list[Mount] = []

    def visit(mount: Mount) -> None:
        below_it = children.get(mount.mount_id, [])
        # A mount on the very root of another covers all of it.
        for child in below_it:
            if child.point == mount.point:
                visit(child)
                return
        found.append(mount)
        for child in below_it:
            covered = any(
                other is not child
                and other.point != child.point
                and below(child.point, other.point)
                for other in below_it
            )
            if not covered:
                visit(child)

    for root in roots[:1]:
        visit(root)
    return sorted(found, key=lambda m: (m.point.count(b"/") if m.point != b"/" else 0, m.point))


def parse_bind(text: str) -> Bind:
    """SRC[:DST][:ro]. Raises PlanProblem."""
    parts = text.split(":")
    readonly = len(parts) > 1 and parts[-1] in ("ro", "rw")
    read_only = readonly and parts.pop() == "ro"
    if len(parts) not in (1, 2) or not all(parts):
        raise PlanProblem(f"--bind {text}: SRC[:DST][:ro] is expected")
    source, target = parts[0], parts[-1]
    for path in (source, target):
        if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
            raise PlanProblem(f"--bind {text}: {path} is no absolute path without ..")
    clean = os.path.normpath(target)
    if clean == "/" or any(below(os.fsencode(clean), p) for p in (b"/proc", b"/sys", b"/dev")):
        raise PlanProblem(f"--bind {text}: nothing may be bound at {clean}")
    return Bind(os.fsencode(os.path.normpath(source)), os.fsencode(clean), read_only, False)


def _home_places(account: Account, settings: Settings) -> tuple[bytes, ...]:
    """The directories of homes: the site's, and the one that this user's home is in."""
    places = [os.fsencode(p).rstrip(b"/") for p in settings.homes]
    own = os.path.dirname(os.fsencode(account.home).rstrip(b"/")) or b"/"
    if own not in places and own not in _NEVER_HIDDEN and not any(below(own, p) for p in places):
        places.append(own)
    return tuple(p for p in places if p)


def make_plan(
    mounts: Sequence[Mount],
    files: Collection[bytes],
    account: Account,
    settings: Settings,
    binds: Sequence[Bind] = (),
) -> Plan:
    """The plan of an instance. `files`: the mount points that are no directories."""
    homes = _home_places(account, settings)
    home = os.fsencode(account.home).rstrip(b"/") or b"/"
    shared = [os.fsencode(p).rstrip(b"/") for p in settings.shared]
    not_there = [os.fsencode(p) for p in settings.not_there]
    overlays: list[bytes] = []
    bound: list[bytes] = []
    for mount in visible(mounts):
        point = mount.point
        if point == b"/":
            overlays.append(point)
        elif any(below(point, p) for p in (*_OWN_PLACES, *homes, home, *not_there, *bound)):
            continue
        elif point in shared or mount.fstype in settings.shared_types:
            bound.append(point)
        elif point in files:
            if below(point, b"/etc"):
                bound.append(point)
        elif (
            mount.fstype in settings.system_types
            and not any(below(point, p) for p in shared)
            # An overlay deep below / is a container's root, and no part of the system.
            and (mount.fstype != "overlay" or point.count(b"/") == 1)
        ):
            overlays.append(point)
    # A plain directory that the site shares; what is mounted there was seen above.
    bound += [p for p in shared if p not in bound and not any(below(p, b) for b in bound)]
    steps: list[Step] = [*_system_steps(account, settings)]
    steps += [Bind(p, p) for p in bound]
    steps += _home_steps(home, homes)
    steps += [Bind(os.fsencode(p), os.fsencode(p)) for p in settings.host_paths]
    steps += binds
    steps += [Cover(os.fsencode(p)) for p in settings.masked]
    return Plan(tuple(overlays), tuple(steps))


def _system_steps(account: Account, settings: Settings) -> list[Step]:
    size = settings.tmp_size
    run = (
        ("lock", 0o1777), ("user", 0o755), (f"user/{account.uid}", 0o700), ("user/0", 0o700),
        ("shm", 0o1777), ("sshd", 0o755),
    )  # fmt: skip
    return [
        Proc(),
        Bind(b"/sys", b"/sys"),
        Bind(b"/dev", b"/dev"),
        Tmpfs(b"/dev/shm", 0o1777, size),
        Tmpfs(b"/run", 0o755, "10%", run),
        Tmpfs(b"/tmp", 0o1777, size),
        Private("root", b"/root", 0o700),
    ]


def _home_steps(home: bytes, homes: Sequence[bytes]) -> list[Step]:
    steps: list[Step] = []
    for number, place in enumerate(homes):
        name = "home" if number == 0 else f"home{number}"
        steps.append(Private(name, place, 0o755))
    if home not in _NEVER_HIDDEN and home != b"/root":
        steps.append(Bind(home, home))
    return steps
