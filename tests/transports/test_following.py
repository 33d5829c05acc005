"""The device's readers and the CPU of their caller."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.transports.server_lab import Server, mirror, wait_for

CPUS = sorted(os.sched_getaffinity(0))
#: Requests after which a lone caller has been followed.
SOME = 200

in_c = pytest.mark.usefixtures("_in_c")


@pytest.fixture
def _in_c() -> None:
    pytest.importorskip("sdeefs.transports._device", reason="needs the C extensions")
    if len(CPUS) < 2:
        pytest.skip("needs two CPUs")


@pytest.fixture
def server(source: Path, root: Path) -> Iterator[Server]:
    with mirror(source, root, "device") as running:
        yield running


def ask_from(cpu: int, root: Path, name: str, requests: int = SOME) -> int:
    """A process bound to a CPU that looks for names that aren't there; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.sched_setaffinity(0, {cpu})
        for number in range(requests):
            (root / f"{name}{number}").exists()
        os._exit(0)
    finally:
        os._exit(1)


def ends(*pids: int) -> None:
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * len(pids)


def bound_to(server: Server) -> list[int]:
    """The CPUs of those of the server's threads that may use one only."""
    allowed = [
        os.sched_getaffinity(int(task.name))
        for task in Path(f"/proc/{server.process.pid}/task").iterdir()
    ]
    return [cpu for cpus in allowed if len(cpus) == 1 for cpu in cpus]


@in_c
def test_readers_follow_a_lone_caller(server: Server, root: Path) -> None:
    assert bound_to(server) == []
    names = itertools.count()

    def have_followed_to(cpu: int) -> bool:
        """One caller is enough on a quiet machine; on a busy one they may have given up on it."""
        ends(ask_from(cpu, root, f"turn{next(names)}-"))
        return bound_to(server) == [cpu, cpu]

    for cpu in (*CPUS[:2], CPUS[0]):
        wait_for(lambda cpu=cpu: have_followed_to(cpu), f"both readers on CPU {cpu}")


@in_c
def test_readers_of_many_callers_are_free(server: Server, root: Path) -> None:
    ends(ask_from(CPUS[0], root, "alone"))
    assert bound_to(server)
    callers = [
        ask_from(cpu, root, f"many{number}-", 1_000_000) for number, cpu in enumerate(CPUS[:2] * 2)
    ]
    try:
        wait_for(lambda: bound_to(server) == [], "readers that may use every CPU")
    finally:
        for pid in callers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@in_c
def test_other_threads_are_not_bound(server: Server, root: Path) -> None:
    """A reader's threads inherit its CPUs from it, unless they see to it."""
    ends(ask_from(CPUS[1], root, "first"))
    for turn in range(3):
        (root / f"made{turn}").write_bytes(b"x")
        (root / f"made{turn}").unlink()
    ends(ask_from(CPUS[1], root, "second"))
    assert sorted(bound_to(server)) == [CPUS[1]] * 2
