"""sdeefs against kernel overlayfs: random calls, over many filesystems, transports and fallbacks."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest

from tests.fslab import fslab_lab as lab
from tests.fslab.oracle import Run, make_lower

#: In each area 2.25 × STEPS steps are played; scripts/oracle plays for hours.
AREAS, STEPS = 3, 150


@dataclass(frozen=True)
class Case:
    """What is under the engine."""

    engine: lab.Engine
    upper: str = "ext4"  # "host": the filesystem of /var/tmp
    lower: str = "host"
    options: tuple[str, ...] = ()  # of ours
    kernel: tuple[str, ...] = lab.KERNEL.options
    swap: bool = True

    @property
    def name(self) -> str:
        return "-".join([self.engine.name, self.upper, self.lower, *self.options]).replace("=", "_")


CASES = [
    Case(lab.RING, "host"),
    Case(lab.RING, "xfs", "squashfs"),
    Case(lab.RING, "tmpfs", "erofs"),
    Case(lab.PASSTHROUGH, "host"),
    Case(lab.PASSTHROUGH, "btrfs", "erofs"),
    Case(lab.WRITEBACK, "host"),
    Case(lab.WRITEBACK, "ext4", "squashfs"),
    Case(lab.DEVICE_PLAIN, "host"),
    Case(lab.PYFUSE3, "host"),
    Case(lab.PYFUSE3, "xfs"),
    Case(lab.RING, "host", options=("watch=off", "lower_timeout=0")),
    Case(lab.DEVICE_PLAIN, "tmpfs", options=("timeout=0", "threads=1")),
    # kernel overlayfs reads this form in lowers alone, so uppers aren't swapped
    Case(lab.PASSTHROUGH, "host", options=("whiteouts=xattr",), swap=False),
    Case(
        lab.RING, "host", options=("redirect_dir=off",),
        kernel=("redirect_dir=nofollow", "index=on", "xino=on"),
    ),
    Case(
        lab.PASSTHROUGH, "host", options=("userxattr", "index=off", "redirect_dir=off"),
        kernel=("userxattr", "xino=on"),
    ),
    Case(lab.WRITEBACK, "host", options=("noxattr", "whiteouts=prefix"), swap=False),
]  # fmt: skip


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.engine in lab.chosen(c.engine)], ids=lambda case: case.name
)
def test_the_engines_agree(case: Case) -> None:
    with lab.workspace("oracle") as base, ExitStack() as stack:
        lower = base / "lower"
        make_lower(lower, AREAS)
        if case.lower != "host":
            lower = stack.enter_context(lab.image_of(case.lower, lower, base))
        upper_on = None
        if case.upper != "host":
            upper_on = stack.enter_context(lab.filesystem(case.upper, base))
        run = Run(
            case.engine.with_options(*case.options),
            replace(lab.KERNEL, options=case.kernel),
            seed=1 + CASES.index(case), areas=AREAS, steps=STEPS, swap=case.swap,
        )  # fmt: skip
        assert run.play(base, (lower,), upper_on) >= AREAS * STEPS * 2


def test_the_yardstick_agrees_with_itself() -> None:
    """The harness finds nothing between two overlayfs mounts: it is deterministic."""
    with lab.workspace("oracle") as base:
        make_lower(base / "lower", 3)
        run = Run(lab.KERNEL, lab.KERNEL, seed=99, areas=3, steps=150)
        run.play(base, (base / "lower",), None)
