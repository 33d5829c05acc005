"""Several processes at once, and quick answers while a large file is copied up."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fslab import fslab_lab as lab

ENGINES = lab.chosen(lab.RING, lab.WRITEBACK, lab.PYFUSE3)
#: Few enough files that workers meet at them.
FILES, WORKERS, TURNS = 2_000, 8, 200


def worker(merged: Path, index: int) -> Callable[[], object]:
    """Reads everybody's files, and changes those whose number is its own modulo WORKERS."""

    def work() -> None:
        rng = random.Random(index)
        for turn in range(TURNS):
            number = rng.randrange(FILES)
            path = merged / f"d{number % 50}/f{number}"
            if number % WORKERS == index:
                action = rng.randrange(4)
                if action == 0:
                    path.write_text(f"{number} by {index} in turn {turn}\n")
                elif action == 1:
                    path.unlink(missing_ok=True)
                elif action == 2:
                    new = path.with_name(f"new{number}")
                    new.write_text(f"{number} new\n")
                    os.rename(new, path)
                else:
                    try:
                        os.chmod(path, 0o600 + rng.randrange(0o100))
                    except FileNotFoundError:
                        continue
            else:
                try:
                    text = path.read_text()
                except FileNotFoundError:
                    continue
                # a file shows its own content or, while it is written anew, none
                if text and int(text.split()[0]) != number:
                    raise OSError(200, f"{path} has another file's data: {text}")
            if turn % 100 == 0:
                os.listdir(merged / f"d{number % 50}")

    return work


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_readers_and_writers(engine: lab.Engine) -> None:
    with lab.workspace("busy") as base:
        layers = lab.Layers.make(base)
        for directory in range(50):
            (layers.lowers[0] / f"d{directory}").mkdir()
        for number in range(FILES):
            (layers.lowers[0] / f"d{number % 50}/f{number}").write_text(f"{number} of lower\n")
        with lab.mounted(engine, layers):
            children = [lab.in_child(worker(layers.merged, n)) for n in range(WORKERS)]
            assert [lab.child_result(pid) for pid in children] == [0] * WORKERS
            for directory in range(50):
                for name in os.listdir(layers.merged / f"d{directory}"):
                    assert name.startswith("f")
                    text = (layers.merged / f"d{directory}/{name}").read_text()
                    assert int(text.split()[0]) == int(name[1:])


@pytest.mark.parametrize("engine", lab.chosen(lab.RING, lab.PYFUSE3), ids=lambda e: e.name)
def test_stat_while_a_large_file_is_copied_up(
    engine: lab.Engine, record_property: Callable[[str, object], None]
) -> None:
    """It completes; p50 and p99 of the probe are reported, not asserted."""
    with lab.workspace("probe") as base, lab.filesystem("tmpfs", base) as fs:
        made = lab.Layers.make(base)
        layers = lab.Layers(base, fs / "u", made.lowers, fs / "w", made.merged)
        (fs / "u").mkdir()
        (fs / "w").mkdir()
        with open(layers.lowers[0] / "big", "wb") as file:
            for _ in range(96):
                file.write(os.urandom(1 << 20))
        for number in range(500):
            (layers.lowers[0] / f"f{number}").touch()
        with lab.mounted(engine, layers, "timeout=0"):
            child = lab.in_child(lambda: os.chmod(layers.merged / "big", 0o600))
            times: list[float] = []
            while os.waitpid(child, os.WNOHANG)[0] == 0:
                start = time.perf_counter()
                os.stat(layers.merged / f"f{len(times) % 500}")
                times.append(time.perf_counter() - start)
            assert (layers.merged / "big").stat().st_mode & 0o777 == 0o600
            times.sort()
            if times:
                record_property("p50_us", round(times[len(times) // 2] * 1e6))
                record_property("p99_us", round(times[len(times) * 99 // 100] * 1e6))
