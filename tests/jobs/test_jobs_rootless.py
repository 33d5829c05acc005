"""Jobs without the site's help: neither plugin nor daemon nor root."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.conftest import User
from tests.jobs.jobs_lab import SdeeCluster

TALK = {"SDEE_MODE": "rootless"}
TOP = "/var/tmp/sdee-{uid}"


@pytest.fixture(autouse=True)
def no_cache(bob: User) -> Iterator[None]:
    """What stays on nodes, which have one /var/tmp here."""
    yield
    shutil.rmtree(TOP.format(uid=bob.uid), ignore_errors=True)


def test_srun_and_sbatch_without_plugin(cluster: SdeeCluster, bob: User) -> None:
    make = "echo rootless > /etc/whose; rm /etc/hostname; id -u"
    words = ["sdee", "run", "--rootless", "--env", "alone", "--", "bash", "-c", make]
    assert cluster.run("login1", words, bob.name, env=TALK).ok() == "0\n"
    look = "cat /etc/whose; ls /etc/hostname 2>/dev/null; id -u; echo $SLURM_PROCID >> /tmp/ranks"
    words = ["sdee", "srun", "--rootless", "--env", "alone", "-n3", "-N3", "bash", "-c", look]
    seen = cluster.run("login1", words, bob.name, env=TALK).ok()
    assert sorted(seen.split()) == ["0"] * 3 + ["rootless"] * 3

    (bob.home / "alone.sh").write_text(
        "#!/bin/bash\n#SBATCH -N2 -n2 -o alone.out\ncat /etc/whose\nsdee srun -n2 cat /etc/whose\nexit 4\n"
    )
    words = ["sdee", "sbatch", "--rootless", "--env", "alone", "--parsable", "alone.sh"]
    job = cluster.run("login1", words, bob.name, env=TALK).ok().strip()
    assert cluster.wait_job(job) == ("FAILED", "4:0")
    assert (bob.home / "alone.out").read_text() == "rootless\n" * 3
    for node in cluster.computes:
        left = cluster.run(node, f"ls -A {TOP.format(uid=bob.uid)}/{node}").ok().split()
        assert left in ([], ["cache"]), left
