"""Steps of jobs: at once, from elsewhere, of several components, under mpirun; their options, and
the end of their time.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import User
from tests.jobs.cluster_lab import wait_for
from tests.jobs.jobs_lab import SdeeCluster

RANK = """\
cat > rank.c <<'C'
#include <mpi.h>
#include <stdio.h>
int main(int argc, char **argv)
{
    int rank, size;
    char whose[32] = "nobody\\n";
    FILE *file = fopen("/etc/whose", "r");
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (file)
        fgets(whose, sizeof whose, file);
    printf("rank %d of %d: %s", rank, size, whose);
    MPI_Finalize();
    return 0;
}
C
mpicc -o /opt/rank rank.c
"""


#: Sleeps that outlive everything but what ends the job.
STUBBORN = """\
#!/bin/bash
#SBATCH -w n1,n2 -t 1 -o timeout.out
(setsid sleep 777 &)
srun -N2 sh -c 'trap "" TERM; setsid sleep 778 & touch timed-$SLURM_PROCID; sleep 779; sleep 779'
"""


@pytest.fixture(scope="module", autouse=True)
def job_over_time(cluster: SdeeCluster, alice: User) -> str:
    """A job that is about to run into its limit. Slurm looks every 30 s: all else runs meanwhile."""
    for path in alice.home.glob("timed-*"):
        path.unlink()
    (alice.home / "timeout.sh").write_text(STUBBORN)
    make = "echo alice > /etc/whose; sbatch --parsable timeout.sh"
    job = cluster.inside(make, alice.name, "limits").ok().strip()
    wait_for(lambda: len(list(alice.home.glob("timed-*"))) == 2, "both tasks run")
    # The limit is in minutes; the end can be nearer.
    cluster.run("login1", f"scontrol update JobId={job} EndTime=$(date -d '+1 second' +%FT%T)").ok()
    return job


@pytest.fixture(scope="module", autouse=True)
def environment(cluster: SdeeCluster, alice: User) -> None:
    """Two environments that differ."""
    cluster.inside("echo alice > /etc/whose", alice.name).ok()
    cluster.inside("echo other > /etc/whose", alice.name, "other").ok()


@pytest.fixture
def long_job(cluster: SdeeCluster, alice: User) -> Iterator[str]:
    """A job in the environment `jobs` that waits to be cancelled."""
    (alice.home / "long-up").unlink(missing_ok=True)
    wrap = "echo own > /etc/own; touch long-up; sleep 300"
    submit = f"sbatch --parsable -n2 -o /dev/null --wrap '{wrap}'"
    job = cluster.inside(submit, alice.name).ok().strip()
    wait_for(lambda: (alice.home / "long-up").exists(), "the job runs")
    yield job
    cluster.run("login1", ["scancel", job])


def test_steps_at_once_share_the_instance(cluster: SdeeCluster, alice: User) -> None:
    meet = (
        "srun --exact -n1 -w n1 sh -c 'touch /tmp/{0}; for i in $(seq 300); do "
        "[ -e /tmp/{1} ] && break; sleep 0.1; done; readlink /proc/self/ns/mnt; ls /tmp/{1}' & "
    )
    both = meet.format("one", "two") + meet.format("two", "one")
    command = f'salloc -Q -w n1 -n2 bash -c "{both.replace("$", chr(92) + "$")} wait"'
    lines = sorted(cluster.inside(command, alice.name).ok().splitlines())
    assert lines[:2] == ["/tmp/one", "/tmp/two"]
    assert len(lines) == 4
    assert len(set(lines[2:])) == 1, "one mount namespace"


def test_components_of_a_heterogeneous_job_have_the_environment(
    cluster: SdeeCluster, alice: User
) -> None:
    both = "srun -n1 -w n1 cat /etc/whose : -n1 -w n2 sh -c 'hostname; cat /etc/whose'"
    assert sorted(cluster.inside(both, alice.name).ok().split()) == ["alice", "alice", "n2"]
    script = (
        "#!/bin/bash\n#SBATCH -o het.out -w n1 -n1\n#SBATCH hetjob\n#SBATCH -w n2 -n2\n"
        "srun --het-group=0,1 cat /etc/whose; srun --het-group=1 hostname; touch het-end\n"
    )
    (alice.home / "het.sh").write_text(script)
    (alice.home / "het-end").unlink(missing_ok=True)
    cluster.inside("sbatch het.sh", alice.name).ok()
    wait_for(lambda: (alice.home / "het-end").exists(), "the batch script's end")
    assert (alice.home / "het.out").read_text().split() == ["alice"] * 3 + ["n2"] * 2


def test_a_step_from_elsewhere_runs_in_its_job_s_environment(
    cluster: SdeeCluster, alice: User, long_job: str
) -> None:
    """From outside of any environment, from the job's own, and from another."""
    look = f"srun --jobid={long_job} --overlap -n1 cat /etc/own /etc/whose"
    assert cluster.run("login1", look, alice.name).ok() == "own\nalice\n"
    spool = alice.home / ".local/share/sdee/spool/jobs"
    before = sorted(spool.glob("*.manifest"))
    again = f"echo more >> /etc/more; {look}"
    assert cluster.inside(again, alice.name).ok() == "own\nalice\n"
    assert sorted(spool.glob("*.manifest")) == before, "no snapshot is taken for it"
    assert cluster.inside(look, alice.name, "other").ok() == "own\nalice\n"
    # What only looks like the option is the command's.
    mine = f"srun -n1 sh -c 'cat /etc/whose; echo $0' --jobid={long_job}"
    assert cluster.inside(mine, alice.name, "other").ok() == f"other\n--jobid={long_job}\n"


