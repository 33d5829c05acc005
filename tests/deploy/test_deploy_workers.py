"""Threads that bring results in order, and hand on what went wrong."""

from __future__ import annotations

import random
import threading
import time

import pytest

from sdee_launch.deploy.workers import Workers


def test_results_come_in_order_and_one_at_a_time() -> None:
    brought: list[bytes] = []
    busy = threading.Lock()

    def bring(data: bytes) -> None:
        assert busy.acquire(blocking=False)
        brought.append(data)
        busy.release()

    def slow(data: bytes) -> bytes:
        time.sleep(random.random() / 500)
        return data

    workers = Workers(4, bring)
    tasks = [b"%d" % number for number in range(200)]
    for task in tasks:
        workers.start(slow, task)
        workers.wait(5)
    workers.wait()
    workers.stop()
    assert brought == tasks


@pytest.mark.parametrize("place", ["work", "bring"])
def test_what_fails_is_told_and_nothing_after_it_is_brought(place: str) -> None:
    brought: list[bytes] = []

    def work(data: bytes) -> bytes:
        if place == "work" and data == b"3":
            raise OSError(28, "No space left on device")
        return data

    def bring(data: bytes) -> None:
        if place == "bring" and data == b"3":
            raise OSError(28, "No space left on device")
        brought.append(data)

    workers = Workers(3, bring)
    for number in range(10):
        workers.start(work, b"%d" % number)
    with pytest.raises(OSError, match="No space"):
        workers.wait()
    workers.stop()
    assert brought == [b"0", b"1", b"2"]


def test_stop_doesn_t_wait_for_what_wasn_t_begun() -> None:
    started = time.monotonic()
    workers: Workers[None] = Workers(1, lambda _: None)
    for _ in range(100):
        workers.start(lambda data: time.sleep(0.05), b"")
    workers.stop()
    assert time.monotonic() - started < 3
    assert threading.active_count() < 20
