"""What a node remembers of a job between Prolog, its steps and Epilog: one file per job.

`/run/sdee/jobs/JOBID`: the first line is `ready` or `failed REASON` (the plugin reads it in C),
the rest is JSON. The plugin knows by the file alone that a job must not run without an instance.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

DIRECTORY = Path("/run/sdee/jobs")


@dataclass(frozen=True, slots=True)
class Record:
    """A job on this node."""

    job: int
    uid: int
    reference: str
    #: Why there is no instance; empty when there is one.
    failure: str = ""
    #: pid of the instance's init, as sdeed sees it, and when it started (clock ticks after boot).
    init: int = 0
    started: int = 0
    engine: str = ""
    #: Bytes that came to this node for the job, and seconds until it was ready.
    deployed: int = 0
    seconds: float = 0.0
    keep: bool = False
    #: The job's own upper and work directories lie below it.
    place: str = ""
    node: str = ""
    #: What the submit side gave to Prolog.
    variables: dict[str, str] = field(default_factory=dict)


def as_json(record: Record) -> dict[str, object]:
    """For listings."""
    return asdict(record)


def write(record: Record, directory: Path = DIRECTORY) -> None:
    """Remember, atomically."""
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    reason = " ".join(record.failure.split())
    first = f"failed {reason}" if reason else "ready"
    temporary = directory / f".{record.job}.{os.getpid()}"
    temporary.write_text(f"{first}\n{json.dumps(asdict(record))}\n")
    os.replace(temporary, directory / str(record.job))


def read(job: int, directory: Path = DIRECTORY) -> Record | None:
    """What is known of a job; None if it has no environment here."""
    try:
        text = (directory / str(job)).read_text()
    except FileNotFoundError:
        return None
    return Record(**json.loads(text.split("\n", 1)[1]))


def forget(job: int, directory: Path = DIRECTORY) -> None:
    """Twice is harmless."""
    (directory / str(job)).unlink(missing_ok=True)


def every(directory: Path = DIRECTORY) -> Iterator[Record]:
    """All jobs with environments on this node."""
    if not directory.is_dir():
        return
    for entry in sorted(os.listdir(directory)):
        if entry.isdigit():
            record = read(int(entry), directory)
            if record is not None:
                yield record
