"""`sdee health`: whether environments can start on this node; for Slurm's HealthCheckProgram.

A node on which none can start fails each job within seconds, is idle again, and gets the next one.
So it is drained, and used again when it is well; a node that somebody else has drained is left alone.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sdee_launch import config, protocol
from sdee_launch.deploy import places
from sdee_launch.slurm import conf, hook
from sdee_launch.slurm.node import JOBS

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

#: Before what is found; a reason of a node that begins so is ours.
MARK = "sdee health: "
#: The script that `sdee install --slurm` writes: HealthCheckProgram takes no arguments.
SCRIPT = "sdee-health"
#: Seconds that the daemon and Slurm have for their answers; after 60 s Slurm kills the check.
REPLY_SECONDS, SLURM_SECONDS = 15.0, 10.0
#: With less than so many bytes free no job can begin.
LEAST = 1 << 20


class SlurmProblem(Exception):
    """Why Slurm can't be asked or told, in one line."""


def add_parser(subparsers: Subparsers) -> None:
    """Add `health`."""
    text = "whether environments can start on this node, in one line and the exit status"
    health = subparsers.add_parser(
        "health", help=text, description=f"Say {text}: 0 if they can, 1 if not."
    )
    health.add_argument(
        "--drain", action="store_true",
        help="for root: have Slurm drain this node if they can't, and use it again when they can",
    )  # fmt: skip
    health.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Look, say so, and tell Slurm if that is asked for."""
    why, done = problem(), ""
    if options.drain:
        try:
            done = drain(node_name(), why) if why else use_again(node_name())
        except SlurmProblem as error:
            done = str(error)
    print(f"{MARK}{why or 'well'}{done and f' ({done})'}", flush=True)
    return 1 if why else 0


def problem() -> str:
    """The first thing that every job in an environment would fail by here; empty if there is none."""
    try:
        settings = config.site_settings()
        hook.request("status", hook.PATIENCE, REPLY_SECONDS)
    except (config.ConfigError, protocol.Refused) as error:
        return str(error)
    except protocol.Unavailable as error:
        return f"no sdeed: {error}"
    for place in (places.cache_directory(settings), JOBS):
        why = _unusable(place)
        if why:
            return f"{place}: {why}"
    return ""


def _unusable(place: str) -> str:
    """Why nothing can be written below a directory, which may be still to make."""
    place = os.path.abspath(place)
    try:
        while not os.path.lexists(place):
            place = os.path.dirname(place)
        status = os.statvfs(place)
    except OSError as error:
        return str(error.strerror)
    if status.f_flag & os.ST_RDONLY:
        return "the file system is read-only"
    return "the disk is full" if status.f_bavail * status.f_frsize < LEAST else ""


def node_name() -> str:
    """As Slurm has it: slurmd tells its scripts."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename.split(".")[0]


def drain(node: str, why: str) -> str:
    """Have no more jobs start on a node; what was done. Raises SlurmProblem."""
    state, _ = _look(node)
    if "DRAIN" in state or "DOWN" in state:
        return f"{node} is {state}"
    _scontrol(
        "update", f"NodeName={node}", "State=DRAIN", f"Reason={MARK}{' '.join(why.split())[:200]}"
    )
    return f"{node} drains"


def use_again(node: str) -> str:
    """Undo `drain`, and nobody else's; what was done. Raises SlurmProblem."""
    state, reason = _look(node)
    if "DRAIN" not in state or not reason.startswith(MARK):
        return ""
    # Not RESUME: who is down, too, has another reason for that.
    _scontrol("update", f"NodeName={node}", "State=UNDRAIN")
    return f"{node} is used again"


def _look(node: str) -> tuple[str, str]:
    """State, as `IDLE+DRAIN`, and reason of a node. Raises SlurmProblem."""
    return parse_node(_scontrol("show", "node", "-o", node))


def parse_node(text: str) -> tuple[str, str]:
    """From a line of `scontrol show node -o`. Raises SlurmProblem."""
    state = re.search(r"(?:^|\s)State=(\S+)", text)
    if state is None:
        raise SlurmProblem("scontrol's answer isn't understood")
    reason = re.search(r"\sReason=(.*?) \[[^][]*@[^][]*\]", text)
    return state[1], reason[1] if reason else ""


def _scontrol(*words: str) -> str:
    try:
        done = subprocess.run(
            [conf.which("scontrol") or "scontrol", *words],
            capture_output=True, text=True, errors="replace", timeout=SLURM_SECONDS, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise SlurmProblem(f"scontrol: {error}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise SlurmProblem(f"scontrol: {said[-1] if said else f'exit {done.returncode}'}")
    return done.stdout


def slurm_conf_lines(directory: Path) -> list[str]:
    """What slurm.conf says where nodes are to be drained."""
    return [f"HealthCheckProgram={directory / SCRIPT}", "HealthCheckInterval=300"]


def program(parameters: Mapping[str, str]) -> str:
    """What slurm.conf has run from time to time; empty: nothing."""
    interval = parameters.get("healthcheckinterval", "0")
    return parameters.get("healthcheckprogram", "") if interval.strip("0") else ""


def is_ours(path: str) -> bool:
    """Whether a HealthCheckProgram is our script, or a script that calls it."""
    if os.path.basename(path) == SCRIPT:
        return True
    try:
        return conf.mentions(path, SCRIPT)
    except OSError:
        return False


def drain_at_once(node: str, why: str) -> str:
    """From Prolog: drain the node if a health check will end that; what was done.

    Raises SlurmProblem.
    """
    try:
        ours = is_ours(program(conf.read()))
    except OSError:
        ours = False
    return drain(node, why) if ours else ""
