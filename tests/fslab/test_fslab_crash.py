"""The server is killed at any moment: after a remount every object is as before the call in flight
or as after it, and nothing but work files is left over."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fslab import fslab_lab as lab
from tests.fslab.oracle import Disagreement, make_lower
from tests.fslab.oracle_player import Player, differences, kinds, snapshot
from tests.fslab.oracle_steps import Generator, Step

#: Calls that are several requests, whose middle is neither before nor after.
SEVERAL_REQUESTS = ("remove_tree", "copy_range", "map_write", "append")
#: access(2) as os.access shows it: its error is an answer.
NO_ERROR = ("access",)
#: What a caller sees of a server that has gone.
# ECANCELED: the kernel takes back what waits in a ring whose thread was killed.
GONE = ("ENOTCONN", "ECONNABORTED", "ECANCELED", "EIO", "EINTR")


@dataclass
class Crashes:
    """One union that is played on, killed and remounted, beside a yardstick that isn't."""

    engine: lab.Engine
    seed: int
    base: Path

    def run(self, kills: int) -> None:
        make_lower(self.base / "lower", 1)
        lowers = (self.base / "lower",)
        ours = lab.Layers.make(self.base, lowers, "ours-")
        theirs = lab.Layers.make(self.base, lowers, "theirs-")
        rng = random.Random(self.seed)
        with lab.mounted(lab.KERNEL, theirs):
            for number in range(kills):
                live = lab.mount(self.engine, ours)
                try:
                    history, yardstick = self._play(live, theirs, rng, number)
                finally:
                    live.kill()
                again = lab.mount(self.engine, ours)
                try:
                    self._compare(ours, theirs, history, yardstick)
                finally:
                    again.close()
                check(ours)

    def _play(
        self, live: lab.Mounted, theirs: lab.Layers, rng: random.Random, number: int
    ) -> tuple[list[Step], Player]:
        """Play until the server is gone: the steps, the last unanswered; and the yardstick's side."""
        assert live.server is not None
        root, their_root = f"{live.point}/0", f"{theirs.merged}/0"
        generator = Generator(self.seed * 1000 + number, self.engine.lacks)
        generator.xattrs = ("user.a", "trusted.t")  # fsck would ask what the others are for
        generator.calls = [c for c in generator.calls if c not in SEVERAL_REQUESTS + NO_ERROR]
        umask = 0 if "umask" in self.engine.lacks else 0o022
        player = Player(root, umask=umask)
        yardstick = Player(their_root, f"{theirs.upper}/0", umask)
        killer = threading.Timer(rng.random() * 0.08, live.server.kill)
        history: list[Step] = []
        generator.know(kinds(their_root))
        deadline = time.monotonic() + lab.DEADLINE
        killer.start()
        try:
            while time.monotonic() < deadline:
                if len(history) % 20 == 19:
                    generator.know(kinds(their_root))
                step = generator.step()
                history.append(step)
                got = player.play(step)
                if step.call == "write" and got[0] == "ok":
                    got = (got, player.play(Step(step.actor, "fsync", step.arguments[:1])))
                    if got[1][0] in GONE:
                        return history, yardstick
                    got = got[0]
                if got[0] in GONE:
                    return history, yardstick
                expected = yardstick.play(step)
                if got != expected and not yardstick.stale(step):
                    raise Disagreement(f"{step}\n  ours: {got}\n  theirs: {expected}", history)
            raise TimeoutError("the server was not killed")
        finally:
            killer.cancel()
            killer.join()
            player.close_lost()

    def _compare(
        self, ours: lab.Layers, theirs: lab.Layers, history: list[Step], yardstick: Player
    ) -> None:
        found = snapshot(f"{ours.merged}/0", inodes=True)
        before = differences(found, snapshot(f"{theirs.merged}/0"))
        if before:
            yardstick.play(history[-1])
        yardstick.close()
        after = differences(found, snapshot(f"{theirs.merged}/0"))
        if before and after:
            raise Disagreement(
                f"seed {self.seed}: neither before nor after {history[-1]}:\n"
                + "\n".join(["not before:", *before, "not after:", *after]),
                history,
            )


def check(layers: lab.Layers) -> None:
    """fsck finds nothing but work files, and takes them away."""
    command = [sys.executable, "-m", "sdeefs", "fsck", "--json", str(layers.upper)]
    command += [str(layers.lowers[0]), "--workdir", str(layers.work)]
    done = subprocess.run(command, check=False, capture_output=True, timeout=120)
    assert done.stdout, done.stderr.decode()
    report = json.loads(done.stdout)
    other = [f for f in report["findings"] if f["problem"] != "left-over work file"]
    assert not other, other


@pytest.mark.parametrize(
    "engine", lab.chosen(lab.RING, lab.PASSTHROUGH, lab.WRITEBACK), ids=lambda engine: engine.name
)
def test_killed_at_random_points(engine: lab.Engine) -> None:
    with lab.workspace("crash") as base:
        Crashes(engine, 5, base).run(kills=4)
