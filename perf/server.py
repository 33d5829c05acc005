"""What a filesystem's server itself spends: CPU time for each request, and when nobody asks."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mount_helpers.mountinfo import mount_at
from perf.figures import MICROSECONDS, MILLISECONDS, Missing
from perf.filesystems import Contender, mounted
from perf.runner import Block

IDLE_SECONDS = 10
IDLE_LINE = f"idle: the server's CPU time in {IDLE_SECONDS} s without requests"
GETATTR, CREATE = "GETATTR", "CREATE"
TRIP_LINE = "GETATTR and its answer, as the caller sees it"
#: Many, as user and system time are told apart by ticks of 10 ms.
GETATTRS, CREATES = 50_000, 5_000

_TICKS = os.sysconf("SC_CLK_TCK")
_AT_EMPTY_PATH, _AT_STATX_FORCE_SYNC, _STATX_BASIC_STATS = 0x1000, 0x2000, 0x7FF


class CpuTime(NamedTuple):
    """Seconds. `user` and `system` by ticks of 10 ms; `running` by the scheduler's own clock."""

    user: float
    system: float
    running: float


def servers_of(merged: Path) -> list[int]:
    """The processes that hold the connection of the FUSE mount at exactly this path.

    Raises Missing where nothing is mounted or none is found: /proc/PID/fdinfo tells the connection
    of an open /dev/fuse on newer kernels only (seen on Linux 6.18).
    """
    mount = mount_at(os.fsencode(merged))
    if mount is None:
        raise Missing(f"nothing is mounted at {merged}")
    found = [
        int(name)
        for name in os.listdir("/proc")
        if name.isdigit() and _serves(name, mount.device[1])
    ]
    if not found:
        raise Missing("no process says that it serves the mount (fdinfo of /dev/fuse)")
    return found


def _serves(pid: str, connection: int) -> bool:
    wanted = ["fuse_connection:", str(connection)]
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            if os.readlink(f"/proc/{pid}/fd/{fd}").endswith("fuse"):
                text = Path(f"/proc/{pid}/fdinfo/{fd}").read_text()
                if any(line.split() == wanted for line in text.splitlines()):
                    return True
    except OSError:  # it ended meanwhile
        pass
    return False


def cpu_time(pids: Sequence[int]) -> CpuTime:
    """What the processes have used so far. Raises Missing where one of them has ended."""
    user = system = running = 0.0
    try:
        for pid in pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            user += int(fields[11]) / _TICKS
            system += int(fields[12]) / _TICKS
            for task in Path(f"/proc/{pid}/task").iterdir():
                running += int((task / "schedstat").read_text().split()[0]) / 1e9
    except (FileNotFoundError, ProcessLookupError) as error:
        raise Missing(f"the server ended: {error}") from None
    return CpuTime(user, system, running)


def split(before: CpuTime, after: CpuTime) -> tuple[float, float]:
    """User and system seconds between two readings.

    The sum by the scheduler's clock, which is exact, shared out by ticks, which tell the two apart;
    where threads have ended meanwhile, and taken their share of the sum with them, by ticks alone.
    """
    user, system = after.user - before.user, after.system - before.system
    ticks = user + system
    total = after.running - before.running
    if total < ticks * 0.9 - 2 / _TICKS:
        total = ticks
    share = user / ticks if ticks else 0.5
    return total * share, total * (1 - share)


def getattrs(files: Sequence[bytes], count: int) -> float:
    """So many GETATTRs, and nothing else: the attributes may not come from the kernel's cache.

    Returns the seconds that one takes.
    """
    statx = ctypes.CDLL(None, use_errno=True).statx
    buffer = ctypes.create_string_buffer(256)
    handles = [os.open(name, os.O_PATH) for name in files]
    flags = _AT_EMPTY_PATH | _AT_STATX_FORCE_SYNC
    try:
        start = time.perf_counter()
        for number in range(count):
            fd = handles[number % len(handles)]
            if statx(fd, b"", flags, _STATX_BASIC_STATS, buffer):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), files[number % len(handles)])
        return (time.perf_counter() - start) / count
    finally:
        for fd in handles:
            os.close(fd)


def _creates(directory: bytes, count: int) -> float:
    start = time.perf_counter()
    for number in range(count):
        os.close(
            os.open(directory + b"/made%d" % number, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        )
    return (time.perf_counter() - start) / count


def _lines(request: str) -> tuple[str, str]:
    return f"server's CPU per {request}, user", f"server's CPU per {request}, system"


def _per_request(contender: Contender, lower: Path, scratch: Path) -> dict[str, float]:
    figures: dict[str, float] = {}
    with mounted(contender, lower, scratch) as layers:
        pids = servers_of(layers.merged)
        flat = os.fsencode(layers.merged / "flat")
        files = [flat + b"/file%d" % n for n in range(500)]
        getattrs(files, len(files))  # the lookups, and the first of everything
        place = os.fsencode(layers.merged / "made")
        os.mkdir(place)
        steps: list[tuple[str, int, Callable[[], float]]] = [
            (GETATTR, GETATTRS, lambda: getattrs(files, GETATTRS)),
            (CREATE, CREATES, lambda: _creates(place, CREATES)),
        ]
        for request, times, work in steps:
            before = cpu_time(pids)
            seconds = work()
            if request == GETATTR:
                figures[TRIP_LINE] = seconds * 1e6
            time.sleep(0.05)  # the answers to RELEASE, which nobody waits for
            spent = split(before, cpu_time(pids))
            for line, seconds in zip(_lines(request), spent, strict=True):
                figures[line] = seconds / times * 1e6
    return figures


class Idle:
    """All servers resting at once: each contender takes its figure of the same ten seconds."""

    def __init__(self, all_of_them: Sequence[Contender], lower: Path, scratch: Path) -> None:
        self._contenders, self._lower, self._scratch = all_of_them, lower, scratch
        self._found: dict[str, float | Missing] = {}

    def _measure(self) -> None:
        servers: dict[str, list[int]] = {}
        with ExitStack() as stack:
            for number, one in enumerate(self._contenders):
                try:
                    place = mounted(one, self._lower, self._scratch, f"idle{number}")
                    merged = stack.enter_context(place).merged
                    os.listdir(merged / "flat")
                    servers[one.name] = servers_of(merged)
                except Missing as error:
                    self._found[one.name] = error
            time.sleep(1)
            before = {name: cpu_time(pids) for name, pids in servers.items()}
            time.sleep(IDLE_SECONDS)
            for name, pids in servers.items():
                self._found[name] = sum(split(before[name], cpu_time(pids))) * 1000

    def take(self, contender: Contender) -> dict[str, float]:
        """The contender's figure; a second question for the same one measures all anew."""
        if contender.name not in self._found:
            self._measure()
        found = self._found.pop(contender.name)
        if isinstance(found, Missing):
            raise found
        return {IDLE_LINE: found}


def blocks(one: Contender, lower: Path, scratch: Path, idle: Idle) -> list[Block]:
    """A contender's blocks, none for one without a server; `lower` holds `flat`."""
    if not one.served:
        return []
    lines = dict.fromkeys((TRIP_LINE, *_lines(GETATTR), *_lines(CREATE)), MICROSECONDS)
    return [
        Block(one.name, lines, partial(_per_request, one, lower, scratch)),
        Block(one.name, {IDLE_LINE: MILLISECONDS}, partial(idle.take, one)),
    ]
