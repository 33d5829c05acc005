"""The benchmark's own logic: interleaving, going on after a stop, tables, missing peers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from perf import report
from perf.__main__ import main, publish
from perf.programs import compiled
from perf.runner import MILLISECONDS, OPERATIONS, Block, Figure, Missing, run
from perf.tables import markdown, ratio


def _block(name: str, log: list[str], values: list[float]) -> Block:
    def measure() -> dict[str, float]:
        log.append(name)
        return {"line": values.pop(0)}

    return Block(name, {"line": MILLISECONDS}, measure)


def test_rounds_are_interleaved_and_the_median_counts(tmp_path: Path) -> None:
    log: list[str] = []
    blocks = [_block("a", log, [1.0, 9.0, 2.0]), _block("b", log, [4.0, 4.0, 4.0])]
    a, b = run(blocks, 3, tmp_path / "x.jsonl")
    assert log == ["a", "b"] * 3
    assert (a.median, b.median) == (2.0, 4.0)
    assert ratio(b, a) == 2.0


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    log: list[str] = []
    journal = tmp_path / "x.jsonl"
    run([_block("a", log, [1.0, 2.0])], 2, journal)
    journal.write_text(journal.read_text() + '{"line": "li')  # killed while it wrote
    (figure,) = run([_block("a", log, [3.0])], 3, journal)
    assert figure.values == (1.0, 2.0, 3.0)
    assert log == ["a", "a", "a"]


def test_a_missing_peer_is_named(tmp_path: Path) -> None:
    def measure() -> dict[str, float]:
        raise Missing("docker isn't installed")

    (figure,) = run([Block("docker", {"line": MILLISECONDS}, measure)], 2, tmp_path / "x")
    assert figure.missing == "docker isn't installed"
    assert "docker isn't installed" in markdown([figure], "docker")


def test_rates_and_times_give_the_same_kind_of_ratio() -> None:
    slow = Figure("l", "slow", "op/s", True, (10.0,))
    fast = Figure("l", "fast", "op/s", True, (20.0,))
    assert ratio(slow, fast) == 2.0
    assert "10.0 ±0% (2.00×)" in markdown([slow, fast], "fast")


def test_the_report_is_made_from_the_json(tmp_path: Path) -> None:
    figures = (
        Figure("write", "base", OPERATIONS.name, True, (100.0, 110.0)),
        Figure("write", "other", OPERATIONS.name, True, (50.0, 60.0)),
    )
    report.write(report.Section("fs", "Files", "base", figures, "python -m perf fs"), tmp_path)
    for name in ("fs.json", "fs.svg", "report.md", "index.html"):
        assert (tmp_path / name).stat().st_size > 100
    assert report.from_json(json.loads((tmp_path / "fs.json").read_text())).figures == figures
    page = tmp_path / "page.md"
    assert publish(tmp_path, page) == 0
    first = page.read_text()
    assert "| write [op/s] |" in first
    assert publish(tmp_path, page) == 0
    assert page.read_text() == first


def test_publishing_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", "--out", str(tmp_path), str(tmp_path / "page.md")]) == 1
    assert "has no figures" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["integers", "floats", "pipe", "switch", "process", "execl"])
def test_drivers_measure_something(line: str, tmp_path: Path) -> None:
    program = compiled("unixlike", tmp_path)
    done = subprocess.run(
        [str(program), line, "0.05"], check=True, capture_output=True, text=True, timeout=60
    )
    assert float(done.stdout) > 0


@pytest.mark.parametrize("kernel", ["ep", "is", "cg", "mg"])
def test_kernels_run(kernel: str, tmp_path: Path) -> None:
    program = compiled("kernels", tmp_path)
    done = subprocess.run(
        [str(program), kernel, "1"], check=True, capture_output=True, text=True, timeout=60
    )
    assert float(done.stdout) > 0


def test_overall_measures_and_writes_a_page(tmp_path: Path) -> None:
    words = ["overall", "--quick", "--rounds", "1", "--only", "bare", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "perf", *words], capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    assert "pipe throughput" in (tmp_path / "report.md").read_text()
