"""What a login needs of the rest: the site's words on logins, and the way in."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from sdee_launch.login_agent import relay
from sdee_launch.session import NotEntered, Target
from sdee_launch.session import run as run_session

__all__ = ["Login", "NotEntered", "run", "settings"]

_SHELLS = ("/bin/bash", "/bin/sh")


class Login(NamedTuple):
    """`[login]` of the site, with what the user may choose on top."""

    on_failure: str  # shell, deny
    shell: str
    environment: str
    engine: str


def settings() -> Login:
    """Read it. A file with a mistake in it locks nobody out: what can be read of it counts."""
    from sdee_launch import config

    values: dict[str, str] = {}
    try:
        values.update(config.site_settings().section("login"))
    except config.ConfigError as error:
        print(f"sdee: {error}", file=sys.stderr)
    own: dict[str, str] = {}
    try:
        own.update(config.load().section("login"))
    except config.ConfigError:
        pass  # entering says so
    shell = values.get("shell") or next((s for s in _SHELLS if os.access(s, os.X_OK)), _SHELLS[-1])
    return Login(
        values.get("on_failure", "shell"),
        shell,
        own.get("environment") or values.get("environment", ""),
        own.get("engine") or values.get("engine", ""),
    )


def run(login: Login, arguments: Sequence[str], name: str) -> int:
    """Run a shell inside, under this argv[0]; its exit status. Raises NotEntered."""
    environment = os.environ.get("SDEE_ENV") or login.environment
    return run_session(arguments, environment, login.engine, argv0=name, before=_bring_agent)


def _bring_agent(target: Target) -> None:
    """The agent of ssh, if it was forwarded."""
    path = os.environ.get("SSH_AUTH_SOCK")
    if path and "user" in target.fds and "mnt" in target.fds:
        relay(path, target.fds["user"], target.fds["mnt"])
