"""What a user would run a program in: bare metal, sdee with each engine, and its peers.

`sdee` needs a user; where perf runs as root, sdee's lines run as the user that `--user` names, and
a daemon is started for the run where none is there.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from perf.runner import Missing

SOCKET = Path("/run/sdee/sdeed.sock")


@dataclass(frozen=True)
class Sandbox:
    """`prefix` goes before the command that is to run inside."""

    name: str
    prefix: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()

    def command(self, *words: str) -> list[str]:
        """The whole command line. Raises Missing where the sandbox's program isn't installed."""
        if self.prefix and not shutil.which(self.prefix[0]):
            raise Missing(f"{self.prefix[0]} isn't installed")
        return [*self.prefix, *words]


def as_user(user: str | None) -> tuple[str, ...]:
    """The words that make root run what follows as `user`; none for anybody else."""
    if os.getuid() or user is None:
        return ()
    account = pwd.getpwnam(user)
    return (
        "setpriv",
        f"--reuid={account.pw_uid}",
        f"--regid={account.pw_gid}",
        "--init-groups",
        "env",
        f"HOME={account.pw_dir}",
        f"USER={account.pw_name}",
    )


def sdee(*arguments: str) -> tuple[str, ...]:
    """`sdee` of the running interpreter's installation."""
    beside = Path(sys.executable).with_name("sdee")
    return (str(beside) if beside.exists() else "sdee", *arguments)


def _bwrap() -> tuple[str, ...]:
    return (
        "bwrap", "--unshare-user", "--unshare-pid", "--unshare-ipc", "--bind", "/", "/",
        "--dev-bind", "/dev", "/dev", "--proc", "/proc", "--tmpfs", "/run", "--die-with-parent",
    )  # fmt: skip


def _podman(root: Path) -> tuple[str, ...]:
    """podman over a root tree; the options are those that a machine with hybrid cgroups needs."""
    return (
        "unshare", "--mount", "sh", "-c",
        'umount /sys/fs/cgroup/unified 2>/dev/null; exec podman --cgroup-manager=cgroupfs run --rm'
        ' --network=host --cgroups=disabled --ulimit nofile=1024:1024 --ulimit nproc=1000:1000'
        ' --rootfs "$0:O" "$@"', str(root),
    )  # fmt: skip


def sandboxes(user: str | None) -> list[Sandbox]:
    """All of them, bare metal first."""
    who = as_user(user)
    return [
        Sandbox("bare metal", who),
        Sandbox(
            "sdee, kernel engine", (*who, *sdee("run", "--env", "perf", "--engine", "kernel", "--"))
        ),
        Sandbox("sdee, sdeefs", (*who, *sdee("run", "--env", "perff", "--engine", "fuse", "--"))),
        Sandbox("bubblewrap", (*who, *_bwrap())),
        Sandbox("podman", _podman(Path("/"))),
        Sandbox("docker", ("docker", "run", "--rm", "--network=host", "debian:12")),
    ]


@contextmanager
def daemon(user: str | None) -> Iterator[None]:
    """sdeed for the time of the run, where root measures and none runs yet."""
    if os.getuid() or user is None or SOCKET.exists():
        yield
        return
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*sdee("daemon")], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            deadline = time.monotonic() + 60
            while not SOCKET.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise Missing(f"sdeed doesn't start: {log.read().decode()[-500:]}")
                time.sleep(0.02)
            yield
        finally:
            process.terminate()
            process.wait(timeout=30)


def seconds_of(command: Sequence[str], timeout: float = 120) -> float:
    """How long a command takes. Raises CalledProcessError with what it said."""
    start = time.perf_counter()
    subprocess.run(
        command, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout
    )
    return time.perf_counter() - start
