"""What a user would run a program in: bare metal, sdee with each engine, and its peers.

`sdee` needs a user; where perf runs as root, the lines run as the user that `--user` names.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from perf.figures import Missing
from perf.places import Place

#: The environments of the user that the lines of sdee run in.
ENVIRONMENTS = {"kernel": "sdee-perf-kernel", "fuse": "sdee-perf-fuse"}


@dataclass(frozen=True)
class Sandbox:
    """`prefix` goes before the command that is to run inside. `absent`: why it can't be used."""

    name: str
    prefix: tuple[str, ...]
    absent: str = ""

    def command(self, *words: str) -> list[str]:
        """The whole command line. Raises Missing where the sandbox can't be used."""
        if self.absent:
            raise Missing(self.absent)
        if self.prefix and not shutil.which(self.prefix[0]):
            raise Missing(f"{self.prefix[0]} isn't installed")
        return [*self.prefix, *words]


def as_user(user: str | None, socket: Path | None = None) -> tuple[str, ...]:
    """The words that make root run what follows as `user`; none for anybody else.

    Raises Missing where there is no such user.
    """
    if os.getuid() or user is None:
        return ()
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        raise Missing(f"--user {user}: there is no such user") from None
    return (
        "setpriv",
        f"--reuid={account.pw_uid}",
        f"--regid={account.pw_gid}",
        "--init-groups",
        "env",
        f"HOME={account.pw_dir}",
        f"USER={account.pw_name}",
        *([f"SDEED_SOCKET={socket}"] if socket else []),
    )


def installed(program: str) -> str:
    """A program of ours, of the running interpreter's installation if it has one."""
    beside = Path(sys.executable).with_name(program)
    return str(beside) if beside.exists() else program


def _sdee(engine: str) -> tuple[str, ...]:
    return (installed("sdee"), "run", "--env", ENVIRONMENTS[engine], "--engine", engine, "--")


def forget_environments(who: Sequence[str]) -> None:
    """Remove the environments that the lines of sdee left behind."""
    words = [*who, installed("sdee"), "env", "rm", *ENVIRONMENTS.values()]
    subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=60)


def _bwrap() -> tuple[str, ...]:
    return (
        "bwrap", "--unshare-user", "--unshare-pid", "--unshare-ipc", "--bind", "/", "/",
        "--dev-bind", "/dev", "/dev", "--proc", "/proc", "--tmpfs", "/run", "--die-with-parent",
    )  # fmt: skip


def _podman(who: Sequence[str], place: Place) -> tuple[str, ...]:
    """Rootless podman over an overlay of `place.image`, with the host's /usr.

    Without the unified hierarchy, and with limits that it may set, it runs on a machine with hybrid
    cgroups too; what podman keeps goes into `place`.
    """
    kept = place.podman
    podman = (
        *who, "podman", f"--root={kept / 's'}", f"--runroot={kept / 'r'}",
        f"--tmpdir={kept / 't'}", "--cgroup-manager=cgroupfs", "--log-level=fatal",
        "run", "--rm", "--interactive", "--network=host", "--cgroups=disabled",
        "--ulimit=nofile=1024:1024", "--ulimit=nproc=1000:1000", "--volume=/usr:/usr:ro",
        f"--volume={place.programs}:{place.programs}:ro", "--rootfs", f"{place.image}:O",
    )  # fmt: skip
    if os.getuid():
        return podman
    script = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'
    return ("unshare", "--mount", "--propagation=private", "sh", "-c", script, "sh", *podman)


def _without(program: str, why: str = "") -> str:
    """Why a sandbox can't be used: its program isn't there, or else `why`."""
    return why if shutil.which(program) else f"{program} isn't installed"


def _no_docker() -> str:
    """Why docker can't be used; empty where its daemon answers."""
    if not shutil.which("docker"):
        return "docker isn't installed"
    words = ["docker", "version", "--format", "{{.Server.Version}}"]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
    return "no docker daemon runs on this machine" if done.returncode else ""


def sandboxes(user: str | None, place: Place, socket: Path | None = None) -> list[Sandbox]:
    """All of them, bare metal first. `socket`: that of the daemon that sdee is to use."""
    who = as_user(user, socket)
    docker = ("docker", "run", "--rm", "--interactive", "--network=host")
    programs = f"--volume={place.programs}:{place.programs}:ro"
    return [
        Sandbox("bare metal", who),
        Sandbox("sdee, kernel engine", (*who, *_sdee("kernel"))),
        Sandbox("sdee, sdeefs", (*who, *_sdee("fuse"))),
        Sandbox("bubblewrap", (*who, *_bwrap()), _without("bwrap")),
        Sandbox("podman", _podman(who, place), _without("podman")),
        Sandbox("docker", (*docker, programs, "debian:12"), _no_docker()),
    ]


def with_control(found: Sequence[Sandbox]) -> list[Sandbox]:
    """The same with the first one a second time: what it differs from itself nothing can tell apart."""
    first, *others = found
    return [first, replace(first, name=f"{first.name}, again"), *others]
