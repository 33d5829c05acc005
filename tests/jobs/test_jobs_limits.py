"""A job's limits hold inside its environment: memory, devices, processors; its time is in test_jobs_steps."""

from __future__ import annotations

import pytest

from tests.conftest import User
from tests.jobs.cluster_lab import DEVICE, wait_for
from tests.jobs.jobs_lab import SdeeCluster


@pytest.fixture(scope="module", autouse=True)
def environment(cluster: SdeeCluster, alice: User) -> None:
    """An environment with a file that the host lacks."""
    cluster.inside("echo alice > /etc/whose", alice.name, "limits").ok()


@pytest.fixture
def cgroups(cluster: SdeeCluster) -> None:
    """Slurm can hold jobs to memory and devices here."""
    if not cluster.limits_by_cgroup:
        pytest.skip("no hierarchies of cgroup v1 for memory and devices")


@pytest.mark.usefixtures("cgroups")
def test_memory_limit_of_the_job_is_what_its_tasks_are_held_to(
    cluster: SdeeCluster, alice: User
) -> None:
    fill = "srun --mem=150 python3 -c 'print(len(bytearray({})))'"
    fits = cluster.inside(fill.format("50 << 20"), alice.name, "limits")
    assert fits.ok() == f"{50 << 20}\n"
    over = cluster.inside(fill.format("500 << 20"), alice.name, "limits")
    assert over.code != 0
    assert over.out == ""
    assert "Out Of Memory" in over.err


@pytest.mark.usefixtures("cgroups")
def test_batch_script_over_its_memory_is_said_to_be(cluster: SdeeCluster, alice: User) -> None:
    wrap = "cat /etc/whose; python3 -c 'print(len(bytearray(500 << 20)))'; exit 3"
    submit = f'sbatch --parsable --mem=150 -o memory.out --wrap "{wrap}"'
    job = cluster.inside(submit, alice.name, "limits").ok().strip()
    wait_for(lambda: cluster.job_state(job) == "OUT_OF_MEMORY", "the state of the job")
    out = (alice.home / "memory.out").read_text().splitlines()
    assert out[0] == "alice"
    assert str(500 << 20) not in out


@pytest.mark.usefixtures("cgroups")
def test_devices_are_those_that_the_job_asked_for(cluster: SdeeCluster, alice: User) -> None:
    read = f"srun {{}} sh -c 'cat /etc/whose; head -c 1 {DEVICE} | wc -c'"
    got = cluster.inside(read.format("--gres=gpu:1"), alice.name, "limits")
    assert got.ok() == "alice\n1\n"
    refused = cluster.inside(read.format(""), alice.name, "limits")
    assert refused.out == "alice\n0\n"
    assert "Operation not permitted" in refused.err


def test_tasks_are_bound_to_their_processors(cluster: SdeeCluster, alice: User) -> None:
    look = "echo $SLURM_PROCID $(nproc) $(taskset -pc 1 >/dev/null; taskset -pc $$)"
    command = f"srun -w n3 -n2 --cpu-bind=map_cpu:0,1 sh -c '{look}'"
    lines = sorted(cluster.inside(command, alice.name, "limits").ok().splitlines())
    assert [(line.split()[:2], line.split()[-1]) for line in lines] == [
        (["0", "1"], "0"),
        (["1", "1"], "1"),
    ]
