"""Binds of an environment's own in its jobs: what travels, and what a node makes of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdee_launch.accounts import Account
from sdee_launch.config import Settings
from sdee_launch.deploy.errors import DeployProblem
from sdee_launch.environments import EnvironmentSettings, NoSuchEnvironment
from sdee_launch.slurm import rootless_task, transfer
from tests.conftest import User
from tests.jobs.cluster_lab import Result, wait_for
from tests.jobs.jobs_lab import SdeeCluster

#: On each node another directory: /tmp is a node's own.
DATA = "/tmp/sdee bound"
GOOD = {"ref": "a@3", "identity": "0" * 16, "source": "/x", "transport": "shared"}


def test_binds_travel_as_one_variable() -> None:
    binds = ("/data", "/my data:/mnt/a,b:ro", "/ü\n\udcff:/mnt/x")
    reference = transfer.Reference("a", 3, "0" * 16, "/x", "shared", binds)
    variables = reference.variables()
    assert variables["binds"].isascii() and "\n" not in variables["binds"]
    assert transfer.parse(variables) == reference
    assert transfer.parse(GOOD).binds == (), "of a job that an older SDEE submitted"
    assert "binds" not in transfer.parse(GOOD).variables()


@pytest.mark.parametrize(
    "binds",
    [
        "", "x", "{}", "null", "[1]", '["/a", ["/b"]]', "[" * 9000, '["relative"]', '["/a:/b:/c"]',
        '["/a:/proc/x"]', '["/a:/"]', '["/a/../b:/c"]', r'["/a\u0000b"]', r'["/\ud800"]',
        json.dumps(["/a"] * 65), json.dumps(["/" + "x" * 16000]),
    ],
)  # fmt: skip
def test_binds_that_came_through_the_users_hands_are_checked(binds: str) -> None:
    with pytest.raises(transfer.TransferError):
        transfer.parse({**GOOD, "binds": binds})


def test_more_binds_than_travel_are_refused_at_submission() -> None:
    assert len(transfer.check_binds(["/data"] * 64)) == 64
    for many in (["/data"] * 65, ["/" + "x" * 1000] * 17):
        with pytest.raises(transfer.TransferError, match=rf"^{len(many)} binds"):
            transfer.check_binds(many)


def test_a_rootless_task_says_what_the_node_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[list[str], list[str]]] = []

    def run(place: str, named: list[str], command: list[str]) -> int:
        seen.append((named, command))
        return 7

    monkeypatch.setattr(rootless_task, "BASE", f"{tmp_path}/sdee-{{uid}}")
    monkeypatch.setattr(rootless_task, "_prepare", lambda *_: None)
    monkeypatch.setattr(rootless_task, "_run", run)
    monkeypatch.setattr(rootless_task, "_leave", lambda *_: None)
    four = ["main", "0" * 16, "3", "/state"]  # as scripts have them that were submitted before
    assert rootless_task.main([*four, "--", "srun", "--", "x"]) == 7
    assert rootless_task.main([*four, "/a:/b", "/c", "--", "x"]) == 7
    assert seen == [(four, ["srun", "--", "x"]), ([*four, "/a:/b", "/c"], ["x"])]
    assert rootless_task.main(four) == rootless_task.main([*four[:3], "--", "x"]) == 2
    monkeypatch.undo()
    capsys.readouterr()

    rootless_task._check([str(tmp_path), f"{tmp_path}:/mnt:ro"])
    with pytest.raises(DeployProblem, match=rf"^bind of {tmp_path}/none: No such file"):
        rootless_task._check([f"{tmp_path}/none:/mnt"])


def test_a_generation_of_an_environment_that_is_gone_has_none(tmp_path: Path) -> None:
    account = Account("me", os.getuid(), os.getgid(), str(tmp_path), "/bin/sh", (os.getgid(),))
    settings = Settings(store=str(tmp_path / "store"))
    assert transfer._present(account, settings, "gone", True) == ("", EnvironmentSettings())
    with pytest.raises(NoSuchEnvironment):
        transfer._present(account, settings, "gone", False)


@pytest.fixture
def data(cluster: SdeeCluster, alice: User, bob: User) -> Iterator[None]:
    """DATA on all nodes but n3, where there is none."""
    nodes = ("login1", "n1", "n2")
    for node in nodes:
        make = f"mkdir -m 777 '{DATA}' && echo {node} > '{DATA}/where'"
        cluster.run(node, make).ok()
    yield
    for node in (*nodes, "n3"):
        cluster.run(node, ["rm", "-rf", DATA, "/tmp/closed"]).ok()
    shutil.rmtree(rootless_task.BASE.format(uid=bob.uid), ignore_errors=True)


def create(cluster: SdeeCluster, user: User, name: str, *binds: str) -> None:
    words = ["sdee", "env", "create", name]
    for bind in binds:
        words += ["--bind", bind]
    cluster.run("login1", words, user.name).ok()


def test_a_job_has_the_binds_of_its_environment(
    cluster: SdeeCluster, alice: User, data: None
) -> None:
    create(cluster, alice, "bound", f"{DATA}:/opt/data", f"{DATA}:/opt/a,b:ro")
    look = "cat /opt/data/where '/opt/a,b/where'"

    def inside(command: str) -> Result:
        return cluster.inside(command, alice.name, "bound")

    assert inside(look).ok().split() == ["login1"] * 2
    seen = inside(f'srun -w n1,n2 bash -c "{look}; touch /opt/data/new; ! touch /opt/a,b/x"')
    assert sorted(seen.ok().split()) == ["n1"] * 2 + ["n2"] * 2
    assert "Read-only" in seen.err
    owner = cluster.run("n2", ["stat", "-c", "%U", f"{DATA}/new"])
    assert owner.ok() == f"{alice.name}\n"

    # A node that lacks it: as a login there would, with the node and the path.
    for nodes in ("n3", "n1,n2,n3"):
        done = inside(f"srun -w {nodes} true")
        assert done.code != 0
        assert f"n3: bind of {DATA}: No such file or directory" in done.err, done
    inside("sbatch -W -w n3 -o ~/lacks.out --wrap 'echo ran'")
    said = (alice.home / "lacks.out").read_text()
    assert f"n3: bind of {DATA}: No such file or directory" in said and "ran" not in said
    cluster.wait_idle()

    # A job that waits, a generation, a run after a requeue: theirs are those of the submission.
    (alice.home / "held.sh").write_text(
        "#!/bin/bash\n#SBATCH --requeue --open-mode=append -w n1 -o held.out\n"
        'cat /opt/data/where\n[ -n "$SLURM_RESTART_COUNT" ] || sleep 300\n'
    )
    job = inside("cd ~; sbatch --parsable -H held.sh").ok().strip()
    assert inside("srun -w n2 --sdee=bound@1 cat /opt/data/where").ok() == "n2\n"
    cluster.run("login1", ["sdee", "env", "rm", "bound"], alice.name).ok()
    create(cluster, alice, "bound")
    cluster.run("login1", ["scontrol", "release", job]).ok()
    held = alice.home / "held.out"

    def seen_by_runs(count: int) -> bool:
        return held.exists() and held.read_text().splitlines().count("n1") == count

    wait_for(lambda: seen_by_runs(1), "output of the held job")
    cluster.run("login1", ["scontrol", "requeue", job]).ok()
    soon = ["scontrol", "update", f"JobId={job}", "StartTime=now+2"]
    wait_for(
        lambda: cluster.job_state(job) == "PENDING" and cluster.run("login1", soon).code == 0,
        "the job waits again",
    )
    wait_for(lambda: seen_by_runs(2), "output of the requeued job")
    assert inside("srun -w n3 ls /opt").ok() == inside("ls /opt").ok()
    cluster.wait_clean()


def test_a_node_binds_nothing_that_its_user_can_t_reach(
    cluster: SdeeCluster, alice: User, data: None
) -> None:
    create(cluster, alice, "closed", f"{DATA}:/opt/data")
    secret = "mkdir -m 700 /tmp/closed; mkdir -m 755 /tmp/closed/in; echo x > /tmp/closed/in/where"
    # What the login node shows leads elsewhere on a node: n1's own directory is root's alone, on n2
    # one lies below such a directory.
    cluster.run("n1", f"chmod 700 '{DATA}'").ok()
    cluster.run("n2", f"{secret}; rm -r '{DATA}'; ln -s /tmp/closed/in '{DATA}'").ok()
    done = cluster.inside("srun -w n1 cat /opt/data/where", alice.name, "closed")
    assert (done.code, done.out) == (1, "") and "Permission denied" in done.err
    done = cluster.inside("srun -w n2 cat /opt/data/where", alice.name, "closed")
    assert (done.code != 0, done.out) == (True, "")
    assert f"n2: bind of {DATA}: Permission denied" in done.err, done

    # Nor with a Prolog that was told by hand.
    told = {**GOOD, "ref": "closed@1", "binds": '["/tmp/closed/in:/proc/x"]'}
    ask = (
        "from sdee_launch import protocol\n"
        f"protocol.request('job-prepare', job=999999, uid={alice.uid}, wanted={told!r})"
    )
    done = cluster.run("n2", ["python3", "-I", "-c", ask])
    assert "nothing may be bound at /proc/x" in done.err, done
    cluster.run("n2", ["rm", "-f", "/run/sdee/jobs/999999"]).ok()
    cluster.wait_clean()


def test_a_rootless_job_has_the_binds_of_its_environment(
    cluster: SdeeCluster, bob: User, data: None
) -> None:
    create(cluster, bob, "alone-bound", f"{DATA}:/opt/data:ro")

    def sdee(*words: str) -> Result:
        rootless = [*words[:1], "--rootless", "--env", "alone-bound", *words[1:]]
        return cluster.run("login1", ["sdee", *rootless], bob.name, env={"SDEE_MODE": "rootless"})

    assert sdee("run", "--", "cat", "/opt/data/where").ok() == "login1\n"
    done = sdee("srun", "-w", "n1,n2", "cat", "/opt/data/where")
    assert sorted(done.ok().split()) == ["n1", "n2"]
    done = sdee("srun", "-w", "n3", "cat", "/opt/data/where")
    assert done.code != 0 and f"sdee: n3: bind of {DATA}: No such file or directory" in done.err
    (bob.home / "bound.sh").write_text(
        "#!/bin/bash\n#SBATCH -w n1,n2 -o bound.out\ncat /opt/data/where\n"
        "sdee srun -w n2 -n1 -N1 cat /opt/data/where\n! touch /opt/data/x\n"
    )
    sdee("sbatch", "-W", "bound.sh").ok()
    *seen, refused = (bob.home / "bound.out").read_text().splitlines()
    assert seen == ["n1", "n2"] and "Read-only" in refused
    for node in cluster.computes:
        left = cluster.run(node, f"ls -A {rootless_task.BASE.format(uid=bob.uid)}/{node}")
        assert left.ok().split() in ([], ["cache"]), left
