"""Whether FUSE over io_uring can be used here, and which thread serves which queue."""

from __future__ import annotations

import os
from dataclasses import dataclass

_PARAMETER = "/sys/module/fuse/parameters/enable_uring"
_CPUS = "/sys/devices/system/cpu"


def why_not() -> str | None:
    """None: it works. Else the reason and, where there is one, the mend."""
    try:
        from sdeefs.transports import _ring
    except ImportError:
        return "its C extension isn't built (needs gcc, python3-dev, liburing-dev at installation)"
    try:
        with open(_PARAMETER, encoding="ascii") as file:
            enabled = file.read().strip()
    except FileNotFoundError:
        return "the kernel has no FUSE over io_uring (Linux 6.14 or newer, module fuse loaded)"
    except OSError as error:
        return f"{_PARAMETER}: {error.strerror}"
    if enabled not in ("Y", "1"):
        return f"switched off; root switches it on by: echo Y > {_PARAMETER}"
    try:
        _ring.probe()
    except OSError as error:
        return f"io_uring_setup: {error.strerror} (kernel.io_uring_disabled, or a seccomp filter)"
    return None


@dataclass(frozen=True)
class RingPlan:
    """One thread: where it is pinned, and the queues of the kernel that it serves."""

    cpu: int
    queues: tuple[int, ...]


def parse_cpus(text: str) -> list[int]:
    """The kernel's lists: 0-3,8."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus += range(int(first), int(last or first) + 1)
    return cpus


def plan(possible: int, online: list[int]) -> list[RingPlan]:
    """A thread for each CPU that is online. The kernel serves nothing before every possible CPU's
    queue is there, so those of the others (they may be plugged in later) are dealt out."""
    online = [cpu for cpu in online if cpu < possible] or [0]
    absent = [cpu for cpu in range(possible) if cpu not in online]
    return [RingPlan(cpu, (cpu, *absent[i :: len(online)])) for i, cpu in enumerate(sorted(online))]


def plan_here() -> list[RingPlan]:
    """The plan for this machine."""
    with open(f"{_CPUS}/possible", encoding="ascii") as file:
        possible = len(parse_cpus(file.read()))
    try:
        with open(f"{_CPUS}/online", encoding="ascii") as file:
            online = parse_cpus(file.read())
    except OSError:
        online = sorted(os.sched_getaffinity(0))
    return plan(possible, online)
