"""Where generations are kept: at the source, and in a node's cache."""

from __future__ import annotations

import contextlib
import os

from sdee_launch import config
from sdee_launch.accounts import Account
from sdee_launch.config import Settings
from sdee_launch.deploy.cache import DEFAULT
from sdee_launch.deploy.errors import DeployProblem

TRANSPORTS = ("shared", "sbcast")
SHARED_SPOOL = "{home}/.local/share/sdee/spool"
LOCAL_SPOOL = "/var/lib/sdee/spool/{uid}"


def transport(settings: Settings, wanted: str = "") -> str:
    """`shared` or `sbcast`: what is wanted, else what the site says. Raises DeployProblem."""
    chosen = wanted or str(settings.section("deploy").get("transport", "shared"))
    if chosen not in TRANSPORTS:
        raise DeployProblem(f"transport {chosen[:40]!r}: one of {', '.join(TRANSPORTS)}")
    return chosen


def state_directory(account: Account, settings: Settings, environment: str, way: str) -> str:
    """The state directory of an environment's generations.

    `shared`: where all nodes see it. `sbcast`: on this node, in a directory that root makes.
    """
    if way == "shared":
        pattern = str(settings.section("deploy").get("spool", SHARED_SPOOL))
        top = pattern.format(home=account.home, user=account.name, uid=account.uid)
    else:
        top = LOCAL_SPOOL.format(uid=account.uid)
        if os.getuid() == 0:
            os.makedirs(os.path.dirname(top), mode=0o711, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkdir(top, 0o700)
                os.chown(top, account.uid, account.gid)
    return os.path.join(top, environment)


def cache_directory(settings: Settings) -> str:
    """Where this node keeps generations."""
    return str(settings.section("deploy").get("cache", DEFAULT))


def parse_size(text: str) -> int:
    """Bytes of `500M`, `20G`, `1.5T` or a plain number. Raises DeployProblem."""
    try:
        return config.parse_size(text)
    except ValueError as error:
        raise DeployProblem(str(error)) from None


def size_text(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
