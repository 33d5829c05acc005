"""Small real runs of what is measured of a mounted filesystem."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from perf import calls, filesystems, fio, floor, fs, metadata, server, trees
from perf.figures import Missing
from perf.filesystems import Contender, contenders, mounted

BY_NAME = {one.name: one for one in contenders()}
OVERLAYFS, SDEEFS = BY_NAME["overlayfs"], BY_NAME["sdeefs device"]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layers")


@pytest.fixture(scope="module")
def lower(scratch: Path) -> Path:
    lower = scratch / "lower"
    lower.mkdir()
    trees.tree(lower / "tree", 60)
    trees.archive(scratch / "tree.tar", lower / "tree")
    trees.repository(lower / "git", trees.tree(scratch / "sources", 30))
    trees.flat(lower / "flat", 500)
    trees.modules(lower, 5)
    trees.wheel(scratch, 5)
    trees.data_file(lower / "data", 1 << 20)
    return lower


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "SETTLE", 0.0)


def test_calls_and_callers(lower: Path, scratch: Path) -> None:
    one, several = calls.blocks(OVERLAYFS, lower, scratch, 100)
    found = one.run()
    assert set(found) == set(one.lines)
    assert all(value > 0 for value in found.values())
    found = several.run()
    assert set(found) == set(several.lines)
    assert "8 callers at once: stat cold, total" in found
    assert all(value > 100 for value in found.values())


def test_a_caller_that_fails_is_seen(tmp_path: Path) -> None:
    with pytest.raises(Missing, match="1 of 2 callers failed"):
        calls.at_once([[os.fsencode(tmp_path)], [os.fsencode(tmp_path / "absent")]])


def test_mean_and_median_of_calls() -> None:
    slow = iter([True, False, False, False, False])
    mean, median = calls.each([b""] * 5, lambda _: time.sleep(0.02) if next(slow) else None)
    assert mean > 3000
    assert median < 1000


def test_trees(lower: Path, scratch: Path) -> None:
    (block,) = metadata.blocks(SDEEFS, lower, scratch, scratch / "tree.tar")
    found = block.run()
    assert set(found) == set(block.lines)
    assert all(value > 0 for value in found.values())


def test_the_floor_is_what_the_plain_one_takes_and_the_way_of_each_request(
    lower: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "GETATTRS", 500)
    everyone = [BY_NAME["plain"], BY_NAME["sdeefs ring"]]
    (block,) = floor.blocks(everyone, lower, scratch, scratch / "tree.tar")
    found = block.run()
    assert set(found) == set(block.lines)
    assert 0 < found[server.TRIP_LINE] < 10_000
    # 60 files, in each of which LOOKUP, CREATE and three SETATTR are somebody's to wait for.
    assert 60 * 5 < found[floor.requests_line("tar x")] < 60 * 20
    for line in floor.LINES:
        trips = found[floor.requests_line(line)] * found[server.TRIP_LINE] / 1e6
        assert found[line] > trips
    assert "rm -r lower" not in found


def test_git_reads_no_file_again_that_its_index_knows(lower: Path) -> None:
    """As it does with those that are as young as the index itself."""
    index = (lower / "git/.git/index").stat().st_mtime
    files = list((lower / "git").rglob("*.txt"))
    assert len(files) == 30
    assert all(file.stat().st_mtime < index - 10 for file in files)


def test_fio(lower: Path, scratch: Path) -> None:
    for block in fio.blocks(OVERLAYFS, lower, scratch, 1 << 20, 20):
        found = block.run()
        assert set(found) == set(block.lines)
        assert all(value > 0 for value in found.values())


def _at_rest(pid: int) -> None:
    """Wait until a server that has just been mounted has done what it does then."""
    deadline = time.monotonic() + 30
    before = server.cpu_time([pid])
    while True:
        time.sleep(0.3)
        now = server.cpu_time([pid])
        if sum(server.split(before, now)) < 0.001:
            return
        assert time.monotonic() < deadline, "it doesn't come to rest"
        before = now


def test_the_server_is_found_by_its_mount_and_its_cpu_time_counted(
    lower: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted(SDEEFS, lower, scratch) as layers:
        (pid,) = server.servers_of(layers.merged)
        assert b"sdeefs" in Path(f"/proc/{pid}/cmdline").read_bytes()
        _at_rest(pid)
        before = server.cpu_time([pid])
        server.getattrs([os.fsencode(layers.merged / "flat/file1")], 5000)
        asked = sum(server.split(before, server.cpu_time([pid])))
        before = server.cpu_time([pid])
        for _ in range(5000):  # these come from the kernel's cache
            os.stat(layers.merged / "flat/file1")
        assert asked > 5 * sum(server.split(before, server.cpu_time([pid])))
    with pytest.raises(Missing, match="nothing is mounted"):
        server.servers_of(layers.merged)
    monkeypatch.setattr(server, "GETATTRS", 500)
    monkeypatch.setattr(server, "CREATES", 50)
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.2)
    idle = server.Idle([SDEEFS], lower, scratch)
    for block in server.blocks(SDEEFS, lower, scratch, idle):
        found = block.run()
        assert set(found) == set(block.lines)
        assert all(value >= 0 for value in found.values())
    assert server.blocks(OVERLAYFS, lower, scratch, idle) == []


def test_user_and_system_share_what_the_scheduler_counted() -> None:
    zero = server.CpuTime(0, 0, 0)
    assert server.split(zero, server.CpuTime(0.03, 0.01, 0.048)) == pytest.approx((0.036, 0.012))
    assert server.split(zero, server.CpuTime(0, 0, 0.004)) == pytest.approx((0.002, 0.002))
    # A thread has ended, and its share of the scheduler's sum is gone.
    assert server.split(zero, server.CpuTime(0.3, 0.1, 0.1)) == pytest.approx((0.3, 0.1))


def test_all_servers_rest_at_once_and_each_round_anew(
    lower: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.1)
    broken = Contender("broken", ("sh", "-c", "echo it refuses >&2; exit 1"))
    idle = server.Idle([SDEEFS, broken], lower, scratch)
    measured = []
    whole = idle._measure
    monkeypatch.setattr(idle, "_measure", lambda: measured.append(1) or whole())
    for _ in range(2):
        with pytest.raises(Missing, match="it refuses"):
            idle.take(broken)
        assert idle.take(SDEEFS)[server.IDLE_LINE] >= 0
    assert len(measured) == 2


def test_a_quick_run_leaves_variants_out_unless_they_are_named() -> None:
    assert "sdeefs pyfuse3" in fs.left_out(True, None)
    assert "overlayfs" not in fs.left_out(True, None)
    assert fs.left_out(True, "pyfuse3") == fs.left_out(False, None) == []