def test_a_step_in_a_job_without_environment_has_none(cluster: SdeeCluster, alice: User) -> None:
    (alice.home / "plain-up").unlink(missing_ok=True)
    submit = "sbatch --parsable --sdee=no -o /dev/null --wrap 'touch plain-up; sleep 300'"
    job = cluster.inside(submit, alice.name).ok().strip()
    try:
        wait_for(lambda: (alice.home / "plain-up").exists(), "the job runs")
        look = f"srun --jobid={job} --overlap -n1 cat /etc/whose"
        assert "No such file" in cluster.inside(look, alice.name).err
    finally:
        cluster.run("login1", ["scancel", job])


def test_a_step_can_t_have_another_environment_than_its_job(
    cluster: SdeeCluster, alice: User
) -> None:
    steps = "srun --sdee=jobs cat /etc/whose; srun --sdee=no ls /etc/whose; srun --sdee=other true"
    done = cluster.inside(f"salloc -Q -n1 sh -c '{steps}'", alice.name)
    assert done.out == "alice\n"
    assert "No such file" in done.err
    assert "the step wants other, but its job has jobs@" in done.err
    assert done.code != 0


@pytest.mark.parametrize("command", ["srun", "sbatch", "salloc"])
def test_options_of_all_three_commands(cluster: SdeeCluster, alice: User, command: str) -> None:
    listed = cluster.run("login1", [command, "--help"], alice.name).ok()
    assert all(f"  --{name}" in listed for name in ("sdee=", "sdee-keep", "sdee-exclude="))
    out = alice.home / "options.out"
    out.unlink(missing_ok=True)
    (alice.home / "options.sh").write_text("#!/bin/sh\ncat /etc/whose > options.out.new; mv options.out.new options.out\n")  # fmt: skip
    (alice.home / "options.sh").chmod(0o755)
    what = "srun ./options.sh" if command == "salloc" else "./options.sh"
    cluster.run("login1", f"{command} --sdee=other {what}", alice.name).ok()
    wait_for(out.exists, "the job's output")
    assert out.read_text() == "other\n"


def test_mpirun_inside(cluster: SdeeCluster, alice: User) -> None:
    """On the login node, and in an allocation: there its daemons are steps of the job."""
    cluster.inside(RANK, alice.name).ok()
    here = "timeout 60 mpirun -n 2 --oversubscribe /opt/rank"
    lines = sorted(cluster.inside(here, alice.name).ok().splitlines())
    assert lines == ["rank 0 of 2: alice", "rank 1 of 2: alice"]
    command = "salloc -Q -N3 -n6 timeout 100 mpirun /opt/rank"
    lines = sorted(cluster.inside(command, alice.name).ok().splitlines())
    assert lines == [f"rank {rank} of 6: alice" for rank in range(6)]


def test_sattach_and_signals_to_a_step(cluster: SdeeCluster, alice: User) -> None:
    for path in alice.home.glob("signal-*"):
        path.unlink()
    # Traps of the shell that has the step: the signal is for its tasks.
    (alice.home / "signal.sh").write_text(
        "#!/bin/bash\ntrap 'echo got $SLURM_PROCID; exit 3' USR1\ntouch signal-$SLURM_PROCID\n"
        "for i in $(seq 600); do sleep 0.1; done\n"
    )
    script = "#!/bin/bash\n#SBATCH -N2 -n2 -o signal.out\nsrun bash signal.sh 2>/dev/null\necho step $?; touch signal-end\n"
    (alice.home / "signal-job.sh").write_text(script)
    job = cluster.inside("sbatch --parsable signal-job.sh", alice.name).ok().strip()
    wait_for(lambda: len(list(alice.home.glob("signal-[01]"))) == 2, "both tasks run")
    attach = f"timeout 60 sattach {job}.0 & sleep 1; scancel --signal=USR1 {job}.0; wait"
    seen = cluster.inside(attach, alice.name)
    wait_for(lambda: (alice.home / "signal-end").exists(), "the step's end")
    lines = (alice.home / "signal.out").read_text().splitlines()
    assert sorted(lines[:-1]) == ["got 0", "got 1"]
    assert lines[-1] == "step 3"
    assert sorted(seen.out.splitlines()) == ["got 0", "got 1"]


def test_time_limit_leaves_nothing(cluster: SdeeCluster, alice: User, job_over_time: str) -> None:
    wait_for(lambda: cluster.job_state(job_over_time) == "TIMEOUT", "the job's end")
    cluster.wait_clean()
    assert "DUE TO TIME LIMIT" in (alice.home / "timeout.out").read_text()
    for node in ("n1", "n2"):
        assert cluster.run(node, "pgrep -fx 'sleep 77[789]'").out == ""
        assert cluster.used_by(node) == []
        locked = "for lock in /var/lib/sdee/cache/*/*/lock; do flock -n $lock true || exit 1; done"
        cluster.run(node, locked).ok()
