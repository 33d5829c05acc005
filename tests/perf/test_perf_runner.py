"""Interleaving, going on after a stop, peers that are missing or fail."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from perf.__main__ import chosen
from perf.failures import reason
from perf.figures import MILLISECONDS, Missing, ratio
from perf.runner import Block, order, run
from perf.timing import seconds_of


def _block(name: str, log: list[str], values: list[float], line: str = "line") -> Block:
    def measure() -> dict[str, float]:
        log.append(name)
        return {line: values.pop(0)}

    return Block(name, {line: MILLISECONDS}, measure)


def _raising(error: Exception) -> Callable[[], dict[str, float]]:
    def measure() -> dict[str, float]:
        raise error

    return measure


def test_rounds_are_interleaved_and_the_median_counts(tmp_path: Path) -> None:
    log: list[str] = []
    blocks = [_block("a", log, [1.0, 9.0, 2.0]), _block("b", log, [4.0, 4.0, 4.0])]
    a, b = run(blocks, 3, tmp_path / "x.jsonl")
    assert [sorted(log[n : n + 2]) for n in (0, 2, 4)] == [["a", "b"]] * 3
    assert (a.median, b.median) == (2.0, 4.0)


def test_a_round_goes_line_by_line_each_time_in_another_order() -> None:
    blocks = [_block(name, [], [], line) for name in "abcd" for line in ("one", "two")]
    seen = set()
    for number in range(10):
        places = order(blocks, number)
        assert sorted(places) == list(range(8))
        assert [next(iter(blocks[i].lines)) for i in places] == ["one"] * 4 + ["two"] * 4
        seen.add(tuple(places[:4]))
        assert places == order(blocks, number)
    assert len(seen) > 5


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    log: list[str] = []
    journal = tmp_path / "x.jsonl"
    run([_block("a", log, [1.0, 2.0])], 2, journal)
    journal.write_text(journal.read_text() + '{"line": "li')  # killed while it wrote
    (figure,) = run([_block("a", log, [3.0])], 3, journal)
    assert figure.values == (1.0, 2.0, 3.0)
    assert log == ["a", "a", "a"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (Missing("docker isn't installed"), "docker isn't installed"),
        (subprocess.CalledProcessError(1, "x", stderr=b"no such image\n"), "no such image"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_a_peer_that_is_missing_or_fails_is_named_and_the_rest_runs(
    error: Exception, told: str, tmp_path: Path
) -> None:
    log: list[str] = []
    blocks = [Block("peer", {"line": MILLISECONDS}, _raising(error)), _block("b", log, [1.0, 2.0])]
    peer, other = run(blocks, 2, tmp_path / "x")
    assert told in peer.missing
    assert other.values == (1.0, 2.0)
    assert ratio(other, peer) is None


def test_the_line_that_tells_why_isnt_the_hint_after_it() -> None:
    said = b"docker: Cannot connect to the Docker daemon.\n\nRun 'docker run --help' for more information\n"
    assert reason(said, "?") == "docker: Cannot connect to the Docker daemon."
    assert reason("usage: x\n", "?") == "usage: x"
    assert reason(b"", "exit status 3") == "exit status 3"


def test_only_and_lines_choose(tmp_path: Path) -> None:
    blocks = [_block(name, [], [], line) for name in ("base", "a 1", "b 2") for line in ("x", "y")]

    def left(only: str | None, lines: str | None) -> list[tuple[str, str]]:
        return [(b.contender, *b.lines) for b in chosen(blocks, "base", only, lines)]  # type: ignore[misc]

    assert left("a", "y") == [("base", "y"), ("a 1", "y")]
    assert left("1,2", "x") == [("base", "x"), ("a 1", "x"), ("b 2", "x")]
    with pytest.raises(Missing, match="nothing to measure"):
        left(None, "z")


def test_a_command_is_timed_to_its_end_and_not_to_a_poll_after_it() -> None:
    times = sorted(seconds_of(["sleep", "0.1"]) for _ in range(5))
    assert 0.1 <= times[0] < 0.115  # subprocess.run(timeout=) finds it after 0.127


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["sh", "-c", "echo it is broken >&2; exit 3"], "it is broken"),
        (["sh", "-c", "exit 3"], "exit status 3"),
        (["sleep", "9"], "didn't end within"),
        (["/nonexistent"], "No such file"),
    ],
)
def test_a_command_that_fails_tells_why(command: list[str], told: str) -> None:
    with pytest.raises(Missing, match=told):
        seconds_of(command, timeout=0.3)
