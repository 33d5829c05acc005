"""Ratios, tables, and the page of one run or of several."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from perf import comparisons, report
from perf.__main__ import main
from perf.figures import OPERATIONS, Figure, interval, ratio
from perf.publish import publish
from perf.report import Section
from perf.tables import absentees, markdown, number, resolution


def _figure(line: str, contender: str, *values: float) -> Figure:
    return Figure(line, contender, "s", False, values)


def test_rates_and_times_give_the_same_kind_of_ratio() -> None:
    slow = Figure("l", "slow", "op/s", True, (10.0,))
    fast = Figure("l", "fast", "op/s", True, (20.0,))
    times = ratio(slow, fast)
    assert times is not None
    assert times.value == 2.0
    assert "10.0 ±0% (2.00×)" in markdown([slow, fast], "fast")


def test_the_ratio_is_paired_so_that_a_slow_machine_counts_for_both() -> None:
    speeds = [1.0, 3.0, 1.1, 2.9, 1.0, 3.2, 1.0, 0.9, 3.0, 1.0]
    base = _figure("l", "base", *speeds)
    other = _figure("l", "other", *(speed * 1.01 for speed in speeds))
    times = ratio(other, base)
    assert times is not None
    assert times.value == pytest.approx(1.01)
    assert times.uncertainty < 1e-9
    assert "(1.010× ±0%)" in markdown([base, other], "base")
    assert "Resolution: the 95 % interval of a ratio is ±0%" in resolution([base, other], "base")
    assert resolution([_figure("l", "base", 1.0), _figure("l", "other", 1.0)], "base") == ""


def test_rounds_that_only_one_has_dont_count() -> None:
    times = ratio(_figure("l", "other", 2.0, 4.0, 100.0), _figure("l", "base", 1.0, 2.0))
    assert times is not None
    assert times.value == 2.0


@pytest.mark.parametrize(
    ("count", "ranks"), [(3, (0, 2)), (6, (0, 5)), (10, (1, 8)), (20, (5, 14)), (100, (40, 59))]
)
def test_the_interval_of_a_median(count: int, ranks: tuple[int, int]) -> None:
    assert interval([float(n) for n in range(count)]) == ranks


def test_the_spread_of_many_rounds_is_that_of_the_quartiles() -> None:
    assert _figure("l", "c", 1.0, 2.0, 3.0).spread == 0.5
    assert _figure("l", "c", *([10.0] * 9), 99.0).spread < 0.01


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.00123, "0.0012"), (1.234, "1.23"), (12345.6, "12,346")]
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_who_is_missing_everywhere_is_named_once_and_who_misses_a_line_there() -> None:
    figures = [
        _figure("a", "base | x", 1.0),
        Figure("a", "docker", "s", False, (), "no docker daemon runs on this machine"),
        _figure("b", "base | x", 1.0),
        Figure("b", "docker", "s", False, (), "no docker daemon runs on this machine"),
        Figure("a", "crun", "s", False, (), "too old"),
        _figure("b", "crun", 2.0),
    ]
    text = markdown(figures, "base | x")
    assert absentees(figures) == {"docker": "no docker daemon runs on this machine"}
    assert text.count("no docker daemon") == 1
    assert "|  | base \\| x | crun |" in text
    assert "missing: too old" in text


def test_who_fails_later_keeps_what_was_measured_and_says_so() -> None:
    figures = [_figure("a", "base", 1.0, 1.0), Figure("a", "x", "s", False, (2.0,), "refused")]
    assert "2 ±0% (2.00×); in round 2: refused" in markdown(figures, "base")
    assert absentees(figures) == {}


def _section(name: str, *figures: Figure, command: str = "python -m perf x") -> Section:
    return Section(name, name.title(), "base", figures, command, (f"Notes of {command}.",))


def test_the_report_is_made_from_the_json(tmp_path: Path) -> None:
    figures = (
        Figure("write", "base", OPERATIONS.name, True, (100.0, 110.0)),
        Figure("write", "other", OPERATIONS.name, True, (50.0, 60.0)),
    )
    report.write(_section("fs", *figures), tmp_path)
    assert report.from_json(json.loads((tmp_path / "fs.json").read_text())).figures == figures
    assert "<svg" in (tmp_path / "index.html").read_text()
    assert "| write [op/s] |" in (tmp_path / "report.md").read_text()
    page = tmp_path / "page.md"
    assert publish([tmp_path], page) == 0
    first = page.read_text()
    assert "| write [op/s] |" in first
    assert "Notes of python -m perf x." in first
    assert publish([tmp_path], page) == 0
    assert page.read_text() == first


def test_figures_of_an_older_format_without_notes_are_read(tmp_path: Path) -> None:
    report.write(_section("fs", _figure("l", "base", 1.0)), tmp_path)
    data = json.loads((tmp_path / "fs.json").read_text())
    del data["notes"]
    assert report.from_json(data).notes == ()


def test_several_directories_become_one_page_in_the_order_of_the_suites(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    report.write(_section("deploy", _figure("l", "base", 1.0)), one)
    figures = (_figure("a", "base", 1.0), _figure("b", "base", 1.0), _figure("b", "old", 1.0))
    report.write(_section("fs", *figures, command="perf earlier"), one)
    report.write(_section("fs", _figure("b", "base", 7.0), command="perf later"), two)
    report.write(_section("overall", _figure("l", "base", 1.0)), two)
    sections, _ = report.read([one, two])
    assert [section.name for section in sections] == ["overall", "fs", "deploy"]
    # A line comes whole from one run: what `old` had in the earlier one has nothing to compare with.
    assert [(f.line, f.contender, f.values) for f in sections[1].figures] == [
        ("a", "base", (1.0,)),
        ("b", "base", (7.0,)),
    ]
    assert sections[1].command == "perf earlier\nperf later"
    page = tmp_path / "page.html"
    words = ["publish", "--out", str(one), "--out", str(two), str(page)]
    assert main(words) == 0
    assert "perf earlier\nperf later" in page.read_text()


def test_publishing_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", "--out", str(tmp_path), str(tmp_path / "page.md")]) == 1
    assert "no figures" in capsys.readouterr().err
    assert main(["fs", "--out", "a", "--out", "b"]) == 2


def test_a_page_without_marks_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = _section("fs", _figure("l", "base", 1.0))
    report.write(replace(section, name="fs"), tmp_path)
    page = tmp_path / "page.md"
    page.write_text("mine\n")
    assert publish([tmp_path], page) == 1
    assert "has no lines" in capsys.readouterr().err
    assert page.read_text() == "mine\n"


def test_file_systems_are_set_beside_the_aims_and_the_peers() -> None:
    figures = [
        _figure(line, name, *seconds)
        for line in ("tar x", "open+close")
        for name, seconds in (
            ("overlayfs", (1.0, 2.0, 1.0)),
            ("sdeefs ring", (3.0, 6.0, 3.0)),
            ("sdeefs device", (4.0, 8.0, 5.0)),
            ("fuse-overlayfs 1.10", (6.0, 12.0, 1.0)),
            ("fuse-overlayfs 2.0", (1.5, 3.0, 1.5)),
            ("floor, computed", (2.0, 4.0, 2.0)),
        )
    ]
    figures.append(Figure("tar x: waited for", "floor, computed", "requests", False, (2468.0,)))
    (aims, beside), (peers, faster) = comparisons.tables(figures, "overlayfs")
    assert "overlayfs" in aims
    assert beside.rows == (("tar x", ("2,468", "2.5", "2.00", "3.00", "4.00")),)
    assert "slower" in peers
    assert [line for line, _ in faster.rows] == ["tar x", "open+close"]
    assert faster.rows[0][1] == ("2.00", "0.50", "1.50", "0.38")
    assert comparisons.tables([_figure("pipes", "bare metal", 1.0)], "bare metal") == []
