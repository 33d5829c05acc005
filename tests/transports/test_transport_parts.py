"""The transports' parts that need no mount: numbers, workers, backing ids, plans of rings."""

from __future__ import annotations

import errno
import logging
import os
import threading

import pytest
import trio

from sdeefs.transports import choose, ring
from sdeefs.transports.backing import CACHED, BackingIds
from sdeefs.transports.connection import caller_is_killed, error_number
from sdeefs.transports.pyfuse3_transport import Numbers, _Handlers
from sdeefs.transports.requests import forget_each
from sdeefs.transports.scheduling import Scheduling
from sdeefs.transports.transport import TransportOptions
from sdeefs.transports.workers import Workers
from tests.transports.server_lab import DEADLINE, wait_for


def test_numbers_are_inode_numbers() -> None:
    numbers = Numbers()
    assert numbers.seen(5, 77) == 77
    assert numbers.seen(5, 77) == 77
    assert numbers.node(77) == 5 and numbers.number(5) == 77
    assert numbers.seen(1, 4242) == 1 and numbers.node(1) == 1
    assert numbers.forget(77, 1) == [(5, 1)]
    assert numbers.node(77) == 5
    assert numbers.forget(77, 1) == [(5, 1)]
    with pytest.raises(OSError) as caught:
        numbers.node(77)
    assert caught.value.errno == errno.ESTALE
    assert numbers.number(5) is None


class _Forgetful:
    """A core of which some FORGETs fail: one as the system has it, one by a defect of ours."""

    def __init__(self) -> None:
        self.failing = {11: OSError(errno.EIO, "lost"), 13: KeyError("a defect")}
        self.forgotten: list[tuple[int, int]] = []

    def forget(self, node: int, count: int) -> None:
        if node in self.failing:
            raise self.failing[node]
        self.forgotten.append((node, count))


_SAID = [
    ("DEBUG", "forgetting node 11: [Errno 5] lost"),
    ("ERROR", "forgetting node 13 failed"),
]


def test_a_forget_that_fails_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    core = _Forgetful()
    caplog.set_level(logging.DEBUG)
    forget_each(core, [(10, 1), (11, 1), (12, 2), (13, 3), (14, 4)])  # type: ignore[arg-type]
    assert core.forgotten == [(10, 1), (12, 2), (14, 4)]
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == _SAID


def test_a_forget_that_fails_does_not_end_pyfuse3(caplog: pytest.LogCaptureFixture) -> None:
    """What comes out of a handler that has no answer comes out of its loop."""
    core = _Forgetful()
    caplog.set_level(logging.DEBUG)
    handlers = _Handlers(core, TransportOptions())  # type: ignore[arg-type]
    for node in range(10, 15):
        handlers.numbers.seen(node, 100 + node)
    trio.run(handlers.forget, [(number, 1) for number in range(110, 115)])
    assert core.forgotten == [(10, 1), (12, 1), (14, 1)]
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == _SAID


def test_a_file_that_got_another_node() -> None:
    numbers = Numbers()
    assert numbers.seen(5, 77) == 77 and numbers.seen(5, 77) == 77
    assert numbers.seen(6, 77) == 77
    assert numbers.node(77) == 6
    # Every look-up goes back to the node that it was of.
    assert numbers.forget(77, 3) == [(5, 2), (6, 1)]
    numbers = Numbers(distinct=True)
    assert numbers.seen(5, 77) == 77
    other = numbers.seen(6, 77)
    assert other != 77 and numbers.node(other) == 6 and numbers.node(77) == 5


def test_the_roots_number_is_nobody_elses() -> None:
    numbers = Numbers()
    assert numbers.seen(5, 1) not in (0, 1)


def test_workers_work_and_end() -> None:
    workers = Workers(3)
    gate, done = threading.Event(), []
    for i in range(6):
        workers.submit(i, lambda i=i: (gate.wait(DEADLINE), done.append(i)))  # type: ignore[misc]
    wait_for(lambda: len(workers._jobs) == 3, "three to be taken")
    assert not workers.take_back(0)
    assert workers.take_back(5)
    assert not workers.take_back(5)
    gate.set()
    wait_for(lambda: len(done) == 5, "all to be done")
    assert sorted(done) == [0, 1, 2, 3, 4]
    assert workers.end(DEADLINE)
    workers.submit(9, lambda: done.append(9))
    assert 9 not in done


def test_a_worker_survives_a_fault(caplog: pytest.LogCaptureFixture) -> None:
    workers = Workers(1)
    done = threading.Event()
    workers.submit(1, lambda: [][0])
    workers.submit(2, done.set)
    assert done.wait(DEADLINE)
    assert "IndexError" in caplog.text
    assert workers.end(DEADLINE)


