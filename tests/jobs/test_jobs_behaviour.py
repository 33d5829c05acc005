"""Jobs in environments behave as jobs do: what they see, how they end, what they leave."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.conftest import User
from tests.jobs.cluster_lab import wait_for
from tests.jobs.jobs_lab import SdeeCluster


@pytest.fixture(scope="module", autouse=True)
def environment(cluster: SdeeCluster, alice: User) -> str:
    """An environment with a file that the host lacks."""
    cluster.inside("echo alice > /etc/whose; echo one > /etc/state", alice.name).ok()
    return "default"


def read(path: Path) -> str:
    """What a job has written to a file in a home so far."""
    try:
        return path.read_text()
    except OSError:
        return ""


def deployed(cluster: SdeeCluster, user: User) -> int:
    """Bytes that the user's last job brought to its nodes."""
    jobs = json.loads(cluster.run("login1", ["sdee", "jobs", "--json"], user.name).ok())
    return int(jobs[-1]["bytes"])


def test_a_job_that_starts_later_sees_the_state_at_submission(
    cluster: SdeeCluster, alice: User
) -> None:
    held = cluster.inside(
        "echo old > /etc/state; sbatch --parsable -H -o held.out --wrap 'cat /etc/state'; "
        "echo new > /etc/state",
        alice.name,
    ).ok()
    job = held.split()[-1]
    cluster.run("login1", ["scontrol", "release", job]).ok()
    wait_for(lambda: read(alice.home / "held.out"), "output of the held job")
    assert read(alice.home / "held.out") == "old\n"
    now = "cat /etc/state; srun cat /etc/state"
    assert cluster.inside(now, alice.name).ok() == "new\nnew\n"


@pytest.mark.parametrize("transport", ["shared", "sbcast"])
def test_only_what_changed_travels(cluster: SdeeCluster, alice: User, transport: str) -> None:
    how = {"SDEE_JOB_TRANSPORT": transport}
    cluster.inside(
        "head -c 3000000 /dev/urandom > /opt/blob; srun -N3 true", alice.name, env=how
    ).ok()
    assert deployed(cluster, alice) >= 3 * 3_000_000
    cluster.inside("srun -N3 true", alice.name, env=how).ok()
    assert deployed(cluster, alice) <= (0 if transport == "shared" else 3 * 20_000)
    small = "echo small > /opt/small; srun -N3 cat /opt/small"
    cluster.inside(small, alice.name, env=how).ok()
    assert 0 < deployed(cluster, alice) < 3 * 25_000
    seen = cluster.inside("rm /opt/blob; srun -N3 ls /opt", alice.name, env=how).ok()
    assert "blob" not in seen
    assert seen.split().count("small") == 3


@pytest.mark.parametrize("transport", ["shared", "sbcast"])
def test_a_new_name_changes_nothing_for_jobs(
    cluster: SdeeCluster, alice: User, transport: str
) -> None:
    """Neither for one in the queue, nor for what the nodes have already."""
    how, old, new = {"SDEE_JOB_TRANSPORT": transport}, f"old-{transport}", f"new-{transport}"
    line = (
        "head -c 3000000 /dev/urandom > /opt/blob; echo before > /etc/named; srun -N3 true; "
        f"sbatch --parsable -H -w n1 -o {old}.out --wrap 'cat /etc/named'"
    )
    job = cluster.inside(line, alice.name, old, env=how).ok().split()[-1]
    said = cluster.run("login1", ["sdee", "env", "rename", old, new], alice.name)
    said.ok()
    assert f"spool/{'' if transport == 'shared' else alice.uid}" in said.err
    line = "echo after > /etc/named; srun -N3 cat /etc/named"
    assert cluster.inside(line, alice.name, new, env=how).ok() == "after\n" * 3
    assert 0 < deployed(cluster, alice) < 3 * 25_000
    cluster.run("n1", "rm -rf /var/lib/sdee/cache/*").ok()  # it has to come once more
    cluster.run("login1", ["scontrol", "release", job]).ok()
    wait_for(lambda: read(alice.home / f"{old}.out"), "output of the held job")
    assert read(alice.home / f"{old}.out") == "before\n"
    wait_for(lambda: not cluster.run("login1", ["squeue", "-h"]).ok(), "an empty queue")
    pruned = cluster.run("login1", ["sdee", "cache", "prune"], alice.name)
    assert f"/{old}, whose environment is gone" in pruned.err


