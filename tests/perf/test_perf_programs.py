"""The drivers, the shells that run them, and where both are kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from perf import places, sandboxes
from perf.figures import Missing
from perf.places import default_scratch, described, mount_of, place
from perf.programs import compiled
from perf.sandboxes import Sandbox, as_user, with_control
from perf.sessions import Sessions


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


def _said(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout


LINES = (
    "integers",
    "floats",
    "pipe",
    "switch",
    "process",
    "execl",
    "script",
    "copy256",
    "copy4096",
)


@pytest.mark.parametrize("copies", ["1", "2"])
@pytest.mark.parametrize("line", LINES)
def test_drivers_measure_something(line: str, copies: str, programs: Path, tmp_path: Path) -> None:
    program = compiled("unixlike", programs)
    assert float(_said(str(program), line, "0.02", copies, str(tmp_path))) > 0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "words", [["nothing", "0.02", "1", "/"], ["copy256", "0.02", "2", "/proc"]]
)
def test_a_driver_that_cant_says_so(words: list[str], programs: Path) -> None:
    program = compiled("unixlike", programs)
    done = subprocess.run([program, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode
    assert done.stderr
    assert not done.stdout


def test_kernels_print_a_time_each(programs: Path) -> None:
    program = compiled("kernels", programs)
    times = _said(str(program), "ep", "is", "cg", "mg", "1").split()
    assert len(times) == 4
    assert all(float(text) > 0 for text in times)


BARE = Sandbox("bare", ())


def test_a_session_runs_one_command_after_the_other() -> None:
    with Sessions() as sessions:
        first = sessions.ask(BARE, "sh", "-c", "echo a; echo $PPID")
        second = sessions.ask(BARE, "sh", "-c", "echo 'b  c'; echo $PPID")
    assert first.split()[1] == second.split()[2]  # the same shell
    assert second.startswith("b  c\n")


def test_a_session_tells_why_a_command_failed_and_goes_on() -> None:
    with Sessions() as sessions:
        sessions.ask(BARE, "sh", "-c", "echo earlier >&2")
        with pytest.raises(Missing, match="exit status 3"):
            sessions.ask(BARE, "sh", "-c", "exit 3")
        with pytest.raises(Missing, match="it is broken"):
            sessions.ask(BARE, "sh", "-c", "echo it is broken >&2; exit 1")
        assert sessions.ask(BARE, "echo", "on") == "on\n"


def test_a_sandbox_that_doesnt_start_is_tried_once(tmp_path: Path) -> None:
    script = f"echo x >> {tmp_path}/tried; echo refused here >&2; exit 1"
    broken = Sandbox("broken", ("sh", "-c", script))
    with Sessions() as sessions:
        for _ in range(2):
            with pytest.raises(Missing, match="refused here"):
                sessions.ask(broken, "true")
    assert (tmp_path / "tried").read_text() == "x\n"


def test_what_isnt_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    here = places.Place(tmp_path, tmp_path, tmp_path, tmp_path)
    absent = {one.name: one.absent for one in sandboxes.sandboxes(None, here)}
    assert absent["bubblewrap"] == "bwrap isn't installed"
    assert absent["podman"] == "podman isn't installed"
    assert absent["docker"] == "docker isn't installed"
    with pytest.raises(Missing, match="docker isn't installed"):
        sandboxes.sandboxes(None, here)[-1].command("true")


def test_docker_without_its_daemon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\necho \"Run 'docker run --help'\" >&2\nexit 1\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    here = places.Place(tmp_path, tmp_path, tmp_path, tmp_path)
    assert sandboxes.sandboxes(None, here)[-1].absent == "no docker daemon runs on this machine"


def test_the_control_is_the_first_one_again() -> None:
    found = with_control([BARE, Sandbox("x", ("x",))])
    assert [one.name for one in found] == ["bare", "bare, again", "x"]
    assert found[1].prefix == found[0].prefix


def test_an_unknown_user_is_named() -> None:
    with pytest.raises(Missing, match="there is no such user"):
        as_user("nobody-of-that-name")


def test_a_place_is_the_users_and_goes() -> None:
    with place("nobody") as found:
        assert found.programs.parent.parent == Path("/var/cache")
        assert found.work.stat().st_uid != 0
        assert found.programs.stat().st_uid == 0
        assert (found.image / "bin").is_symlink()
    assert not found.programs.parent.exists()


def test_layers_are_told_by_filesystem_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert described(Path("/dev/shm")).startswith("tmpfs on ")
    assert described(Path("/dev/shm")).endswith("(in memory)")
    assert mount_of(Path("/proc/self")).fstype == "proc"
    monkeypatch.chdir("/dev/shm")
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    assert mount_of(default_scratch()).fstype not in places.NO_DISK


def test_overall_measures_and_writes_a_page(tmp_path: Path) -> None:
    words = ["overall", "--quick", "--rounds", "6", "--only", "bare", "--lines", "pipe"]
    done = subprocess.run(
        [sys.executable, "-m", "perf", *words, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.md").read_text()
    assert "|  | bare metal | bare metal, again |" in page
    assert "| pipe throughput [1/s] |" in page
    assert "Resolution: " in page
