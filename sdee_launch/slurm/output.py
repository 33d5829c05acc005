"""Where a batch job's output goes, as sbatch reads it: the command line, its variables, the script.

Slurm opens these files outside of the environment, and says nothing when it can't.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence

from sdee_launch.slurm import words


def paths(
    options: Sequence[str], script: str, variables: Mapping[str, str], directory: str
) -> list[str]:
    """The absolute paths of output and errors; names may have Slurm's `%j`, directories may not.

    `options`: sbatch's, without the script and its arguments; `script`: its text.
    """
    given = [_of_script(script), options]
    place = os.path.join(directory, _last(given, "chdir", "-D", "") or "")
    found = []
    for name, short, default in (("output", "-o", "slurm-%j.out"), ("error", "-e", "")):
        variable = variables.get(f"SBATCH_{name.upper()}", "")
        path = _last(given, name, short, variable) or default
        if path and "%" not in os.path.dirname(path):
            found.append(os.path.normpath(os.path.join(place, path)))
    return found


def of_command(
    line: Sequence[str], program: str, variables: Mapping[str, str], directory: str
) -> list[str]:
    """The same of a whole command line of sbatch. Raises OSError."""
    options, rest = words.split(line[1:], words.options_of(program))
    text = ""
    if rest:
        with open(os.path.join(directory, rest[0]), encoding="utf-8", errors="replace") as file:
            text = file.read(1 << 16)
    return paths(options, text, variables, directory)


def _of_script(text: str) -> list[str]:
    """The words of its #SBATCH lines."""
    found = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            try:
                found += shlex.split(line.removeprefix("#SBATCH"), comments=True)
            except ValueError:  # sbatch will say so
                continue
    return found


def _last(given: Sequence[Sequence[str]], name: str, short: str, variable: str) -> str:
    """An option's value: the script's, before it the variable's, before that the command line's."""
    script, command = (_value(options, name, short) for options in given)
    return command or variable or script


def _value(options: Sequence[str], name: str, short: str) -> str:
    value = ""
    for at, word in enumerate(options):
        if word in (f"--{name}", short):
            value = options[at + 1] if at + 1 < len(options) else ""
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
        elif word.startswith(short) and not word.startswith("--"):
            value = word.removeprefix(short)
    return value
