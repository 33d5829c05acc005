"""The command line: help, exit codes, one line for an error, and nothing heavy imported for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mount_helpers.mount_fuse_sdeefs import EX_FAIL, EX_USAGE, main, plan
from sdeefs import overlayfs_command
from sdeefs.cli import parser


def sdeefs(*words: str, module: str = "sdeefs") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("words", [["--help"], ["mount", "--help"], ["--version"]])
def test_help_and_version(words: list[str]) -> None:
    done = sdeefs(*words)
    assert done.returncode == 0
    assert done.stdout.startswith(("usage: sdeefs", "sdeefs 0."))


def test_the_help_names_every_option() -> None:
    from sdeefs.options import _TABLE

    text = sdeefs("mount", "--help").stdout
    for name in ("lowerdir", "redirect_dir", "uidmap", "secrets", "passthrough", "lower_timeout"):
        assert name in _TABLE
        assert f"{name}=" in text


def test_usage_errors_are_status_2() -> None:
    for words in (
        [], ["frobnicate"], ["mount"], ["mount", "a", "b"], ["mount", "u", "l", "m", "-o", "fast"],
        ["mount", "m", "-o", "lowerdir=/a,index=sometimes"], ["umount"],
        ["mount", "u", "l", "m", "-o", "lowerdir=/x"],
    ):  # fmt: skip
        assert sdeefs(*words).returncode == 2, words


def test_failures_are_one_line_and_status_1(tmp_path: Path) -> None:
    for words in (
        ["mount", str(tmp_path / "u"), str(tmp_path), str(tmp_path)],
        ["umount", str(tmp_path)],
        ["umount", str(tmp_path / "absent")],
        ["diff", str(tmp_path / "u"), str(tmp_path)],
        ["status", str(tmp_path)],
        ["doctor", str(tmp_path / "absent")],
    ):
        done = sdeefs(*words)
        assert done.returncode == 1, words
        assert done.stderr.count("\n") == 1, done.stderr
        assert str(tmp_path) in done.stderr


def test_nothing_heavy_is_imported_for_small_answers(tmp_path: Path) -> None:
    # In the foreground: else the server to be imports already, beside the command.
    mount = ["mount", "--foreground", "u", "l", "m", "-o", "fast"]
    for words in (mount, ["status"], ["mount", "--help"]):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "sdeefs", *words],
            capture_output=True, text=True, timeout=60, check=False,
            env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        )  # fmt: skip
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "sdeefs.cli" in imported
        heavy = {"trio", "pyfuse3", "asyncio", "sdeefs.core.filesystem", "ssl"}
        assert not imported & heavy, words


def test_status_without_mounts_of_ours_is_json(tmp_path: Path) -> None:
    done = sdeefs("status", "--json")
    assert done.returncode == 0
    assert isinstance(json.loads(done.stdout), list)


def test_doctor_says_what_works(tmp_path: Path) -> None:
    done = sdeefs("doctor", "--json", str(tmp_path))
    assert done.returncode == 0
    told = json.loads(done.stdout)
    assert told["engines"] == {"kernel": True, "fuse": True}
    assert {f["name"] for f in told["findings"]} >= {
        "overlay", "fuse", "fanotify", "reflink", "transport-ring", "shortcuts"
    }  # fmt: skip
    text = sdeefs("doctor", str(tmp_path)).stdout
    assert "engines that work here: kernel, fuse" in text
    assert os.listdir(tmp_path) == []


# --- mount(8)'s helper -------------------------------------------------------------------------


def test_the_helper_reads_what_mount_gives() -> None:
    command, namespace, really = plan(
        ["src", "/m", "-o", "rw,lowerdir=/a", "-t", "fuse.sdeefs", "-sv", "-N", "77"]
    )
    assert command == [
        "mount", "-o", "rw,lowerdir=/a", "--sloppy", "--verbose", "--source", "src", "--", "/m"
    ]  # fmt: skip
    assert (namespace, really) == ("77", True)
    assert plan(["-n", "-f", "src", "/m"])[2] is False
    parsed = parser().parse_args(command)
    assert (parsed.places, parsed.source, parsed.options) == (["/m"], "src", ["rw,lowerdir=/a"])


@pytest.mark.parametrize(
    "words",
    [[], ["one"], ["a", "b", "c"], ["a", "b", "-q"], ["a", "b", "-o"], ["a", "b", "-t", "x"]],
)
def test_the_helper_refuses_wrong_usage(words: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(words) == EX_USAGE
    assert "usage" in capsys.readouterr().err


def test_the_helper_says_its_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: mount.fuse.sdeefs")


def test_the_helper_has_the_exit_codes_of_mount(tmp_path: Path) -> None:
    assert main(["src", str(tmp_path), "-o", "lowerdir=/no/such"]) == EX_FAIL
    assert main(["src", str(tmp_path), "-o", "wrong=1"]) == EX_USAGE
    assert main(["-f", "src", str(tmp_path), "-o", "lowerdir=/no/such"]) == 0


# --- the drop-in for fuse-overlayfs ------------------------------------------------------------


def test_the_drop_in_says_a_version_as_fuse_overlayfs_does(
    capsys: pytest.CaptureFixture,
) -> None:
    assert overlayfs_command.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fuse-overlayfs: version 1.")
    assert overlayfs_command.main(["--help"]) == 0


def test_the_drop_in_reads_arguments_as_libfuse_does() -> None:
    options, places, flags = overlayfs_command.read(
        ["-f", "-olowerdir=/a", "-o", "ro", "/m", "--debug"]
    )
    assert (options, places, flags) == (["lowerdir=/a", "ro"], ["/m"], {"f", "d"})


@pytest.mark.parametrize("words", [["-x"], ["-o"], ["/m", "/n"], ["-o", "lowerdir=/a"], ["--fast"]])
def test_the_drop_in_refuses_wrong_usage(words: list[str], capsys: pytest.CaptureFixture) -> None:
    assert overlayfs_command.main(words) == 2
    assert capsys.readouterr().err.startswith("sdeefs-overlayfs: ")
