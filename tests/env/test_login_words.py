"""What a login wants, told from the arguments of a login shell and sshd's variables."""

from __future__ import annotations

import pytest

from sdee_launch.login import (
    SFTP_SERVERS,
    Wanted,
    command_line,
    path_of_root,
    shell_of,
    wanted,
)

SFTP = "/usr/lib/openssh/sftp-server"


@pytest.mark.parametrize(
    ("arguments", "original", "expected"),
    [
        ([], None, Wanted(None)),
        (["-l"], None, Wanted(None)),
        (["-c", "ls -l"], None, Wanted("ls -l")),
        (["-l", "-c", "ls"], None, Wanted("ls")),
        (["-c", ""], None, Wanted("")),
        (["-c", SFTP], None, Wanted(SFTP)),
        # ForceCommand, under a plain shell and under this one
        ([], "scp -t x", Wanted("scp -t x")),
        (["-c", "/usr/local/bin/sdee-login"], "ls", Wanted("ls")),
        (["-c", "/usr/local/bin/sdee-login"], None, Wanted(None)),
        # a command of the client's own is not replaced by the variable
        (["-c", "env"], "rm -rf x", Wanted("env")),
        (["-c", "@host"], None, Wanted(None, True)),
        (["-c", "@host sdee env reset"], None, Wanted("sdee env reset", True)),
        (["-c", "@hosts"], None, Wanted("@hosts")),
    ],
)
def test_what_is_wanted(arguments: list[str], original: str | None, expected: Wanted) -> None:
    environ = {} if original is None else {"SSH_ORIGINAL_COMMAND": original}
    assert wanted(arguments, environ) == expected


def test_internal_sftp_runs_inside() -> None:
    command = wanted([], {"SSH_ORIGINAL_COMMAND": "internal-sftp -l INFO"}).command
    assert command is not None
    assert f"exec {SFTP_SERVERS[0]} -l INFO" in command
    assert "internal-sftp" not in command


@pytest.mark.parametrize("arguments", [["-c"], ["x"], ["--version"], ["-x"]])
def test_what_no_login_program_says(arguments: list[str]) -> None:
    with pytest.raises(ValueError):
        wanted(arguments, {})


def test_the_shell_inside() -> None:
    assert shell_of("/bin/zsh", "/bin/bash") == "/bin/zsh"
    for shell in ("", "/usr/local/bin/sdee-login", "/usr/sbin/nologin", "/bin/false"):
        assert shell_of(shell, "/bin/bash") == "/bin/bash"
    assert command_line("/bin/bash", Wanted(None)) == (["/bin/bash"], "-bash")
    assert command_line("/bin/bash", Wanted("a b")) == (["/bin/bash", "-c", "a b"], "bash")


def test_root_finds_its_programs() -> None:
    assert path_of_root("/usr/bin:/bin") == "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"
    full = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert path_of_root(full) == full
    assert path_of_root("").endswith("/usr/local/bin:/usr/bin:/bin")
