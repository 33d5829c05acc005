"""`sdee srun`, `sdee sbatch`, `sdee salloc` where the site has no plugin: no root, no daemon.

The snapshot is taken here, into a directory that the nodes see; what Slurm starts on them is
rootless_task.py, which makes the instance there as the user and runs the command in it.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sdee_launch import config, environments
from sdee_launch.accounts import my_account
from sdee_launch.deploy import api, places
from sdee_launch.plan import PlanProblem, parse_bind
from sdee_launch.slurm import words

#: What a task is told, and what an inner `sdee srun` finds in its environment: shell words.
VARIABLE = "SDEE_ROOTLESS_JOB"
#: Scripts of jobs, below the home.
SCRIPTS = ".local/state/sdee/scripts"


def reference(environment: str) -> list[str]:
    """The words that name a generation to a task: name, identity, number, directory, binds.

    Inside a job they are the job's. Raises DeployProblem, EnvironmentProblem, OSError, ValueError.
    """
    known = os.environ.get(VARIABLE)
    if known:
        return shlex.split(known)
    account = my_account()
    try:
        settings = config.load()
    except config.ConfigError as error:
        raise ValueError(str(error)) from None
    with environments.open_store(account, settings) as store, store.open(environment) as opened:
        upper, own = f"{opened.path}/upper", opened.settings
    try:
        for bind in own.binds:
            parse_bind(bind)
    except PlanProblem as error:
        raise ValueError(str(error)) from None
    state = places.state_directory(account, settings, environment, "shared")
    exclude = [*settings.section("deploy").get("exclude", ()), *own.exclude]
    done = api.submit(account, upper, state, exclude)
    return [environment, done.identity, str(done.generation.number), state, *own.binds]


def task(named: Sequence[str]) -> list[str]:
    """The words before a command that run it in the environment, on a node."""
    return [sys.executable, "-I", "-m", "sdee_launch.slurm.rootless_task", *named, "--"]


def submit(command: str, arguments: Sequence[str], environment: str, more: Sequence[str]) -> int:
    """Become the Slurm command. `more`: options before the user's. Raises OSError, ValueError."""
    path = _which(command)
    named = reference(environment)
    options, rest = words.split(arguments, words.options_of(path))
    variables = dict(os.environ)
    if command == "salloc":
        variables[VARIABLE] = shlex.join(named)
        line = [*options, *rest]
    elif command == "srun":
        if not rest:
            raise ValueError("srun: which command?")
        line = [*options, *task(named), *rest]
    else:
        line = _batch(options, rest, named, variables)
    os.execve(path, [command, *more, *line], variables)


def _which(command: str) -> str:
    import shutil

    path = shutil.which(command)
    if path is None:
        raise FileNotFoundError(f"there is no {command} on this machine")
    return path


def _batch(
    options: list[str], rest: list[str], named: Sequence[str], variables: dict[str, str]
) -> list[str]:
    """sbatch's words with a script of ours in place of the user's, which it runs inside."""
    for at, word in enumerate(options):
        if word == "--wrap" or word.startswith("--wrap="):
            text = options[at + 1] if word == "--wrap" else word.removeprefix("--wrap=")
            del options[at : at + (2 if word == "--wrap" else 1)]
            return [*options, f"--wrap={shlex.join([*task(named), '/bin/sh', '-c', text])}"]
    if rest:
        text, name = Path(rest[0]).read_text(), os.path.basename(rest[0])
    else:
        text, name = sys.stdin.read(), "sbatch"
    if not text.startswith("#!"):
        raise ValueError(f"{name}: a batch script begins with #!")
    place = Path(os.environ.get("HOME", "/")) / SCRIPTS
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    inner, outer = place / digest, place / f"{digest}.sbatch"
    for path, content in ((inner, text), (outer, wrapper(text, [*task(named), str(inner)]))):
        path.write_text(content)
        path.chmod(0o700)
    variables.setdefault("SBATCH_JOB_NAME", name)
    return [*options, str(outer), *rest[1:]]


def wrapper(script: str, command: Sequence[str]) -> str:
    """A script with the #SBATCH lines of `script` that becomes `command`."""
    header = []
    for line in script.splitlines()[1:]:
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            header.append(line)
    return "\n".join(["#!/bin/sh", *header, f'exec {shlex.join(command)} "$@"', ""])
