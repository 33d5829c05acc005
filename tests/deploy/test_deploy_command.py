"""`sdee deploy` and `sdee cache`, as a user without privileges runs them."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sdee_launch import config
from sdee_launch.accounts import account_of
from sdee_launch.config import Settings
from sdee_launch.deploy import ended, places, retired
from tests.conftest import User

Sdee = Callable[..., subprocess.CompletedProcess[str]]
ENVIRONMENT = "deploy-test"
OURS = ("--env", ENVIRONMENT)


@pytest.fixture
def sdee(alice: User) -> Iterator[Sdee]:
    """Run `sdee` as alice, who has an environment with two files."""
    account = pwd.getpwnam(alice.name)
    share = Path(account.pw_dir) / ".local/share/sdee"

    def call(*words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        code = "import sys; from sdee_launch.cli import main; sys.exit(main(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-I", "-c", code, *words],
            user=account.pw_uid,
            group=account.pw_gid,
            extra_groups=[],
            cwd="/",
            env={"HOME": account.pw_dir, "PATH": os.environ["PATH"], "USER": account.pw_name},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == status, (words, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done

    call("env", "create", ENVIRONMENT)
    upper = share / "environments" / ENVIRONMENT / "upper"
    upper.mkdir(exist_ok=True)
    os.chown(upper, account.pw_uid, account.pw_gid)
    for name in ("one", "two"):
        (upper / name).write_text(name)
        os.chown(upper / name, account.pw_uid, account.pw_gid)
    yield call
    call("env", "rm", ENVIRONMENT)
    shutil.rmtree(share / "spool" / ENVIRONMENT, ignore_errors=True)


def test_plan_push_status(sdee: Sdee) -> None:
    plan = json.loads(sdee("deploy", "plan", *OURS, "--json").stdout)
    assert (plan["new_files"], plan["new_bytes"]) == (2, 6)
    assert f"{ENVIRONMENT}@1: 2 new files" in sdee("deploy", "push", *OURS).stdout
    assert "nothing has changed" in sdee("deploy", "push", *OURS).stdout
    plan = json.loads(sdee("deploy", "plan", *OURS, "--json").stdout)
    assert plan["new_files"] == 0
    (about,) = json.loads(sdee("deploy", "status", *OURS, "--json").stdout)
    assert (about["number"], about["new_files"], about["content"]) == (1, 2, 6)
    assert f"{ENVIRONMENT}@1" in sdee("deploy", "status", *OURS).stdout


def test_what_stays_behind_is_the_environment_s_choice(sdee: Sdee) -> None:
    assert sdee("deploy", "exclude", *OURS, "--add", "two").stdout == "two\n"
    plan = json.loads(sdee("deploy", "plan", *OURS, "--json").stdout)
    assert (plan["new_files"], plan["excluded"]) == (1, 1)
    assert sdee("deploy", "exclude", *OURS, "--remove", "two").stdout == ""
    assert "isn't excluded" in sdee("deploy", "exclude", *OURS, "--remove", "two", status=1).stderr


def test_generations_go_with_their_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not while a job may want them, nor if there are new ones."""
    monkeypatch.setattr(places, "LOCAL_SPOOL", f"{tmp_path}/local/{{uid}}")
    settings = config.apply(Settings(), f"[deploy]\nspool = '{tmp_path}/spool'\n", "file")
    account = account_of(os.getuid())
    queue: list[set[str] | None] = [{"7"}, None]
    monkeypatch.setattr(ended, "live_jobs", lambda user: queue.pop(0) if queue else set())
    path = tmp_path / "spool/old"

    def clear(*environments: str) -> tuple[list[str], list[str]]:
        return retired.clear(account, settings, environments)

    def generation(number: int) -> None:
        (path / f"{number}.manifest").touch()

    path.mkdir(parents=True)
    (tmp_path / "spool/other").mkdir()
    generation(3)
    retired.retire(account, settings, "old")
    retired.retire(account, settings, "never-travelled")
    assert clear("other") == ([], [str(path)])  # a job is there
    assert clear("other") == ([], [str(path)])  # nobody can tell
    assert clear("old") == ([], [])  # it was made anew
    generation(4)
    assert clear() == ([], [])
    assert clear() == ([], []) and path.is_dir()  # no mark any more
    retired.retire(account, settings, "old")
    assert clear() == ([str(path)], [])
    assert [x.name for x in (tmp_path / "spool").iterdir()] == ["other"]


