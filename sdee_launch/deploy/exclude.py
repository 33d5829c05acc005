"""What of an upper doesn't travel: caches, temporary files, sockets, and what is configured.

A pattern is a path relative to upper with fnmatch's wildcards, matched against the whole path and
each of its parents; a pattern without a slash matches any component.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable
from dataclasses import replace

from sdee_launch.deploy.errors import DeployProblem
from sdee_launch.environments import Environment, write_settings

DEFAULTS = (
    "tmp/*",
    "run/*",
    "var/tmp/*",
    "var/run/*",
    "var/lock/*",
    "var/cache/*/*",
    "var/log/*.gz",
    "root/.cache/*",
    "__pycache__/*.tmp",
    ".nfs*",
)


def change(environment: Environment, add: Iterable[str], remove: Iterable[str]) -> list[str]:
    """Put patterns on an environment's own list, and take some off; the list as it is then.

    Raises DeployProblem, OSError.
    """
    before, gone = environment.settings.exclude, list(remove)
    for pattern in gone:
        if pattern not in before:
            raise DeployProblem(f"{pattern!r} isn't excluded by this environment")
    after = tuple(dict.fromkeys([*(p for p in before if p not in gone), *add]))
    if after != before:
        write_settings(environment, replace(environment.settings, exclude=after))
    return list(after)


class Excluded:
    """Whether a path stays behind."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(dict.fromkeys(p.strip("/") for p in patterns if p.strip("/")))
        parts = [p for p in self.patterns if "/" not in p]
        depths: dict[int, list[str]] = {}
        for pattern in self.patterns:
            depths.setdefault(pattern.count("/"), []).append(pattern)
        depths.pop(0, None)
        self._whole = {depth: self._compile(patterns) for depth, patterns in depths.items()}
        self._part = self._compile(parts) if parts else None

    @staticmethod
    def _compile(patterns: list[str]) -> re.Pattern[str]:
        return re.compile("|".join(fnmatch.translate(p.replace("**", "*")) for p in patterns))

    def __call__(self, path: bytes) -> bool:
        """Called for a directory before what is in it: what stays behind takes that with it."""
        text = os.fsdecode(path)
        name = text.rpartition("/")[2]
        if self._part is not None and self._part.match(name):
            return True
        whole = self._whole.get(text.count("/"))
        return whole is not None and whole.match(text) is not None
