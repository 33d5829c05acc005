"""What `sdee run` may cost before it asks the daemon: its script, and what that imports."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import sdee_launch
from sdee_launch import protocol, session

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


@pytest.mark.parametrize("word", ["run", "shell"])
def test_run_and_shell_have_a_help_of_their_own(word: str) -> None:
    for option in ("--help", "-h"):
        done = _run(_program("sdee"), word, option)
        assert (done.returncode, done.stderr) == (0, ""), done
        assert done.stdout.startswith(f"usage: sdee {word} [-h]")
        for part in ("--env, -e NAME", "--engine auto|", "--bind SRC", "--rootless", "\nexample"):
            assert part in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 102
        for before in (("--env", "x"), ("-e", "x", "--engine=fuse", "--rootless")):
            assert _run(_program("sdee"), word, *before, option).stdout == done.stdout
        assert _run(_program("sdee"), word, "--env", "x", f"{option}x").returncode == 2


@pytest.mark.parametrize("line", ["ls --help", "-- --help", "-- ls -h", "- -h"])
def test_help_behind_the_options_is_the_command_s(line: str) -> None:
    command = line.removeprefix("-- ").split()
    assert session.parse(line.split())["command"] == command
    assert session.parse(["--env", "x", *line.split()])["command"] == command


@pytest.mark.parametrize(
    "line", ["sdee --help", "sdee run --help", "sdee env --help", "sdee --version",
             "sdeefs --help", "sdeefs mount --help", "sdeefs --version"],
)  # fmt: skip
def test_output_that_cannot_be_written_is_one_line(line: str) -> None:
    program, *words = line.split()
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [_program(program), *words], stdin=subprocess.DEVNULL, stdout=full, text=True,
            stderr=subprocess.PIPE, timeout=60, env=variables,
        )  # fmt: skip
    said = f"{program}: standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)


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


def test_the_second_half_of_a_session_imports_nothing_slow_either() -> None:
    code = (
        "import sys; sys.path.append(sys.argv[1]); import sdee_launch.member; print(*sys.modules)"
    )
    packages = str(Path(sdee_launch.__path__[0]).parent)
    loaded = set(_run(sys.executable, "-IS", "-c", code, packages).stdout.split())
    assert "sdee_launch.member" in loaded and not loaded & SLOW


@contextlib.contextmanager
def _refusing_daemon(tmp_path: Path) -> Iterator[list[bytes]]:
    """A daemon that says no; what it was asked, a connection each."""
    asked: list[bytes] = []
    path = str(tmp_path / "sdeed.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                # Who asked may be gone before the answer.
                with connection, contextlib.suppress(OSError):
                    asked.append(connection.recv(1 << 16))
                    if asked[-1]:
                        no = {"ok": False, "error": "not today", "kind": "denied"}
                        connection.sendall(protocol.frame(dict(no), 1000))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield asked
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _ask_program() -> Path:
    return Path(sdee_launch.__path__[0]) / "sdee-ask"


#: Arguments, and whether sdee-ask may ask for them before the interpreter runs.
ASKED = (
    (("run", "true"), True),
    (("run", "--", "true"), True),
    (("run", "-e", "one", "--engine=kernel", "true", "--env", "x"), True),
    (("run", "--env=a b/c", "--bind", "/a:/b:ro", "--bind=/c=d", "true"), True),
    (("shell",), True),
    (("shell", "--engine", "fuse"), True),
    (("run", "--env", "ö", "true"), False),
    (("run", "--env", 'a"b', "true"), False),
    (("run", "--env", "a\\b", "true"), False),
    (("run", "--engine", "some", "true"), False),
    (("run", "--unheard-of", "true"), False),
    (("run", "--env"), False),
    (("run",), False),
    (("run", "--help"), False),
    (("run", "--env", "x", "--help"), False),
    (("run", "--env", "x", "--", "--help"), True),
    (("shell", "true"), False),
    (("run", "--bind", "/" + "x" * 3000, "true"), False),
)


@pytest.mark.parametrize(("words", "early"), ASKED)
def test_what_is_asked_early_is_what_the_session_would_ask(
    words: tuple[str, ...], early: bool, tmp_path: Path
) -> None:
    environ = {
        "SDEED_SOCKET": str(tmp_path / "sdeed.sock"), "HOME": str(tmp_path), "SDEE_MODE": "",
        "SDEE_ENV": "", "SDEE_CONFIG": "/nonexistent",
    }  # fmt: skip
    show = tmp_path / "show"
    show.write_text('#!/bin/sh\necho "$SDEE_ASKED"\n')
    show.chmod(0o755)
    with _refusing_daemon(tmp_path) as asked:
        done = _run(_ask_program(), show, "-IS", "program", *words, **environ)
        number, _, request = done.stdout.strip().partition(" ")
        assert (number != "") == early, done
        # Whoever asks, the session takes that answer, and asks nothing else.
        with_it = _run(_program("sdee"), *words, **environ)
        without = _run(sys.executable, "-IS", _program("sdee"), *words, **environ)
    assert (with_it.returncode, with_it.stderr) == (without.returncode, without.stderr)
    assert len(set(asked)) <= 1
    if early:
        assert [data[4:].decode() for data in asked] == [request] * 3
    else:
        assert len(asked) in (0, 2)


@pytest.mark.parametrize(
    "environ",
    [
        {"SDEE_MODE": "rootless"},
        {"SDEED_SOCKET": "/nonexistent/sdeed.sock"},
        {"SDEE_CONFIG": "{home}/site.toml"},
        {"HOME": "{home}/user"},
    ],
)
def test_what_it_does_not_know_is_left_to_the_session(
    environ: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "site.toml").write_text("# a comment\n\n \t[environments]\n")
    (tmp_path / "user/.config/sdee").mkdir(parents=True)
    (tmp_path / "user/.config/sdee/sdee.toml").write_text("x")
    show = tmp_path / "show"
    show.write_text('#!/bin/sh\necho "$SDEE_ASKED"\n')
    show.chmod(0o755)
    usual = {
        "SDEED_SOCKET": str(tmp_path / "sdeed.sock"), "HOME": str(tmp_path), "SDEE_MODE": "",
        "SDEE_ENV": "", "SDEE_CONFIG": "/nonexistent", "SDEE_ASKED": "3 x",
    }  # fmt: skip
    more = {name: value.format(home=tmp_path) for name, value in environ.items()}
    with _refusing_daemon(tmp_path):
        words = (_ask_program(), show, "-IS", "program", "run", "true")
        assert _run(*words, **usual).stdout.endswith(
            ' {"op":"join","env":"default","engine":"auto","binds":[]}\n'
        )
        assert _run(*words, **{**usual, **more}).stdout == "\n"
        assert _run(*words[:-1], "--rootless", "true", **usual).stdout == "\n"
        if "SDEE_CONFIG" in environ:  # but it isn't asked which environment is meant
            assert "one" in _run(*words, **{**usual, **more, "SDEE_ENV": "one"}).stdout


@pytest.mark.parametrize("value", ["", "x", "3", "1 {}", "0 x", "-1 x", "77 x", "99999999999999 x"])
def test_a_variable_that_means_nothing_changes_nothing(value: str, tmp_path: Path) -> None:
    environ = {
        "SDEED_SOCKET": str(tmp_path / "sdeed.sock"),
        "HOME": str(tmp_path),
        "SDEE_ASKED": value,
    }
    with _refusing_daemon(tmp_path) as asked:
        done = _run(
            sys.executable, "-IS", _program("sdee"), "run", "--env", "one", "true", **environ
        )
        assert (done.returncode, done.stderr) == (1, "sdee: not today\n")
        assert len(asked) == 1
    code = (
        "import sys; sys.path.append(sys.argv[1]); from sdee_launch import protocol\n"
        "protocol.take_early(); import os; print('SDEE_ASKED' in os.environ)\n"
        "print('SDEE_ASKED' in open('/proc/self/environ').read(), os.system('echo $SDEE_ASKED'))"
    )
    packages = str(Path(sdee_launch.__path__[0]).parent)
    done = _run(sys.executable, "-IS", "-c", code, packages, **environ)
    assert done.stdout.split() == ["False", "True", "0"], done


def test_an_early_request_for_something_else_is_given_up(tmp_path: Path) -> None:
    code = (
        "import os, socket, sys\n"
        "one = socket.socket(socket.AF_UNIX); one.connect(os.environ['SDEED_SOCKET'])\n"
        "one.set_inheritable(True)\n"
        "os.environ['SDEE_ASKED'] = f'{one.fileno()} what'\n"
        "os.execv(sys.executable, [sys.executable, '-IS', *sys.argv[1:]])"
    )
    environ = {"SDEED_SOCKET": str(tmp_path / "sdeed.sock"), "HOME": str(tmp_path)}
    with _refusing_daemon(tmp_path) as asked:
        done = _run(
            sys.executable, "-c", code, _program("sdee"), "run", "--env", "one", "true", **environ
        )
        assert (done.returncode, done.stderr) == (1, "sdee: not today\n")
        assert len(asked) == 2 and asked[0] == b"" and b'"one"' in asked[1]
