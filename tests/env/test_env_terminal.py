"""Terminals, job control and signals: a command in an instance behaves as one that runs right here."""

from __future__ import annotations

import fcntl
import os
import pty
import resource
import select
import signal
import struct
import termios
import time
from collections.abc import Iterator

import pytest

from tests.conftest import User
from tests.env.daemon_lab import wait_for
from tests.env.instance_lab import SECONDS, Lab, kill_now, laboratory, processes_of
from tests.env.screen_lab import Screen


@pytest.fixture(scope="module", params=("site-kernel", "rootless-fuse"))
def lab(request: pytest.FixtureRequest, alice: User) -> Iterator[Lab]:
    with laboratory(request.param, alice) as made:
        yield made


class Terminal(Screen):
    """sdee as the leader of a session on a terminal of its own."""

    patience = SECONDS

    def __init__(self, lab: Lab, *arguments: str) -> None:
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.setgroups([])
            os.setresgid(lab.user.gid, lab.user.gid, lab.user.gid)
            os.setresuid(lab.user.uid, lab.user.uid, lab.user.uid)
            os.chdir("/")
            words = lab.words(*arguments)
            os.execve(words[0], words, {**lab.environ(), "PS1": "prompt> "})
        self.seen = ""

    def wait(self) -> int:
        """Its exit status (waitstatus_to_exitcode)."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            if select.select([self.fd], [], [], 0.05)[0]:
                try:
                    os.read(self.fd, 65536)
                except OSError:
                    pass
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
        raise AssertionError("it doesn't end")

    def close(self) -> None:
        """Hang up."""
        os.close(self.fd)
        if self.pid:
            kill_now(self.pid)
            os.waitpid(self.pid, 0)


@pytest.fixture
def shell(lab: Lab) -> Iterator[Terminal]:
    opened = Terminal(lab, "run", "--env", "tty", "--", "bash", "--norc", "--noprofile", "-i")
    try:
        yield opened
    finally:
        opened.close()
        lab.sdee("kill", "tty")


def test_an_interactive_shell(shell: Terminal) -> None:
    shell.expect("prompt> ")
    assert "job control" not in shell.seen
    shell.type("tty; id -u; echo $-\n")
    said = shell.expect("prompt> ")
    assert "/dev/pts/" in said and "\r\n0\r\n" in said
    flags = said.strip().splitlines()[-1]
    assert "m" in flags, f"no job control: {flags}"
    shell.type("exit 9\n")
    assert shell.wait() == 9


#: Says when it is there, and answers each line with another: what the terminal echoes isn't that.
ANSWERER = "sh -c 'echo rea''dy; exec sed -u s/^/got-/'"


def test_interrupt_stop_and_go(shell: Terminal) -> None:
    shell.expect("prompt> ")
    shell.type("sh -c 'echo rea''dy; exec sleep 1000'\n")
    shell.expect("ready\r\n")
    shell.type("\x03")
    shell.expect("prompt> ")
    shell.type("echo status $?\n")
    shell.expect("status 130")
    shell.expect("prompt> ")
    shell.type(ANSWERER + "\n")
    shell.expect("ready\r\n")
    shell.type("one\n")
    shell.expect("got-one")
    shell.type("\x1a")
    shell.expect("Stopped")
    shell.expect("prompt> ")
    shell.type("fg\n")
    shell.expect("rea''dy")
    shell.type("two\n")
    shell.expect("got-two")
    shell.type("\x04")
    shell.expect("prompt> ")
    shell.type("exit\n")
    assert shell.wait() == 0


def test_the_window_size(shell: Terminal) -> None:
    shell.expect("prompt> ")
    shell.type("trap 'echo size-$(stty size | tr \" \" x)' WINCH; echo trap-set\n")
    shell.expect("trap-set")
    shell.expect("prompt> ")
    fcntl.ioctl(shell.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 132, 0, 0))
    shell.type("\n")
    shell.expect("size-40x132")
    shell.type("exit\n")
    shell.wait()


def test_job_control_of_the_shell_outside(lab: Lab) -> None:
    """The user's own shell stops and continues sdee as one of its jobs."""
    words = " ".join(lab.words("run", "--env", "tty", "--", ANSWERER))
    pid, fd = pty.fork()
    if not pid:
        os.setgroups([])
        os.setresgid(lab.user.gid, lab.user.gid, lab.user.gid)
        os.setresuid(lab.user.uid, lab.user.uid, lab.user.uid)
        os.execve(
            "/bin/bash", ["bash", "--norc", "--noprofile", "-i"],
            {**lab.environ(), "PS1": "outside> "},
        )  # fmt: skip
    outside = Terminal.__new__(Terminal)
    outside.pid, outside.fd, outside.seen = pid, fd, ""
    try:
        outside.expect("outside> ")
        outside.type(words + "\n")
        outside.expect("ready\r\n")
        outside.type("one\n")
        outside.expect("got-one")
        outside.type("\x1a")
        outside.expect("Stopped")
        outside.expect("outside> ")
        outside.type("fg\n")
        outside.expect("rea''dy")
        outside.type("two\n")
        outside.expect("got-two")
        outside.type("\x03")
        outside.expect("outside> ")
        outside.type("echo status $?\n")
        outside.expect("status 130")
        outside.type("exit\n")
    finally:
        outside.close()
        lab.sdee("kill", "tty")


def test_a_terminal_that_hangs_up(lab: Lab) -> None:
    opened = Terminal(lab, "run", "--env", "hangup", "--", "sh", "-c", "echo here; sleep 1001")
    try:
        opened.expect("here")
        wait_for(lambda: processes_of(lab.user, "sleep 1001"), "it sleeps")
    finally:
        opened.close()
    wait_for(lambda: not processes_of(lab.user, "sleep 1001"), "it ended", SECONDS)
    lab.wait_gone("hangup")


def test_signals_are_passed_on(lab: Lab) -> None:
    script = (
        'for s in HUP INT QUIT TERM USR1 USR2 ALRM WINCH; do trap "echo got-$s" $s; done;'
        " echo ready; while :; do sleep 0.1; done"
    )
    process = lab.start("run", "--env", "signals", "--", "bash", "-c", script)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for name in ("HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "ALRM", "WINCH"):
            process.send_signal(signal.Signals["SIG" + name])
            assert process.stdout.readline() == f"got-{name}\n"
        lab.sdee("kill", "signals")
        assert process.wait(SECONDS) == 128 + 9
    finally:
        process.kill()
        process.communicate()


def test_stopped_and_continued_by_signal(lab: Lab) -> None:
    """A command that stops, stops sdee as well; continuing sdee continues the command."""
    with lab.member("stopped") as process:
        assert process.stdin is not None and process.stdout is not None
        one = next(i for i in lab.instances() if i["env"] == "stopped")
        cat = next(p["pid"] for p in one["processes"] if p["command"] == "cat")
        os.kill(cat, signal.SIGSTOP)
        wait_for(lambda: _state(process.pid) == "T", "sdee stops with its command", SECONDS)
        process.send_signal(signal.SIGCONT)
        wait_for(lambda: _state(cat) != "T", "the command goes on", SECONDS)
        process.stdin.write("two\n")
        process.stdin.flush()
        assert process.stdout.readline() == "two\n"


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0]


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (321, 321))


def test_the_session_stays_the_callers(lab: Lab) -> None:
    """Limits and process group are those of whoever called."""
    done = lab.sdee(
        "run", "--env", "limits", "--", "sh", "-c", "ulimit -n; ulimit -c",
        preexec_fn=_limit,
    )  # fmt: skip
    assert done.stdout.split() == ["321", "0"]
