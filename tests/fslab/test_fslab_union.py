"""The union checks on kernel overlayfs and on sdeefs with every transport and data path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.fslab import fslab_lab as lab
from tests.fslab.union_checks import CHECKS, Union

#: Where kernel overlayfs (Linux 6.18) does less.
KERNEL_DEVIATES = {"copy_up_keeps_holes", "inodes_are_stable"}


@dataclass
class Laid:
    """One mount; each check's generator stands behind its preparation."""

    mounted: lab.Mounted
    checks: dict[str, tuple[Union, Iterator[None]]] = field(default_factory=dict)
    remounted: bool = False

    def remount(self) -> None:
        if not self.remounted:
            for union, _ in self.checks.values():
                union.close_all()
            self.mounted.close()
            work = self.mounted.layers.work
            assert work is not None
            left = [p for p in work.glob("work/*") if p.name != "incompat"]
            assert not left, "the work directory isn't empty after a clean end"
            self.mounted = lab.mount(self.mounted.engine, self.mounted.layers)
            self.remounted = True


@pytest.fixture(
    scope="module", params=lab.chosen(lab.KERNEL, *lab.SDEEFS), ids=lambda engine: engine.name
)
def laid(request: pytest.FixtureRequest) -> Iterator[Laid]:
    engine: lab.Engine = request.param
    with lab.workspace(f"union-{engine.name}") as base:
        layers = lab.Layers.make(base)
        assert layers.upper is not None
        checks = {}
        for name, check in CHECKS.items():
            (layers.lowers[0] / name).mkdir()
            union = Union(
                layers.merged / name, engine.lacks, True,
                lower=layers.lowers[0] / name, upper=layers.upper / name,
                kernel=engine.kind == "kernel",
            )  # fmt: skip
            steps = check(union)
            next(steps)
            checks[name] = (union, steps)
        state = Laid(lab.mount(engine, layers), checks)
        try:
            yield state
        finally:
            for union, _ in checks.values():
                union.close_all()
            state.mounted.close()


@pytest.fixture(scope="module")
def remounted(laid: Laid) -> Laid:
    """The same after a remount."""
    laid.remount()
    return laid


@pytest.mark.parametrize("name", CHECKS)
def test_union(laid: Laid, name: str) -> None:
    union, steps = laid.checks[name]
    laid.mounted.alive()
    if union.kernel and name in KERNEL_DEVIATES:
        return
    try:
        next(steps)
    finally:
        union.close_all()


@pytest.mark.parametrize("name", CHECKS)
def test_union_after_remount(remounted: Laid, name: str) -> None:
    union, steps = remounted.checks[name]
    remounted.mounted.alive()
    if union.kernel and name in KERNEL_DEVIATES:
        return
    assert next(steps, "end") == "end"
    union.close_all()


@pytest.mark.parametrize(
    "engine", lab.chosen(lab.RING, lab.PYFUSE3), ids=lambda engine: engine.name
)
def test_lower_is_never_written(engine: lab.Engine) -> None:
    with lab.workspace("lower") as base:
        layers = lab.Layers.make(base)
        lower = layers.lowers[0]
        (lower / "d").mkdir()
        for number in range(20):
            (lower / f"d/f{number}").write_bytes(b"x")

        def look() -> list[tuple[str, int, int, int]]:
            rows = []
            for directory, _, files in os.walk(lower):
                for name in (*files, "."):
                    seen = os.lstat(Path(directory, name))
                    rows.append((name, seen.st_ino, seen.st_ctime_ns, seen.st_mtime_ns))
            return sorted(rows)

        before = look()
        with lab.mounted(engine, layers):
            for number in range(0, 20, 3):
                (layers.merged / f"d/f{number}").write_bytes(b"new")
                (layers.merged / f"d/f{number + 1}").unlink()
            (layers.merged / "d").rename(layers.merged / "e")
        assert look() == before
