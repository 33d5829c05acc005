"""`sdee` as a user runs it, in each mode and with each engine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import User
from tests.env.daemon_lab import Daemon, running_daemon, wait_for

SECONDS = 120
#: Mode and engine; rootless over the host's / there is only sdeefs.
KINDS = ("site-kernel", "site-fuse", "rootless-fuse")


@dataclass
class Lab:
    """One way of making instances. `word` names environments of this lab alone."""

    mode: str
    engine: str
    user: User
    directory: Path
    daemon: Daemon | None = None
    more: dict[str, str] = field(default_factory=dict)

    def environ(self) -> dict[str, str]:
        """The variables of the user's session."""
        found = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.user.home),
            "USER": self.user.name,
            "LOGNAME": self.user.name,
            "SHELL": "/bin/bash",
            "LANG": "C.UTF-8",
            "TERM": "dumb",
            "SDEE_CONFIG": str(self.directory / "sdee.toml"),
            "SDEE_MODE": self.mode,
            "PYTHONDONTWRITEBYTECODE": "1",
            **self.more,
        }
        if "PYTHONPATH" in os.environ:
            found["PYTHONPATH"] = os.environ["PYTHONPATH"]
        if self.daemon is not None:
            found["SDEED_SOCKET"] = self.daemon.socket
        return found

    def words(self, *arguments: str) -> list[str]:
        """A command line of sdee."""
        return [sys.executable, "-m", "sdee_launch", *arguments]

    def start(self, *arguments: str, **more: Any) -> subprocess.Popen[str]:
        """Start sdee as the user."""
        settings: dict[str, Any] = {
            "user": self.user.uid, "group": self.user.gid, "extra_groups": [],
            "env": self.environ(), "cwd": "/", "text": True, "errors": "replace",
            "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
        }  # fmt: skip
        return subprocess.Popen(self.words(*arguments), **{**settings, **more})

    def sdee(
        self, *arguments: str, input: str | None = None, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run sdee as the user, to its end."""
        if input is not None:
            more["stdin"] = subprocess.PIPE
        process = self.start(*arguments, **more)
        try:
            out, err = process.communicate(input, timeout=SECONDS)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def run(self, *command: str, env: str = "lab", **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        return self.sdee("run", "--env", env, "--", *command, **more)

    def say(self, script: str, env: str = "lab", **more: Any) -> str:
        """What a shell script prints inside. Fails unless it ends with 0."""
        done = self.run("sh", "-c", script, env=env, **more)
        assert done.returncode == 0, f"{script}\n{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def store(self) -> Path:
        """Where the environments are."""
        return self.user.home / f".{self.directory.name}"

    def upper(self, env: str = "lab") -> Path:
        """An environment's upper, as the host has it."""
        return self.store() / env / "upper"

    def instances(self) -> list[dict[str, Any]]:
        """What lives, as `sdee ps` tells it."""
        done = self.sdee("ps", "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert isinstance(found, list)
        return found

    def init(self, env: str = "lab") -> int:
        """The host's number of the init of a live instance; 0 if it isn't alive."""
        return next((int(one["init"]) for one in self.instances() if one["env"] == env), 0)

    @contextlib.contextmanager
    def member(self, env: str = "lab") -> Iterator[subprocess.Popen[str]]:
        """A session that stays in an instance (`cat`) until its input ends."""
        process = self.start(
            "run", "--env", env, "--", "sh", "-c", "echo here; exec cat", stdin=subprocess.PIPE
        )
        assert process.stdout is not None and process.stdin is not None
        try:
            line = process.stdout.readline()
            if line != "here\n":
                assert process.stderr is not None
                raise AssertionError(f"{line!r} {process.stderr.read()}")
            yield process
        finally:
            with contextlib.suppress(OSError):
                process.stdin.close()
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
            assert process.stderr is not None
            process.stderr.close()

    def wait_gone(self, env: str = "lab") -> None:
        """Until nothing of an instance is left."""
        wait_for(lambda: not processes_of(self.user, f"sdee-init {env}"), f"{env} is gone", SECONDS)
        wait_for(lambda: not self.init(env), f"{env} isn't alive", SECONDS)

    def remove(self, env: str) -> None:
        """Away with an environment, whatever became of it."""
        self.sdee("kill", env)
        self.sdee("env", "rm", env)
        shutil.rmtree(self.store() / env, ignore_errors=True)


def processes_of(user: User, command: str) -> list[int]:
    """The host's numbers of the user's processes whose command line starts with this."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            line = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ")
            status = Path(f"/proc/{entry}/status").read_text()
        except OSError:
            continue
        uids = next(x for x in status.splitlines() if x.startswith("Uid:")).split()[1:]
        if line.startswith(command.encode()) and str(user.uid) in uids:
            found.append(int(entry))
    return found


def kill_now(pid: int) -> None:
    """SIGKILL, if it is there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def laboratory(kind: str, user: User, settings: str = "") -> Iterator[Lab]:
    """A lab for the length of a block; what it made is gone after."""
    mode, _, engine = kind.partition("-")
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="sdee-lab-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        config = directory / "sdee.toml"
        # A store of its own: nothing that runs beside this is disturbed, or disturbs.
        store = "" if "store = " in settings else f'store = "{{home}}/.{directory.name}"\n'
        config.write_text(f'[environments]\nengine = "{engine}"\n{store}{settings}')
        config.chmod(0o644)
        before = os.environ.get("SDEE_CONFIG")
        os.environ["SDEE_CONFIG"] = str(config)  # for the daemon
        try:
            with contextlib.ExitStack() as stack:
                daemon = None
                if mode == "site":
                    daemon = stack.enter_context(running_daemon(directory))
                lab = Lab(mode, engine, user, directory, daemon)
                try:
                    yield lab
                finally:
                    for one in lab.instances():
                        lab.sdee("kill", str(one["env"]))
                    shutil.rmtree(lab.store(), ignore_errors=True)
        finally:
            if before is None:
                del os.environ["SDEE_CONFIG"]
            else:
                os.environ["SDEE_CONFIG"] = before
