"""What this node's Slurm says of itself: slurm.conf read as far as we need it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

#: Where Debian, RHEL and hand-made installations keep it.
DIRECTORIES = ("/etc/slurm", "/etc/slurm-llnl", "/usr/local/etc/slurm", "/run/slurm/conf")

#: The client commands that a user types.
COMMANDS = (
    "srun", "sbatch", "salloc", "squeue", "scancel", "sinfo", "sacct", "scontrol", "sattach",
    "sbcast", "sstat", "sprio",
)  # fmt: skip

#: Where programs are that a PATH may lack.
MORE_PATH = "/usr/sbin:/usr/local/sbin:/opt/slurm/sbin:/opt/slurm/bin"
_BIN_DIRECTORIES = ("/usr/bin", "/usr/local/bin", "/opt/slurm/bin")


def which(program: str) -> str | None:
    """Where a program of Slurm's is, also if PATH doesn't say."""
    import shutil

    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:{MORE_PATH}")


def mentions(script: str, word: str) -> bool:
    """Whether a line of a script that is no comment has this word. Raises OSError."""
    lines = Path(script).read_text(errors="replace").splitlines()
    return any(word in line and not line.lstrip().startswith("#") for line in lines)


def directory() -> Path | None:
    """The directory of slurm.conf, or None where there is no Slurm."""
    named = os.environ.get("SLURM_CONF")
    if named:
        return Path(named).parent
    for place in DIRECTORIES:
        if os.path.exists(os.path.join(place, "slurm.conf")):
            return Path(place)
    return None


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for line in text.replace("\\\n", " ").splitlines():
        line = line.split("#", 1)[0].strip()
        name, equals, value = line.partition("=")
        if equals:
            yield name.strip().lower(), value.strip()


def parse(text: str) -> dict[str, str]:
    """The parameters of a slurm.conf by lower-case name; of one given twice, the last."""
    return dict(_pairs(text))


def values(text: str, wanted: str) -> list[str]:
    """All values of a parameter (its name in lower case): newer releases take several Prologs."""
    return [value for name, value in _pairs(text) if name == wanted]


def text_of(path: Path, root: Path = Path("/"), depth: int = 8) -> str:
    """A slurm.conf, with the files that it includes in their places. Raises OSError.

    One that can't be read is none: Slurm itself will say so. Names are seen below `root`.
    """
    found = []
    for line in path.read_text(errors="replace").splitlines():
        word, _, name = line.strip().partition(" ")
        if word.lower() != "include" or not depth:
            found.append(line)
            continue
        name = name.split("#", 1)[0].strip()
        below = root / name.lstrip("/") if name.startswith("/") else path.parent / name
        with contextlib.suppress(OSError):
            found.append(text_of(below, root, depth - 1))
    return "\n".join(found)


def read() -> dict[str, str]:
    """The parameters of this node; empty where there is no Slurm. Raises OSError."""
    place = directory()
    return parse(text_of(place / "slurm.conf")) if place else {}


def spool_directory(parameters: dict[str, str]) -> str:
    """SlurmdSpoolDir of this node: there lie batch scripts, and PMIx meets its clients."""
    host = socket.gethostname().split(".")[0]
    pattern = parameters.get("slurmdspooldir", "/var/spool/slurmd")
    return pattern.replace("%n", host).replace("%h", host)


def commands() -> dict[str, str]:
    """Name -> path of the client commands on this node."""
    found = {}
    for name in COMMANDS:
        for place in _BIN_DIRECTORIES:
            path = os.path.join(place, name)
            if os.access(path, os.X_OK):
                found[name] = path
                break
    return found
