"""What a user's jobs had: one small file per job and node, below the user's home.

Nodes write them, as the user, when the job's instance is ready: `sdee jobs` on any machine that
sees the home reads them. Only the last few hundred stay.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from sdee_launch.slurm.records import Record

#: Below the home.
PLACE = ".local/state/sdee/jobs"
MOST = 200


@dataclass(frozen=True, slots=True)
class Report:
    """One node of one job."""

    node: str
    reference: str
    engine: str
    bytes: int
    seconds: float


class Summary(TypedDict):
    """A job as `sdee jobs --json` shows it."""

    job: int
    reference: str
    engine: str
    state: str
    nodes: list[str]
    bytes: int
    seconds: float


def write(home: str, record: Record) -> None:
    """Called as the user. Raises OSError."""
    top = os.path.join(home, PLACE)
    place = os.path.join(top, str(record.job))
    os.makedirs(place, mode=0o700, exist_ok=True)
    report = {
        "node": record.node,
        "reference": record.reference,
        "engine": record.engine,
        "bytes": record.deployed,
        "seconds": record.seconds,
    }
    path = os.path.join(place, f"{record.node}.json")
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(report, file)
    os.replace(f"{path}.new", path)
    numbers = sorted(int(name) for name in os.listdir(top) if name.isdigit())
    for number in numbers[:-MOST]:
        shutil.rmtree(os.path.join(top, str(number)), ignore_errors=True)


def read_all(home: str) -> list[tuple[int, list[Report]]]:
    """Every job that is known, in order of its number."""
    top = os.path.join(home, PLACE)
    try:
        numbers = sorted(int(name) for name in os.listdir(top) if name.isdigit())
    except OSError:
        return []
    found = []
    for number in numbers:
        place = os.path.join(top, str(number))
        reports = []
        for name in sorted(os.listdir(place)):
            try:
                with open(os.path.join(place, name), encoding="utf-8") as file:
                    reports.append(Report(**json.load(file)))
            except (OSError, ValueError, TypeError):
                continue  # half a file of a node that crashed
        if reports:
            found.append((number, reports))
    return found


def summary(job: tuple[int, list[Report]], states: Mapping[int, str]) -> Summary:
    """All nodes of a job in one line."""
    number, reports = job
    return {
        "job": number,
        "reference": reports[0].reference,
        "engine": "/".join(sorted({report.engine for report in reports})),
        "state": states.get(number, "ENDED"),
        "nodes": [report.node for report in reports],
        "bytes": sum(report.bytes for report in reports),
        "seconds": max(report.seconds for report in reports),
    }