def test_without_threads_the_work_is_done_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    workers, done = Workers(2), list[int]()

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for number in range(3):
            workers.submit(number, lambda number=number: done.append(number))
        assert done == [0, 1, 2]
    there = threading.Event()
    workers.submit(4, there.set)
    assert there.wait(10)
    assert workers.end(10)


def test_backing_ids_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = BackingIds(-1)
    closed: list[int] = []
    monkeypatch.setattr(ids, "_register", lambda backing: backing * 10)
    monkeypatch.setattr(ids, "_close", closed.append)
    assert ids.acquire(node=7, handle=1, backing=4) == 40
    assert ids.acquire(node=7, handle=2, backing=5) == 40  # one file per inode
    assert ids.acquire(node=7, handle=3, backing=None) == CACHED  # the kernel refuses this one
    ids.release(1)
    ids.release(3)
    ids.release(99)
    assert closed == []
    ids.release(2)
    assert closed == [40] and len(ids) == 0
    with monkeypatch.context() as patched:
        patched.setattr(ids, "_register", lambda _: CACHED)
        assert ids.acquire(node=7, handle=4, backing=4) == CACHED  # the kernel refuses the file
    assert ids.acquire(node=7, handle=5, backing=4) == CACHED  # no mixture with the page cache
    ids.release(4)
    ids.release(5)
    assert ids.acquire(node=7, handle=6, backing=4) == 40
    assert closed == [40]


def test_errors_that_the_protocol_can_carry() -> None:
    assert error_number(OSError(errno.ENOSPC, "")) == errno.ENOSPC
    assert error_number(OSError("without a number")) == errno.EIO
    assert error_number(OSError(524, "ENOTSUPP of the kernel")) == errno.EIO
    assert error_number(OSError(-1, "")) == errno.EIO


def test_who_is_killed() -> None:
    assert not caller_is_killed(os.getpid())
    assert not caller_is_killed(0)


@pytest.mark.parametrize(
    ("possible", "online", "plan"),
    [
        (1, [0], [(0, (0,))]),
        (2, [0, 1], [(0, (0,)), (1, (1,))]),
        (4, [0, 1], [(0, (0, 2)), (1, (1, 3))]),
        (5, [1, 3], [(1, (1, 0, 4)), (3, (3, 2))]),
        (3, [2], [(2, (2, 0, 1))]),
    ],
)
def test_every_possible_cpu_has_its_queue(
    possible: int, online: list[int], plan: list[tuple[int, tuple[int, ...]]]
) -> None:
    made = ring.plan(possible, online)
    assert [(part.cpu, part.queues) for part in made] == plan
    assert sorted(q for part in made for q in part.queues) == list(range(possible))


def test_lists_of_cpus() -> None:
    assert ring.parse_cpus("0-3,8,10-11\n") == [0, 1, 2, 3, 8, 10, 11]
    assert ring.parse_cpus("\n") == []


def test_the_fastest_is_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "why_not", lambda: None)
    assert choose.pick("auto").name == "ring"
    assert choose.pick("device").name == "device"
    assert choose.pick("pyfuse3").name == "pyfuse3"
    monkeypatch.setattr(ring, "why_not", lambda: "switched off")
    choice = choose.pick("auto")
    assert choice.name == "device" and "switched off" in choice.reason
    with pytest.raises(OSError, match="switched off"):
        choose.pick("ring")
    with pytest.raises(ValueError, match="carrier pigeon"):
        choose.pick("carrier pigeon")


def test_the_ring_works_on_this_machine() -> None:
    assert ring.why_not() is None
    parts = ring.plan_here()
    assert len(parts) >= len(os.sched_getaffinity(0)) >= 1


def test_threads_run_as_the_process_does_whoever_makes_them() -> None:
    here = Scheduling.here()
    seen: list[Scheduling] = []

    def answer() -> None:
        os.sched_setaffinity(0, {min(here.cpus)})
        here.answer_callers()
        seen.append(Scheduling(here.cpus, os.getpriority(os.PRIO_PROCESS, 0)))
        workers = Workers(1, here)
        workers.submit(1, lambda: seen.append(Scheduling.here()))
        wait_for(lambda: len(seen) == 2, "the worker")
        assert workers.end(DEADLINE)

    thread = threading.Thread(target=answer)
    thread.start()
    thread.join(DEADLINE)
    assert seen[0].nice < here.nice or os.geteuid()
    assert seen[1] == here == Scheduling.here()
