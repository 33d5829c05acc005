"""Crashes of every part, and a full disk: a job starts as a whole or fails with the reason."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from sdee_launch.slurm import health, records
from tests.conftest import User
from tests.jobs.cluster_lab import wait_for
from tests.jobs.jobs_lab import LIBRARY, SdeeCluster


@pytest.fixture(scope="module", autouse=True)
def environment(cluster: SdeeCluster, alice: User) -> None:
    """An environment with a file that the host lacks."""
    cluster.inside("echo alice > /etc/whose", alice.name).ok()


@contextlib.contextmanager
def running(
    cluster: SdeeCluster, user: User, command: str, engine: str = "kernel"
) -> Iterator[subprocess.Popen[str]]:
    """A command inside the user's environment on the login node, in the background."""
    words = ["sdee", "run", "--env", "jobs", "--", "bash", "-c", command]
    line = cluster.words("login1", words, user.name, 170, env={"SDEE_JOB_ENGINE": engine})
    process = subprocess.Popen(
        line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        # The command runs in namespaces of its own: it ends with its job, not with nsenter(1).
        cluster.run("login1", ["scancel", "-u", user.name], timeout=60)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def wait_step(cluster: SdeeCluster, user: User, tag: str, count: int) -> None:
    """Until that many tasks have said that they run, by a file in the home."""
    wait_for(lambda: len(list(user.home.glob(f"{tag}-*"))) >= count, f"{count} tasks of {tag}")


def clear(user: User, tag: str) -> None:
    for path in user.home.glob(f"{tag}-*"):
        path.unlink()


def test_full_disk_on_one_node_fails_the_whole_job_with_the_reason(
    cluster: SdeeCluster, alice: User
) -> None:
    cluster.run(
        "n2", ["mount", "-t", "tmpfs", "-o", "size=256k,mode=755", "tmpfs", "/var/lib/sdee"]
    ).ok()
    try:
        many = "head -c 2000000 /dev/urandom > /opt/much; "
        for transport in ("shared", "sbcast"):
            done = cluster.inside(
                many + "srun -N3 touch ~/full-$SLURM_JOB_ID", alice.name, "full",
                env={"SDEE_JOB_TRANSPORT": transport},
            )  # fmt: skip
            assert done.code != 0
            assert "n2" in done.err
            reason = "No space left on device" if transport == "shared" else "BCAST(n2)"
            assert reason in done.err
        cluster.wait_clean()
        (alice.home / "full.sh").write_text(
            "#!/bin/sh\n#SBATCH -N3 -o full.out\ntouch full-batch\n"
        )
        job = cluster.inside("sbatch --parsable full.sh", alice.name, "full").ok().strip()
        assert cluster.wait_job(job)[0] == "FAILED"
        out = (alice.home / "full.out").read_text()
        assert "n2" in out
        assert "No space left on device" in out
        assert not list(alice.home.glob("full-*")), "a task ran"
    finally:
        cluster.run("n2", ["umount", "-l", "/var/lib/sdee"]).ok()
    cluster.wait_idle()
    assert (
        cluster.inside("srun -N3 ls /opt/much", alice.name, "full").ok().split()
        == ["/opt/much"] * 3
    )
    cluster.wait_clean()


@pytest.mark.parametrize("engine", ["kernel", "fuse"])
def test_death_of_an_instance_s_init_ends_the_job(
    cluster: SdeeCluster, alice: User, engine: str
) -> None:
    clear(alice, "init")
    with running(
        cluster, alice, "srun -K -w n1,n2 sh -c 'touch init-$SLURM_PROCID; sleep 500'", engine
    ) as job:
        wait_step(cluster, alice, "init", 2)
        cluster.run("n1", ["kill", "-KILL", instance_pid(cluster, "n1")]).ok()
        out, err = job.communicate(timeout=120)
        assert job.returncode != 0, (out, err)
    cluster.wait_clean()
    assert cluster.inside("srun cat /etc/whose", alice.name).ok() == "alice\n"


def instance_pid(cluster: SdeeCluster, node: str) -> str:
    """The init of the only instance on a node, as the node has it."""
    live = json.loads(cluster.run(node, ["sdee", "node", "--json"]).ok())["instances"]
    assert len(live) == 1, live
    return str(live[0]["init"])


def test_death_of_the_fuse_server_fails_the_job_and_leaves_nothing(
    cluster: SdeeCluster, alice: User
) -> None:
    clear(alice, "server")
    command = "srun -K -w n1,n2 sh -c 'touch server-$SLURM_PROCID; while ls /usr/include >/dev/null; do sleep 0.2; done; exit 5'"
    with running(cluster, alice, command, "fuse") as job:
        wait_step(cluster, alice, "server", 2)
        # The brackets: not timeout(1) with this very command line.
        servers = cluster.run("n1", ["pgrep", "-f", "[s]deefs"]).ok().split()
        assert servers
        cluster.run("n1", ["kill", "-KILL", *servers]).ok()
        out, err = job.communicate(timeout=120)
        assert job.returncode != 0, (out, err)
    cluster.wait_clean()
    assert cluster.inside("srun cat /etc/whose", alice.name).ok() == "alice\n"


def test_a_node_that_lost_its_cache_is_sent_all_of_it(cluster: SdeeCluster, alice: User) -> None:
    how = {"SDEE_JOB_TRANSPORT": "sbcast"}
    command = "echo $RANDOM > /opt/cached; srun -w n1,n2 cat /etc/whose"
    assert cluster.inside(command, alice.name, "lost", env=how).code != 0, "no such file yet"
    command = "echo lost > /etc/whose; " + command
    assert cluster.inside(command, alice.name, "lost", env=how).ok() == "lost\n" * 2
    cluster.wait_clean()
    cluster.run("n2", "rm -rf /var/lib/sdee/cache/*").ok()
    command = "echo more > /opt/more; srun -w n1,n2 cat /etc/whose"
    assert cluster.inside(command, alice.name, "lost", env=how).ok() == "lost\n" * 2
    cluster.wait_clean()


def test_jobs_live_through_the_death_of_slurmd_and_sdeed(cluster: SdeeCluster, alice: User) -> None:
    clear(alice, "live")
    command = (
        "srun -w n1,n2 sh -c 'touch live-$SLURM_PROCID; "
        "for i in $(seq 900); do [ -e live-stop ] && break; sleep 0.1; done; cat /etc/whose'"
    )
    with running(cluster, alice, command) as job:
        wait_step(cluster, alice, "live", 2)
        os.kill(cluster.pid_of("n1", "slurmd"), signal.SIGKILL)
        cluster.kill_daemon("n1")
        cluster.start_daemon("n1")
        cluster.wait_daemon("n1")
        cluster.run("n1", ["slurmd", "-N", "n1"]).ok()
        (alice.home / "live-stop").touch()
        out, err = job.communicate(timeout=150)
        assert (job.returncode, out) == (0, "alice\nalice\n"), err
    cluster.wait_idle()
    cluster.wait_clean()
    assert cluster.inside("srun -N3 cat /etc/whose", alice.name).ok() == "alice\n" * 3


def test_a_job_fails_with_the_reason_where_no_daemon_runs(
    cluster: SdeeCluster, alice: User
) -> None:
    cluster.kill_daemon("n3")
    try:
        done = cluster.inside("srun -w n3 touch ~/outside", alice.name)
        assert done.code != 0
        assert "sdeed" in done.err
        assert not (alice.home / "outside").exists()
        plain = cluster.run("login1", ["srun", "-w", "n3", "hostname"], alice.name)
        assert plain.ok() == "n3\n", "jobs without an environment don't need it"
    finally:
        cluster.start_daemon("n3")
        cluster.wait_daemon("n3")
    cluster.wait_idle()
    assert cluster.inside("srun -w n3 cat /etc/whose", alice.name).ok() == "alice\n"
    cluster.wait_clean()


@contextlib.contextmanager
def health_checks(cluster: SdeeCluster, seconds: int) -> Iterator[None]:
    """Slurm runs ours on all nodes."""
    path = cluster.directory / "etc-slurm" / "slurm.conf"
    before = path.read_text()
    more = f"HealthCheckProgram={LIBRARY}/sdee-health\nHealthCheckInterval={seconds}\n"
    reconfigure = ["scontrol", "reconfigure"]
    path.write_text(before + more)
    try:
        cluster.run("login1", reconfigure).ok()
        yield
    finally:
        path.write_text(before)
        cluster.run("login1", reconfigure).ok()


def node_state(cluster: SdeeCluster, node: str) -> tuple[str, str]:
    """State and reason."""
    return health.parse_node(cluster.run("login1", ["scontrol", "show", "node", "-o", node]).ok())


def test_a_node_without_daemon_is_drained_until_it_has_one(
    cluster: SdeeCluster, alice: User
) -> None:
    """By Slurm's health check, or by the first job that meets it."""
    check = ["sdee", "health", "--drain"]

    def drained() -> str:
        state, reason = node_state(cluster, "n3")
        return reason if state == "IDLE+DRAIN" else ""

    # (A check takes 6 s where no daemon is; its next must not begin before it has ended.)
    for seconds in (10, 3600):
        with health_checks(cluster, seconds):
            cluster.kill_daemon("n3")
            try:
                if seconds == 3600:
                    done = cluster.inside("srun -w n3 touch ~/outside", alice.name)
                    assert done.code != 0 and "no sdeed" in done.err
                    assert "DRAIN" in node_state(cluster, "n3")[0]
                wait_for(drained, "n3 is drained")
                assert drained().startswith("sdee health: no sdeed")
                plain = cluster.run("login1", ["srun", "-N1", "hostname"], alice.name)
                assert plain.ok() in ("n1\n", "n2\n")
            finally:
                cluster.start_daemon("n3")
                cluster.wait_daemon("n3")
            if seconds == 3600:
                assert cluster.run("n3", check).ok() == "sdee health: well (n3 is used again)\n"
            wait_for(lambda: node_state(cluster, "n3") == ("IDLE", ""), "n3 is used again")
    assert cluster.inside("srun -w n3 cat /etc/whose", alice.name).ok() == "alice\n"
    # What somebody else wants is left alone.
    update = ["scontrol", "update", "NodeName=n3"]
    cluster.run("n3", [*update, "State=DRAIN", "Reason=a disk"]).ok()
    try:
        assert cluster.run("n3", check).ok() == "sdee health: well\n"
        assert node_state(cluster, "n3") == ("IDLE+DRAIN", "a disk")
    finally:
        cluster.run("n3", [*update, "State=RESUME"]).ok()
    cluster.wait_idle()
    cluster.wait_clean()


def test_what_a_crash_left_is_removed_when_the_daemon_starts(
    cluster: SdeeCluster, alice: User
) -> None:
    """Layers of jobs that nobody knows, and the record of one whose instance is gone."""
    record = records.Record(999999, alice.uid, "jobs@1", init=2**22 - 1, started=1)
    text = json.dumps(records.as_json(record))
    cluster.kill_daemon("n3")
    cluster.run(
        "n3",
        "mkdir -p /var/lib/sdee/jobs/123456/upper/etc /run/sdee/jobs;"
        f"printf 'ready\n%s\n' '{text}' > /run/sdee/jobs/999999",
    ).ok()
    cluster.start_daemon("n3")
    cluster.wait_daemon("n3")
    cluster.wait_clean()
    cluster.wait_idle()
    assert cluster.inside("srun -w n3 cat /etc/whose", alice.name).ok() == "alice\n"
    cluster.wait_clean()