def test_what_a_job_wrote_is_kept_on_wish(cluster: SdeeCluster, alice: User) -> None:
    """By `sdee job save` in the job, and at its end by --sdee-keep; else it is gone."""
    write = "srun sh -c 'echo kept > /opt/kept; cat /opt/kept; sdee job save'"
    out = cluster.inside("mkdir -p /opt; " + write, alice.name, "saving").ok().splitlines()
    assert out[0] == "kept"
    saved = out[1].removeprefix("saved as ")
    assert saved.startswith("saving@")
    assert (
        cluster.inside("ls /opt; srun ls /opt", alice.name, "saving").ok().split().count("kept")
        == 0
    )
    with_it = ["srun", f"--sdee={saved}", "cat", "/opt/kept"]
    assert cluster.run("login1", with_it, alice.name).ok() == "kept\n"
    keep = "srun --sdee-keep sh -c 'echo keeper > /opt/keeper'"
    cluster.inside(keep, alice.name, "saving").ok()
    cluster.wait_clean()
    spool = alice.home / ".local/share/sdee/spool/saving"
    newest = max(int(path.stem) for path in spool.glob("*.manifest"))
    with_it = ["srun", f"--sdee=saving@{newest}", "cat", "/opt/keeper"]
    assert cluster.run("login1", with_it, alice.name).ok() == "keeper\n"
    refused = cluster.run("login1", ["srun", "--sdee=saving@999", "true"], alice.name)
    assert refused.code != 0
    assert "999" in refused.err


