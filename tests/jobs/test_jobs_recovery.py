"""Jobs that run again, and nodes that come back."""

from __future__ import annotations

import pytest

from tests.conftest import User
from tests.jobs.cluster_lab import wait_for
from tests.jobs.jobs_lab import SdeeCluster

#: The first run stays until its end comes from elsewhere; the second one ends by itself.
TWICE = """\
#!/bin/bash
#SBATCH --requeue --open-mode=append -o {name}.out
echo run $SDEE_GENERATION $(cat /etc/state) $(cat /etc/own 2>/dev/null || echo none)
echo own > /etc/own
srun sh -c 'echo $(cat /etc/state) $(cat /etc/own 2>/dev/null || echo none)'
touch {name}-run$SLURM_RESTART_COUNT
[ -n "$SLURM_RESTART_COUNT" ] || sleep 300
touch {name}-end
"""


def submit_twice(
    cluster: SdeeCluster, user: User, name: str, transport: str, options: str = ""
) -> str:
    """A job of TWICE whose first run has got to its wait, and whose submitter went on."""
    for path in user.home.glob(f"{name}[-.]*"):
        path.unlink()
    (user.home / f"{name}.sh").write_text(TWICE.format(name=name))
    command = f"echo old > /etc/state; sbatch --parsable {options} {name}.sh; echo new > /etc/state"
    how = {"SDEE_JOB_TRANSPORT": transport}
    job = cluster.inside(command, user.name, "again", env=how).ok().strip()
    wait_for(lambda: (user.home / f"{name}-run").exists(), "the first run")
    return job


def start_now(cluster: SdeeCluster, job: str) -> None:
    """Slurm lets a requeued job wait two minutes; one second is what slurmd can tell apart."""
    update = ["scontrol", "update", f"JobId={job}", "StartTime=now+2"]
    wait_for(
        lambda: cluster.job_state(job) == "PENDING" and cluster.run("login1", update).code == 0,
        "the job waits again",
    )


def runs(user: User, name: str) -> list[list[str]]:
    """What each run of a job wrote: generation, state and own file; then those of each task."""
    text = (user.home / f"{name}.out").read_text()
    lines = [line for line in text.splitlines() if "slurmstepd" not in line]
    found: list[list[str]] = []
    for line in lines:
        if line.startswith("run "):
            found.append([])
        found[-1].append(line)
    return [[run[0], *sorted(run[1:])] for run in found]


@pytest.mark.parametrize("transport", ["shared", "sbcast"])
def test_requeued_job_sees_what_it_saw_when_submitted(
    cluster: SdeeCluster, alice: User, transport: str
) -> None:
    name = f"requeue-{transport}"
    job = submit_twice(cluster, alice, name, transport, "-N2 -w n1,n2")
    cluster.run("login1", ["scontrol", "requeue", job]).ok()
    start_now(cluster, job)
    wait_for(lambda: (alice.home / f"{name}-end").exists(), "the second run")
    first, second = runs(alice, name)
    number = first[0].split()[1]
    # The batch script and the task on its node share an instance.
    assert first == [f"run {number} old none", "old none", "old own"]
    assert second == first, "the same generation, and nothing of the first run"
    cluster.wait_clean()
    assert [cluster.used_by(node) for node in ("n1", "n2")] == [[], []]


