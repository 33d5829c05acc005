"""The POSIX checks on ext4, on kernel overlayfs and on sdeefs with every transport and data path;
on objects of lower (each check then copies up) and on objects made in merged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fslab import fslab_lab as lab
from tests.fslab.posix_checks import CHECKS, Place

ENGINES = lab.chosen(lab.PLAIN, lab.KERNEL, *lab.SDEEFS)

#: Where kernel overlayfs itself isn't POSIX (Linux 6.18), so that it is no yardstick.
KERNEL_DEVIATES = {
    "unlinked_but_open_for_reading": "fchmod of a lower file that was unlinked fails, EEXIST",
    "seek_hole_and_data": "copy-up fills holes smaller than its steps",
}


@dataclass
class Prepared:
    """One mount with a directory for each check, prepared in lower."""

    mounted: lab.Mounted
    checks: dict[str, tuple[Place, Iterator[None]]]


@pytest.fixture(scope="module", params=ENGINES, ids=lambda engine: engine.name)
def prepared(request: pytest.FixtureRequest) -> Iterator[Prepared]:
    engine: lab.Engine = request.param
    with lab.workspace(engine.name) as base:
        layers = lab.Layers.make(base)
        checks = {}
        for name, check in CHECKS.items():
            directory = layers.lowers[0] / name
            directory.mkdir()
            place = Place(directory, engine.lacks, engine.kind != "plain")
            steps = check(place)
            next(steps)
            checks[name] = (place, steps)
        if engine.kind == "plain":
            (base / "plain").symlink_to(layers.lowers[0])
        with lab.mounted(engine, layers) as live:
            yield Prepared(live, checks)


def finish(place: Place, steps: Iterator[None]) -> None:
    """Run the part of a check that follows its preparation."""
    try:
        assert next(steps, "end") == "end"
    finally:
        place.close_all()


@pytest.mark.parametrize("name", CHECKS)
def test_posix_on_lower(prepared: Prepared, name: str) -> None:
    place, steps = prepared.checks[name]
    place.root = Path(prepared.mounted.point.resolve() / name)
    prepared.mounted.alive()
    if prepared.mounted.engine.kind == "kernel" and name in KERNEL_DEVIATES:
        place.close_all()
        return
    finish(place, steps)


@pytest.mark.parametrize("name", CHECKS)
def test_posix_in_merged(prepared: Prepared, name: str) -> None:
    engine = prepared.mounted.engine
    if engine.kind == "plain":
        return  # the same as on lower
    directory = prepared.mounted.point / f"new-{name}"
    directory.mkdir()
    place = Place(directory, engine.lacks, union=True)
    steps = CHECKS[name](place)
    next(steps)
    place.fds.clear()
    prepared.mounted.alive()
    finish(place, steps)