def test_two_users_on_the_same_nodes_see_nothing_of_each_other(
    cluster: SdeeCluster, alice: User, bob: User
) -> None:
    # Both users' tasks are on all nodes before any looks around, and until all have looked.
    pause = "for i in $(seq 600); do [ -e meet-{word} ] && break; sleep 0.1; done"
    look = (
        "echo $USER > /dev/shm/shared; touch /tmp/mine-$USER meet-here-$SLURMD_NODENAME; "
        f"{pause.format(word='go')}; "
        "cat /etc/whose /dev/shm/shared; ps ax -o args; ls /tmp /home; echo end; "
        f"touch meet-seen-$SLURMD_NODENAME; {pause.format(word='end')}"
    )
    both = (alice, bob)
    for user in both:
        for path in user.home.glob("meet-*"):
            path.unlink()
    cluster.inside("echo bob > /etc/whose", bob.name).ok()
    running = []
    try:
        for user in both:
            command = f"srun -N3 bash -c '{look}'"
            words = ["sdee", "run", "--env", "jobs", "--", "bash", "-c", command]
            running.append(
                subprocess.Popen(
                    cluster.words("login1", words, user.name), stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                )
            )  # fmt: skip
        for word, answer in (("here", "go"), ("seen", "end")):
            wait_for(
                lambda word=word: all(len(list(u.home.glob(f"meet-{word}-*"))) == 3 for u in both),
                f"tasks of both users on all nodes ({word})",
                60,
            )
            for user in both:
                (user.home / f"meet-{answer}").touch()
        outs = [process.communicate(timeout=60) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                assert pipe is not None
                pipe.close()
        for user in both:
            cluster.run("login1", ["scancel", "-u", user.name])
    for (out, err), process, own, user in zip(outs, running, ("alice", "bob"), both, strict=True):
        assert process.returncode == 0, (out, err)
        lines = out.splitlines()
        assert lines.count(own) == 3, out
        assert ("bob" if own == "alice" else "alice") not in lines
        assert lines.count(user.name) == 6, "own /dev/shm, and no home but one's own"
        assert lines.count(f"mine-{user.name}") == 3
        assert out.count("mine-sdee") == 3, "the other's /tmp"
        assert lines.count("end") == 3
        assert out.count("sdee-init") == 3, "the other's processes"


def test_exit_codes_and_signals(cluster: SdeeCluster, alice: User) -> None:
    script = """
srun -n2 sh -c 'exit $((SLURM_PROCID * 7))' 2>/dev/null; echo code $?
srun sh -c 'kill -USR1 $$' 2>/dev/null; echo killed $?
srun no-such-command 2>/dev/null; echo missing $?
sbatch -W --parsable --wrap 'exit 9' -o /dev/null >/dev/null; echo batch $?
salloc -Q -N2 bash -c 'srun hostname | sort -u | wc -l; srun -N1 cat /etc/whose; exit 4'; echo alloc $?
srun id -u; id -u
cd /opt; srun pwd
srun --export=ALL,COLOUR=blue sh -c 'echo $COLOUR $SDEE_ENVIRONMENT'
"""
    out = cluster.inside(script, alice.name).ok().splitlines()
    assert out[:2] == ["code 7", f"killed {128 + 10}"]
    assert out[2] != "missing 0"
    assert out[3] == "batch 9"
    assert out[4:] == ["2", "alice", "alloc 4", "0", "0", "/opt", "blue jobs"]


def test_client_commands_by_their_absolute_paths(cluster: SdeeCluster, alice: User) -> None:
    script = """
/usr/bin/sinfo -h -o %D
job=$(/usr/bin/sbatch --parsable -o /dev/null --wrap 'sleep 300')
/usr/bin/squeue -h -j $job -o %u
/usr/bin/scontrol show job $job | grep -c UserId=$USER
/usr/bin/scancel $job; echo cancelled $?
/usr/bin/sacct >/dev/null 2>&1; echo sacct $?
"""
    inside = cluster.inside(script, alice.name).ok().splitlines()
    outside = cluster.run("login1", ["sacct"], alice.name).code
    assert inside == ["3", alice.name, "1", "cancelled 0", f"sacct {outside}"]


def test_arrays_and_dependencies(cluster: SdeeCluster, alice: User) -> None:
    script = """
rm -f part-*.out after.out
job=$(sbatch --parsable --array=1-3%2 -o part-%a.out --wrap 'echo $SLURM_ARRAY_TASK_ID $(cat /etc/whose)')
sbatch -W -d afterok:$job -o after.out --wrap 'echo after $(cat /etc/whose)' >/dev/null
cat part-1.out part-2.out part-3.out after.out
"""
    out = cluster.inside(script, alice.name).ok()
    assert out.splitlines() == ["1 alice", "2 alice", "3 alice", "after alice"]


def test_a_terminal(cluster: SdeeCluster, alice: User) -> None:
    command = "script -qec \"srun --pty bash -c 'tty; cat /etc/whose; stty size'\" /dev/null"
    out = cluster.inside(command, alice.name).ok()
    assert "/dev/pts/" in out
    assert "alice" in out


def test_signal_option_and_scancel_reach_the_tasks_once(cluster: SdeeCluster, alice: User) -> None:
    trap = 'trap "echo got" USR1; touch ready-$SLURM_JOB_ID; for i in $(seq 600); do sleep 0.1; [ -e stop-$SLURM_JOB_ID ] && exit; done'
    (alice.home / "trap.sh").write_text(f"#!/bin/bash\n{trap}\n")
    job = cluster.inside("sbatch --parsable -o trap.out trap.sh", alice.name).ok().strip()
    wait_for(lambda: (alice.home / f"ready-{job}").exists(), "the job runs")
    signal = ["scancel", "-b", "-s", "USR1", job]
    wait_for(lambda: cluster.run("login1", signal, alice.name).code == 0, "scancel")
    wait_for(lambda: "got" in read(alice.home / "trap.out"), "the signal")
    (alice.home / f"stop-{job}").touch()
    wait_for(lambda: not cluster.run("login1", ["squeue", "-h", "-j", job]).out.strip(), "its end")
    assert read(alice.home / "trap.out") == "got\n"


def test_cancelled(cluster: SdeeCluster, alice: User) -> None:
    """Batch and srun end by SIGTERM and, here after three seconds, SIGKILL; nothing is left."""
    stubborn = "trap '' TERM; touch up-$SLURM_JOB_ID; (setsid sleep 500 &) ; sleep 500"
    job = cluster.inside(
        f'sbatch --parsable -N2 -o /dev/null --wrap "{stubborn.replace("$", chr(92) + "$")}"',
        alice.name,
    ).ok()
    job = job.strip()
    wait_for(lambda: (alice.home / f"up-{job}").exists(), "the job runs")
    cluster.run("login1", ["scancel", job], alice.name).ok()
    cluster.wait_clean()
    waits = "srun -N3 sleep 500"
    process = subprocess.Popen(
        cluster.words("login1", ["sdee", "run", "--env", "jobs", "--", "bash", "-c", waits], alice.name),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        found = wait_for(
            lambda: (
                cluster.run("login1", ["squeue", "-h", "-t", "R", "-u", alice.name, "-o", "%A"]).out
            ),
            "srun runs",
        )
        number = str(found).split()[0]
        cluster.run("login1", ["scancel", number], alice.name).ok()
        out, err = process.communicate(timeout=120)
        assert process.returncode != 0, (out, err)
    finally:
        process.kill()
    cluster.wait_clean()


def test_a_directory_that_only_the_environment_has(cluster: SdeeCluster, alice: User) -> None:
    (alice.home / "where.sh").write_text(
        "#!/bin/bash\n#SBATCH -o where.out --chdir=/opt/only\npwd; cd sub; srun pwd\n"
        "cd /tmp; srun pwd; srun -D /opt/only/sub --export=NONE /bin/sh -c pwd -D x\n"
    )
    line = "mkdir -p /opt/only/sub; cd /opt/only/sub; srun pwd; srun -D .. pwd; srun pwd : pwd; "
    done = cluster.inside(f"{line} sbatch -W -o ~/where.out ~/where.sh", alice.name)
    *shown, _ = done.ok().splitlines()
    assert shown == ["/opt/only/sub", "/opt/only", "/opt/only/sub", "/opt/only/sub"]
    found = [x for x in read(alice.home / "where.out").splitlines() if x.startswith("/")]
    assert found == ["/opt/only", "/opt/only/sub", "/tmp", "/opt/only/sub"]


def test_output_that_only_the_environment_could_have_is_warned_of(
    cluster: SdeeCluster, alice: User
) -> None:
    line = "mkdir -p /opt/only; cd /opt/only; sbatch --wrap true"
    assert "/opt/only/slurm-%j.out can't be made" in cluster.inside(line, alice.name).err
    for fine in ("-o ~/fine.out", "-o /dev/null -D /opt/only", "--chdir=$HOME"):
        assert cluster.inside(f"cd /opt; sbatch {fine} --wrap true", alice.name).err == ""


def test_what_sbcast_brings_to_nodes(cluster: SdeeCluster, alice: User) -> None:
    """Slurm writes to the node's /tmp, tasks have one of their own; three ways that work."""
    (alice.home / "cast.sh").write_text("#!/bin/sh\nhostname\n")
    (alice.home / "cast.sh").chmod(0o755)

    def cast(place: str) -> tuple[int, list[str], str]:
        line = f"salloc -w n1,n2 sh -c 'sbcast -f ~/cast.sh {place} && srun {place}'"
        done = cluster.inside(line, alice.name)
        err = [x for x in done.err.splitlines() if not x.startswith("salloc:")]
        return done.code, sorted(done.out.split()), "\n".join(err)

    code, _, said = cast("/tmp/cast")
    assert code != 0 and said.startswith("sbcast: sdee: tasks don't see /tmp/cast of the nodes")
    assert cast("$HOME/cast") == (0, ["n1", "n2"], "")
    # A directory of each node's own, which the site shares.
    site = cluster.directory / "etc-sdee" / "sdee.toml"
    before = site.read_text()
    nodes = ("login1", "n1", "n2")
    try:
        for node in nodes:
            mount = ["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/srv"]
            cluster.run(node, mount).ok()
        site.write_text(before.replace("[instance]", '[instance]\nshared = ["/srv"]'))
        assert cast("/srv/cast") == (0, ["n1", "n2"], "")
    finally:
        site.write_text(before)
        cluster.wait_clean()
        for node in nodes:
            cluster.run(node, ["umount", "-l", "/srv"])
    # The node's /tmp in place of the instance's.
    lines = '[instance]\\nbinds = ["/tmp"]\\n'
    write = f"mkdir -p ~/.config/sdee; printf '{lines}' > ~/.config/sdee/sdee.toml"
    cluster.run("login1", write, alice.name).ok()
    try:
        assert cast("/tmp/cast") == (0, ["n1", "n2"], "")
        done = cluster.inside("srun -w n1,n2 --bcast=/tmp/other ~/cast.sh", alice.name)
        assert sorted(done.ok().split()) == ["n1", "n2"]
    finally:
        cluster.run("login1", "rm -r ~/.config/sdee", alice.name).ok()
    assert cluster.run("n1", ["stat", "-c", "%U", "/tmp/cast"]).ok() == f"{alice.name}\n"
    cluster.wait_clean()


def test_a_job_of_a_job_inherits_no_environment(cluster: SdeeCluster, alice: User) -> None:
    look = "env | grep -c SPANK_SDEE; ls /etc/whose"
    cluster.inside(f"srun sbatch -W --sdee=no -o ~/none.out --wrap '{look}'", alice.name)
    shown = read(alice.home / "none.out")
    assert shown.startswith("0\n")
    assert "No such file" in shown


def test_many_jobs_leave_nothing(cluster: SdeeCluster, alice: User) -> None:
    row = "for i in $(seq 10); do srun -n1 cat /etc/whose || exit 1; done"
    assert cluster.inside(row, alice.name).ok().split() == ["alice"] * 10
    once = "for i in $(seq 8); do srun -n1 cat /etc/whose & done; wait"
    assert cluster.inside(once, alice.name).ok().split() == ["alice"] * 8
    cluster.wait_clean()
