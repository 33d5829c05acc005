"""The instances that live on this node, by (owner, environment), and what is on disk of them.

A record is what a new daemon needs to take over from the old one: the init with its start time (so
that a number used again is never taken for it), the engine, the servers, the mask. It is a small
JSON file below STATE/instances/UID/, in directories that only root may enter. Nothing in memory is
needed to join, to list, or to end an instance: its namespaces are those of its init.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Process:
    """A process by its number and when it started (clock ticks since boot)."""

    pid: int
    start: int

    def open(self) -> int | None:
        """A pidfd, if the process is still this one; the caller's to close."""
        try:
            fd = os.pidfd_open(self.pid)
        except OSError:
            return None
        if start_time(self.pid) == self.start and not exited(fd):
            return fd
        os.close(fd)
        return None


def start_time(pid: int) -> int | None:
    """When a process started, in ticks since boot; None if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rsplit(b")", 1)[1].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def exited(pidfd: int) -> bool:
    """Whether the process of a pidfd has ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


@dataclass(frozen=True)
class Record:
    """One live instance. `environment` is the owner's name of it; `job` that of a job's, or 0."""

    uid: int
    environment: str
    init: Process
    engine: str
    mask: str = ""  # the path of the mask tree
    binds: tuple[str, ...] = ()
    servers: tuple[Process, ...] = ()  # those of sdeefs
    made_at: float = 0.0
    job: int = 0
    extra: dict[str, object] = field(default_factory=dict)  # what joining needs to know

    @property
    def key(self) -> tuple[int, str]:
        """What no two live instances share."""
        return (self.uid, f"job={self.job}" if self.job else self.environment)


class Registry:
    """The records, in memory and below `state`."""

    def __init__(self, state: str) -> None:
        self.directory = os.path.join(state, "instances")
        self._records: dict[tuple[int, str], Record] = {}
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        os.chmod(self.directory, 0o700)

    def _path(self, record: Record) -> str:
        # A job's name can't be an environment's: "=" is in none.
        name = f"job={record.job}" if record.job else record.environment
        return os.path.join(self.directory, str(record.uid), name + ".json")

    def add(self, record: Record) -> None:
        """Keep a new record, on disk first. Raises OSError."""
        path = self._path(record)
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with open(path + ".new", "w", encoding="utf-8") as file:
            json.dump(asdict(record), file)
        os.rename(path + ".new", path)
        self._records[record.key] = record

    def remove(self, record: Record) -> None:
        """Forget a record, unless a newer one has its place."""
        if self._records.get(record.key) is not record:
            return
        del self._records[record.key]
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(record))
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(self._path(record)))

    def get(self, uid: int, environment: str) -> Record | None:
        """The record of a user's environment (a job's is called job=NUMBER)."""
        return self._records.get((uid, environment))

    def of(self, uid: int | None = None) -> list[Record]:
        """All records, or those of one user."""
        return [r for r in self._records.values() if uid is None or r.uid == uid]

    def load(self) -> list[Record]:
        """Read what an earlier daemon left; gives the records, live or not, for the caller to sort.

        Files that are no records are removed: only a crash in the middle of a boot leaves them.
        """
        for directory, _, names in os.walk(self.directory):
            for name in names:
                path = os.path.join(directory, name)
                try:
                    with open(path, encoding="utf-8") as file:
                        record = _from_json(json.load(file))
                except (OSError, ValueError, TypeError, KeyError):
                    os.unlink(path)
                    continue
                self._records[record.key] = record
        return list(self._records.values())


def _from_json(data: dict[str, object]) -> Record:
    def process(value: object) -> Process:
        if not isinstance(value, dict):
            raise ValueError("not a process")
        return Process(int(value["pid"]), int(value["start"]))

    servers, binds = data["servers"], data["binds"]
    if not isinstance(servers, list) or not isinstance(binds, list):
        raise ValueError("not lists")
    fields = dict(data)
    fields["init"] = process(data["init"])
    fields["servers"] = tuple(process(x) for x in servers)
    fields["binds"] = tuple(str(x) for x in binds)
    return Record(**fields)  # type: ignore[arg-type]


def namespaces(init: Process, more: Sequence[str] = ()) -> list[int] | None:
    """Descriptors of the user, mnt and pid namespaces, of `more` and of the root, in this order.

    None if the instance is gone. They are the caller's to close.
    """
    pidfd = init.open()
    if pidfd is None:
        return None
    fds: list[int] = []
    try:
        for name in ("user", "mnt", "pid", *more):
            fds.append(os.open(f"/proc/{init.pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC))
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        fds.append(os.open(f"/proc/{init.pid}/root", flags))
        # Only now: had the number been given away in between, these would be another's.
        gone = exited(pidfd)
    except OSError:
        gone = True
    finally:
        os.close(pidfd)
    if not gone:
        return fds
    for fd in fds:
        os.close(fd)
    return None


def members(init: Process) -> list[int]:
    """The pids, as this namespace has them, of the processes of an instance, its init first."""
    try:
        wanted = os.stat(f"/proc/{init.pid}/ns/pid").st_ino
    except OSError:
        return []
    found = [init.pid]
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == init.pid:
            continue
        try:
            if os.stat(f"/proc/{entry}/ns/pid").st_ino == wanted:
                found.append(int(entry))
        except OSError:
            continue
    return found


def kill(process: Process, number: int = signal.SIGKILL) -> bool:
    """Signal a process, if it is still there."""
    fd = process.open()
    if fd is None:
        return False
    try:
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True
