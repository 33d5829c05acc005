"""A directory of 100,000 entries, half of lower and half of upper."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fslab import fslab_lab as lab


@pytest.mark.parametrize("engine", lab.chosen(lab.RING, lab.PYFUSE3), ids=lambda e: e.name)
def test_one_hundred_thousand_entries(engine: lab.Engine) -> None:
    with lab.workspace("listing", Path("/dev/shm")) as base:
        layers = lab.Layers.make(base)
        assert layers.upper is not None
        for directory in (layers.upper, layers.lowers[0]):
            (directory / "big").mkdir()
        origin = layers.upper / "big/0"
        origin.touch()
        # Most are links of one file, which are made faster.
        for number in range(1, 50_000):
            os.link(origin, layers.upper / f"big/{number}")
        origin = layers.lowers[0] / "big/100000"
        origin.touch()
        for number in range(100_001, 150_000):
            os.link(origin, layers.lowers[0] / f"big/{number}")
        (layers.lowers[0] / "big/77").touch()  # hidden by upper's
        with lab.mounted(engine, layers, "index=off"):
            big = layers.merged / "big"
            names = os.listdir(big)
            assert len(names) == 100_000
            assert {int(name) for name in names} == {*range(50_000), *range(100_000, 150_000)}
            os.unlink(big / "100007")
            os.unlink(big / "7")
            (big / "new").touch()
            assert len(os.listdir(big)) == 99_999
            with os.scandir(big) as entries:
                assert sum(entry.is_file() for entry in entries) == 99_999
