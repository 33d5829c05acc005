"""Slurm behind the interface of sdee_launch.workload."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

from sdee_launch.slurm import conf, identity
from sdee_launch.workload import Bind

#: Seconds for a Slurm command; a busy controller answers late.
PATIENCE = 120.0


class Slurm:
    """See sdee_launch.workload.Workload."""

    name = "Slurm"

    def present(self) -> bool:
        """Whether there is a slurm.conf."""
        return conf.directory() is not None

    def binds(self) -> list[Bind]:
        """See identity.py."""
        return identity.binds()

    def environment(self) -> Mapping[str, str]:
        """See identity.py."""
        return identity.environment()

    def states(self, uid: int) -> Mapping[int, str]:
        """By squeue: jobs that ended more than MinJobAge ago are not in it."""
        done = subprocess.run(
            ["squeue", "-h", "-t", "all", "-u", str(uid), "-o", "%A %T"],
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        found = {}
        for line in done.stdout.splitlines():
            number, _, state = line.partition(" ")
            if number.isdigit():
                found[int(number)] = state
        return found


manager = Slurm()
