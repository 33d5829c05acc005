"""`sdee srun`, `sdee sbatch`, `sdee salloc`: a job in an environment, from outside of any.

`sdee srun [--env NAME] SRUN'S OPTIONS…` is `srun --sdee=NAME …`, with the user's default
environment where none is named. Where the site has no plugin, or with `--rootless` first, the
same is done without any privilege (rootless.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from sdee_launch import config
from sdee_launch.slurm import submit


def take_environment(words: Sequence[str]) -> tuple[str, list[str]]:
    """(the name after --env, the other words); the name is empty without it. Raises ValueError."""
    if words and words[0].startswith("--env="):
        return words[0].removeprefix("--env="), list(words[1:])
    if words and words[0] == "--env":
        if len(words) < 2:
            raise ValueError("--env wants a name")
        return words[1], list(words[2:])
    return "", list(words)


def _default() -> str:
    inside = submit.environment_inside()
    if inside:
        return inside
    try:
        settings = config.load()
    except config.ConfigError as error:
        raise ValueError(str(error)) from None
    return str(settings.section("jobs").get("environment") or settings.environment)


def run(command: str, words: Sequence[str]) -> int:
    """Become the Slurm command. Raises OSError, ValueError, DeployProblem, EnvironmentProblem."""
    from sdee_launch.slurm import rootless

    alone = list(words[:1]) == ["--rootless"]
    name, rest = take_environment(words[1:] if alone else words)
    path = shutil.which(command)
    if path is None:
        raise FileNotFoundError(f"there is no {command} on this machine")
    shown = subprocess.run(
        [path, "--help"], capture_output=True, text=True, timeout=120, check=False
    )
    if shown.returncode:
        raise OSError(f"{command} --help: {shown.stderr.strip()}")
    plugin = "--sdee=" in shown.stdout
    alone = alone or rootless.VARIABLE in os.environ
    if plugin and not alone:
        os.execv(path, [command, f"--sdee={name or _default()}", *rest])
    return rootless.submit(command, rest, name or _default(), ["--sdee=no"] if plugin else [])
