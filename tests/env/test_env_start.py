"""What `sdee run` may cost before it asks the daemon: its script, and what that imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sdee_launch

PROGRAMS = ("sdee", "sdee-login", "sdeefs")
#: Each of these costs a file to load, if not milliseconds; the first half of a session needs none.
SLOW = {
    "__future__", "_json", "argparse", "contextlib", "ctypes", "dataclasses", "enum", "functools", "json",
    "logging", "os", "pathlib", "pwd", "re", "site", "socket", "subprocess", "tomllib", "trio", "typing",
}  # fmt: skip


def _program(name: str) -> Path:
    return Path(sys.executable).with_name(name)


def _run(*words: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, cwd="/",
        env={**os.environ, **more},
    )  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs_by_links_and_whatever_the_variables_say(name: str, tmp_path: Path) -> None:
    (tmp_path / "trap").mkdir()
    for module in ("re", "os", "sitecustomize", "sdee_launch", "sdeefs"):
        (tmp_path / "trap" / f"{module}.py").write_text("raise SystemExit('the trap')")
    link = tmp_path / "link"
    link.symlink_to(_program(name))
    (tmp_path / name).symlink_to("link")
    word = "-x" if name == "sdee-login" else "--version"
    for program in (_program(name), tmp_path / name):
        done = _run(program, word, PYTHONPATH=str(tmp_path / "trap"))
        if name == "sdee-login":
            assert (done.returncode, done.stdout) == (2, ""), done
            assert "a login shell takes" in done.stderr
        else:
            assert (done.returncode, done.stderr) == (0, ""), done
            assert done.stdout.split()[0] == name


def test_a_copy_without_its_interpreter_says_so(tmp_path: Path) -> None:
    copy = tmp_path / "sdee"
    copy.write_bytes(_program("sdee").read_bytes())
    copy.chmod(0o755)
    (tmp_path / "python3").symlink_to(os.path.realpath(sys.executable))
    done = _run(copy, "--version")
    assert done.returncode == 1
    assert done.stderr.startswith("sdee: ") and done.stderr.count("\n") == 1, done.stderr


def test_a_session_asks_the_daemon_before_it_imports_anything_slow() -> None:
    code = (
        "import sys; sys.path.append(sys.argv[1]); from sdee_launch import session, protocol\n"
        "import _socket\n"
        "protocol._socket = type('None', (), {**vars(_socket), 'socket': None})\n"
        "try: session.main(['run', 'true'])\n"
        "except TypeError: print(*sys.modules)"
    )
    packages = str(Path(sdee_launch.__path__[0]).parent)
    environ = {"HOME": "/nonexistent", "SDEE_CONFIG": "/nonexistent", "SDEE_MODE": "site"}
    done = _run(sys.executable, "-IS", "-c", code, packages, **environ)
    loaded = set(done.stdout.split())
    assert "sdee_launch.protocol" in loaded, done
    assert not loaded & SLOW
    assert not {name for name in loaded if name.startswith("sdeefs")}
