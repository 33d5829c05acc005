"""What Slurm needs inside an instance, so that its commands work there as they do on the host.

Slurm's clients send getuid(), and munge looks at the caller's real id: as uid 0 of an instance
they differ, and Slurm refuses. So each command is covered by a small program (slurm_client.c)
that runs the real one in a nested user namespace, where the user is plain self again. Beside that
an instance sees munge's socket, the configuration, and slurmd's spool directory, where batch
scripts lie and PMIx keeps what its clients map.
"""

from __future__ import annotations

import os

from sdee_launch.slurm import conf
from sdee_launch.workload import Bind

#: Where the real commands are, inside; slurm_client.c has the same word.
REAL = "/run/sdee-clients"
#: Where `sdee install --slurm` puts the programs; beside slurm.conf is tried, too.
LIBRARY = "/usr/lib/sdee"
CLIENT = "sdee-slurm-client"


def client_program() -> str | None:
    """The built slurm_client, where it was installed."""
    places = [LIBRARY]
    place = conf.directory()
    if place:
        places.insert(0, str(place / "sdee"))
    for directory in places:
        path = os.path.join(directory, CLIENT)
        if os.access(path, os.X_OK):
            return path
    return None


def binds() -> list[Bind]:
    """What of the host an instance on this node must see for Slurm; empty without Slurm."""
    place = conf.directory()
    if place is None:
        return []
    parameters = conf.read()
    found = [Bind(str(place), str(place), readonly=True)]
    if os.path.isdir("/run/munge"):
        found.append(Bind("/run/munge", "/run/munge"))
    spool = conf.spool_directory(parameters)
    if os.path.isdir(spool):
        found.append(Bind(spool, spool))
    program = client_program()
    if program:
        for name, path in conf.commands().items():
            real = os.path.realpath(path)
            found.append(Bind(real, f"{REAL}/{name}", readonly=True))
            found.append(Bind(program, path, readonly=True))
    return found


def environment() -> dict[str, str]:
    """Variables that programs of a job need where the user is uid 0."""
    return {
        # mpirun refuses uid 0 unless told twice; here it is no more than the user.
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_ALLOW_RUN_AS_ROOT": "1",
        "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        # mpirun's servers are uid 0 as their ranks are; munge tells them the user's own id, and
        # they refuse the rank. (Slurm's servers are on the host: the plugin takes this away.)
        "PMIX_MCA_psec": "native",
    }
