"""Several lowers, and lowers alone: stacks of what kernel overlayfs wrote, shown by both engines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fslab import fslab_lab as lab
from tests.fslab.oracle import Disagreement, Pair, generated, make_lower, open_pair, play_both
from tests.fslab.oracle_player import Player, differences, kinds, snapshot
from tests.fslab.oracle_steps import Generator

AREAS = 4
ENGINES = lab.chosen(lab.RING, lab.PASSTHROUGH, lab.WRITEBACK, lab.PYFUSE3)
KERNEL = lab.Engine("overlay", "kernel", ("redirect_dir=on", "index=off", "xino=on"))


def write_layer(base: Path, lowers: tuple[Path, ...], seed: int) -> Path:
    """A new layer above the lowers: kernel overlayfs's upper after random changes."""
    layers = lab.Layers.make(base, lowers, f"layer{seed}-")
    with lab.mounted(KERNEL, layers):
        for area in range(AREAS):
            root = f"{layers.merged}/{area}"
            player = Player(root)
            generator = Generator(seed * 100 + area)
            for step in generated(generator, lambda root=root: kinds(root), 60):
                player.play(step)
            player.close()
    assert layers.upper is not None
    return layers.upper


@pytest.fixture(scope="module")
def stack() -> Iterator[tuple[Path, tuple[Path, ...]]]:
    """Five layers, the topmost first: whiteouts, opaque directories and redirects in the middle."""
    with lab.workspace("lowers") as base:
        make_lower(base / "lower", AREAS)
        lowers: tuple[Path, ...] = (base / "lower",)
        for seed in range(4):
            lowers = (write_layer(base, lowers, seed), *lowers)
        yield base, lowers


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_lowers_alone(stack: tuple[Path, tuple[Path, ...]], engine: lab.Engine, count: int) -> None:
    base, lowers = stack
    shown = []
    for one in (KERNEL, engine):
        merged = base / f"alone-{one.name}"
        merged.mkdir(exist_ok=True)
        with lab.mounted(one, lab.Layers(base, None, lowers[-count:], None, merged)):
            shown.append(snapshot(str(merged)))
            for call in (
                lambda m=merged: os.mkdir(m / "new"),
                lambda m=merged: (
                    os.unlink(m / "0/f2") if (m / "0/f2").exists() else os.rmdir(m / "0")
                ),
                lambda m=merged: os.chmod(m / "0", 0o700),
                lambda m=merged: os.rename(m / "0", m / "00"),
                lambda m=merged: os.setxattr(m / "0", "user.x", b""),
                lambda m=merged: os.open(m / "0/new", os.O_CREAT | os.O_WRONLY),
            ):
                assert lab.error_of(call) == "EROFS"
    assert not differences(shown[1], shown[0])


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_an_upper_over_several_lowers(
    stack: tuple[Path, tuple[Path, ...]], engine: lab.Engine
) -> None:
    _, lowers = stack
    with lab.workspace("upper") as base:
        pair = open_pair(base, engine.with_options("index=off"), KERNEL, lowers, None)
        try:
            play(pair, engine.lacks)
        finally:
            pair.close()


def play(pair: Pair, lacks: frozenset[str]) -> None:
    for area in range(AREAS):
        root = f"{pair.theirs.point}/{area}"
        steps = generated(Generator(7000 + area, lacks), lambda root=root: kinds(root), 120)
        try:
            play_both(pair.players(str(area)), steps)
            pair.snapshots(str(area))
        except Disagreement as error:
            raise Disagreement(f"area {area}: {error}", error.steps) from error


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_many_lowers(engine: lab.Engine) -> None:
    """As an image of many layers is mounted: 60 of them, with a read-only merge on top."""
    with lab.workspace("many") as base:
        lowers = []
        for number in range(60):
            lower = base / f"l{number:02}"
            (lower / "etc").mkdir(parents=True)
            (lower / f"etc/own{number}").write_text(str(number))
            (lower / "etc/shared").write_text(str(number))
            lowers.append(lower)
        layers = lab.Layers.make(base, tuple(lowers))
        with lab.mounted(engine, layers):
            etc = layers.merged / "etc"
            assert len(os.listdir(etc)) == 61
            assert (etc / "shared").read_text() == "0"
            assert (etc / "own59").read_text() == "59"
            (etc / "own30").unlink()
            (etc / "own31").write_text("changed")
            assert len(os.listdir(etc)) == 60
