"""A directory of very many entries, half of lower and half of upper."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fslab import fslab_lab as lab


@pytest.mark.parametrize(
    ("engine", "count"),
    # The union is made by the core, for each transport: the slow one needn't show its size again.
    [(e, 20_000 if e == lab.PYFUSE3 else 100_000) for e in lab.chosen(lab.RING, lab.PYFUSE3)],
    ids=lambda value: getattr(value, "name", None),
)
def test_very_many_entries(engine: lab.Engine, count: int) -> None:
    half, first = count // 2, 100_000
    with lab.workspace("listing", Path("/dev/shm")) as base:
        layers = lab.Layers.make(base)
        assert layers.upper is not None
        for directory in (layers.upper, layers.lowers[0]):
            (directory / "big").mkdir()
        origin = layers.upper / "big/0"
        origin.touch()
        # Most are links of one file, which are made faster.
        for number in range(1, half):
            os.link(origin, layers.upper / f"big/{number}")
        origin = layers.lowers[0] / f"big/{first}"
        origin.touch()
        for number in range(first + 1, first + half):
            os.link(origin, layers.lowers[0] / f"big/{number}")
        (layers.lowers[0] / "big/77").touch()  # hidden by upper's
        with lab.mounted(engine, layers, "index=off"):
            big = layers.merged / "big"
            names = os.listdir(big)
            assert len(names) == count
            assert {int(name) for name in names} == {*range(half), *range(first, first + half)}
            os.unlink(big / "100007")
            os.unlink(big / "7")
            (big / "new").touch()
            assert len(os.listdir(big)) == count - 1
            with os.scandir(big) as entries:
                assert sum(entry.is_file() for entry in entries) == count - 1
