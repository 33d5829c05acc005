"""Command lines of srun, sbatch and salloc: where the options end and the user's command begins.

Which options take an argument is what this Slurm's own --help says, so that it holds for any
release and for the options of other plugins.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

_OPTION = re.compile(r"^\s+(?:-(?P<short>\w), )?--(?P<long>[\w-]+)(?P<value>\[?=)?")


@dataclass(frozen=True, slots=True)
class Options:
    """Options that take an argument in a word of its own."""

    long: frozenset[str]
    short: frozenset[str]
    #: Those that take none, by their whole names: --wait is no short --wait-all-nodes.
    flags: frozenset[str] = frozenset()


def parse_help(text: str) -> Options:
    """From the output of --help; `--name[=value]` takes none in a word of its own."""
    long, short, flags = set(), set(), set()
    for line in text.splitlines():
        match = _OPTION.match(line)
        # Of --wrap sbatch's help says that it needs none; it does.
        if match and (match["value"] == "=" or match["long"] == "wrap"):
            long.add(match["long"])
            if match["short"]:
                short.add(match["short"])
        elif match:
            flags.add(match["long"])
    return Options(frozenset(long), frozenset(short), frozenset(flags))


def options_of(command: str) -> Options:
    """Those of an installed Slurm command. Raises OSError."""
    done = subprocess.run(
        [command, "--help"], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        raise OSError(f"{command} --help: {done.stderr.strip()}")
    return parse_help(done.stdout)


def split(words: Sequence[str], options: Options) -> tuple[list[str], list[str]]:
    """(Slurm's options, the user's command with its arguments)."""
    at = 0
    while at < len(words):
        word = words[at]
        if word == "--":
            return list(words[:at]), list(words[at + 1 :])
        if word.startswith("--"):
            name, equals, _ = word[2:].partition("=")
            at += 1 if equals or not _takes(name, options) else 2
        elif word.startswith("-") and len(word) > 1:
            at += 2 if _last_takes(word[1:], options.short) else 1
        else:
            return list(words[:at]), list(words[at:])
    return list(words), []


def _takes(name: str, options: Options) -> bool:
    """getopt_long(3) takes any unambiguous beginning of a name."""
    return name not in options.flags and any(known.startswith(name) for known in options.long)


def _last_takes(letters: str, short: frozenset[str]) -> bool:
    """Of letters written together, the first that takes an argument has the rest as its own."""
    for place, letter in enumerate(letters):
        if letter in short:
            return place == len(letters) - 1
    return False