@pytest.fixture
def squeue(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What `sdee` takes for Slurm's: a script, which says that there is a job."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:  # alice can't reach pytest's own
        path = Path(name, "squeue")
        path.write_text("#!/bin/sh\necho 7\n")
        for one in (path, path.parent):
            one.chmod(0o755)
        monkeypatch.setenv("PATH", f"{name}:{os.environ['PATH']}")
        yield path


def test_env_rm_says_what_it_leaves(sdee: Sdee, alice: User, squeue: Path) -> None:
    spool = alice.home / ".local/share/sdee/spool" / ENVIRONMENT
    sdee("deploy", "push", *OURS)
    assert f"{spool} stays" in sdee("env", "rm", ENVIRONMENT).stderr
    assert sdee("cache", "prune", "--json").stderr == "" and spool.exists()
    squeue.write_text("#!/bin/sh\n")
    assert f"removed {spool}" in sdee("cache", "prune", "--json").stderr
    assert not spool.exists()
    sdee("env", "create", ENVIRONMENT)
    sdee("deploy", "push", *OURS)
    assert sdee("env", "rm", ENVIRONMENT).stderr == "" and not spool.exists()
    sdee("env", "create", ENVIRONMENT)


def test_env_rename_takes_the_generations_along(sdee: Sdee, alice: User, squeue: Path) -> None:
    spool = alice.home / ".local/share/sdee/spool"
    old, new = spool / ENVIRONMENT, spool / "renamed"

    def identity(path: Path) -> str:
        return (path / "identity").read_text()

    assert sdee("env", "rename", ENVIRONMENT, "renamed").stderr == ""  # it never travelled
    assert sdee("env", "rename", "renamed", ENVIRONMENT).stderr == ""
    sdee("deploy", "push", *OURS)
    known, files = identity(old), {"1.manifest", "1.pack", "1.json"}
    assert f"{old} stays" in sdee("env", "rename", ENVIRONMENT, "renamed").stderr
    # The job in the queue finds what it was promised, and nodes know what they have.
    assert files < set(os.listdir(old)) and files < set(os.listdir(new))
    assert identity(new) == known != identity(old)
    assert "renamed@1: nothing has changed" in sdee("deploy", "push", "--env", "renamed").stdout
    assert "renamed@1" in sdee("deploy", "status", "--env", "renamed").stdout
    # One of the same name begins with what is there, for nodes that have nothing of it.
    sdee("env", "create", ENVIRONMENT)
    assert f"{ENVIRONMENT}@2: 0 new files" in sdee("deploy", "push", *OURS).stdout
    sdee("env", "rm", ENVIRONMENT)
    squeue.write_text("#!/bin/sh\n")
    assert sdee("env", "rename", "renamed", ENVIRONMENT).stderr == ""
    assert identity(old) == known and not new.exists()
    assert f"{ENVIRONMENT}@1: nothing has changed" in sdee("deploy", "push", *OURS).stdout
    assert [x.name for x in spool.iterdir()] == [ENVIRONMENT]


def test_mistakes_get_one_line(sdee: Sdee) -> None:
    for words in (
        ("deploy", "plan", "--env", "no-such"),
        ("deploy", "push", "--env", "../x"),
        ("cache", "prune", "--limit", "many"),
    ):
        done = sdee(*words, status=1)
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_an_empty_cache_is_no_failure(sdee: Sdee) -> None:
    sdee("cache", "prune")
    assert json.loads(sdee("cache", "list", "--json").stdout) == []
    assert "0 generations removed" in sdee("cache", "prune").stdout
    sdee("cache", "verify", "--checksum")