@pytest.mark.parametrize("transport", ["shared", "sbcast"])
def test_node_that_crashed_and_came_back(cluster: SdeeCluster, alice: User, transport: str) -> None:
    """Its job runs elsewhere, with what it had; what the crash left goes when sdeed starts."""
    name = f"crash-{transport}"
    job = submit_twice(cluster, alice, name, transport, "-N1")
    node = cluster.run("login1", ["squeue", "-h", "-j", job, "-o", "%N"]).ok().strip()
    try:
        cluster.crash_node(node)
        down = ["scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=crash"]
        cluster.run("login1", down).ok()
        start_now(cluster, job)
        wait_for(lambda: (alice.home / f"{name}-end").exists(), "the second run")
        first, second = runs(alice, name)
        number = first[0].split()[1]
        assert first == second == [f"run {number} old none", "old own"]
        wait_for(lambda: cluster.job_state(job) == "COMPLETED", "the job's end")
        disk = cluster.directory / "nodes" / node / "var/lib-sdee"
        assert (disk / "jobs" / job / "upper/etc/own").exists(), "the crash left something"
        assert list(disk.glob(f"cache/*/*/*/users/job-{job}"))
    finally:
        cluster.start_node(node)
        cluster.wait_node(node)
        cluster.start_daemon(node)
        cluster.wait_daemon(node)
    cluster.wait_clean()
    assert cluster.used_by(node) == []
    wait_for(lambda: not list(disk.glob("inbox/*")), "the job's inbox goes")
    cluster.wait_idle()
    again = cluster.inside(f"srun -w {node} cat /etc/state", alice.name, "again")
    assert again.ok() == "new\n"


def test_job_that_failed_for_want_of_a_node_runs_when_requeued(
    cluster: SdeeCluster, alice: User
) -> None:
    """The note of the first run, which no node of it started, says nothing of the second."""
    script = (
        "#!/bin/bash\n#SBATCH -w n1,n2 --requeue --open-mode=append -o note.out\n"
        "ls /opt/much; srun -N2 ls /opt/much\ntouch note-end\n"
    )
    (alice.home / "note.sh").write_text(script)
    for path in alice.home.glob("note[-.][oe]*"):
        path.unlink()
    full = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=755", "tmpfs", "/var/lib/sdee"]
    cluster.run("n2", full).ok()
    make = "head -c 2000000 /dev/urandom > /opt/much; sbatch --parsable note.sh"
    try:
        job = cluster.inside(make, alice.name, "note").ok().strip()
        wait_for(lambda: cluster.job_state(job) == "FAILED", "the first run fails")
    finally:
        cluster.run("n2", ["umount", "-l", "/var/lib/sdee"]).ok()
    assert "No space left on device" in (alice.home / "note.out").read_text()
    cluster.run("login1", ["scontrol", "requeue", job]).ok()
    start_now(cluster, job)
    wait_for(lambda: cluster.job_state(job) in ("COMPLETED", "FAILED"), "the second run")
    assert (alice.home / "note-end").exists(), (alice.home / "note.out").read_text()
    assert (alice.home / "note.out").read_text().splitlines()[-3:] == ["/opt/much"] * 3
    cluster.wait_clean()


def test_steps_on_a_node_that_was_booted_under_the_job_fail_with_the_reason(
    cluster: SdeeCluster, alice: User
) -> None:
    script = (
        "#!/bin/bash\n#SBATCH -w n1,n2 --no-requeue -o boot.out\n"
        "touch boot-run; for i in $(seq 600); do [ -e boot-go ] && break; sleep 0.1; done\n"
        "srun -N1 -n1 -w n2 touch boot-outside\n"
        "srun -N1 -n1 -w n2 --export=NONE /bin/touch boot-outside; touch boot-end\n"
    )
    (alice.home / "boot.sh").write_text(script)
    for path in alice.home.glob("boot[-.][ogre]*"):
        path.unlink()
    make = "echo alice > /etc/whose; sbatch --parsable boot.sh"
    job = cluster.inside(make, alice.name, "note").ok().strip()
    wait_for(lambda: (alice.home / "boot-run").exists(), "the job runs")
    cluster.crash_node("n2")
    cluster.start_node("n2")
    cluster.wait_node("n2")
    cluster.start_daemon("n2")
    cluster.wait_daemon("n2")
    (alice.home / "boot-go").touch()
    try:
        wait_for(lambda: (alice.home / "boot-end").exists(), "the step fails")
        assert "no Prolog of SDEE ran for it on this node" in (alice.home / "boot.out").read_text()
        assert not (alice.home / "boot-outside").exists()
    finally:
        cluster.run("login1", ["scancel", job])
    cluster.wait_clean()
    cluster.wait_idle()
    assert cluster.inside("srun -w n2 cat /etc/whose", alice.name, "note").ok() == "alice\n"
