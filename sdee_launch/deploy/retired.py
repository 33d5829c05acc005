"""Generations of environments that were removed: they go once no job can want them any more.

Which generation a job in the queue waits for isn't to be had from Slurm. So all of them stay while
the user has any job, under a mark that the next cleaning looks at.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection

from sdee_launch.accounts import Account
from sdee_launch.config import Settings
from sdee_launch.deploy import ended, places
from sdee_launch.deploy.errors import DeployProblem
from sdee_launch.deploy.generations import State

#: In a state directory: the newest generation when its environment was removed.
MARK = "removed"


def retire(account: Account, settings: Settings, environment: str) -> None:
    """Mark the generations of an environment that is gone. Raises DeployProblem, OSError."""
    for way in places.TRANSPORTS:
        path = places.state_directory(account, settings, environment, way)
        if os.path.isdir(path) and not os.path.islink(path):
            with State(path, create=False) as state:
                state.put(MARK, b"%d\n" % max(state.numbers(), default=0))


def clear(
    account: Account, settings: Settings, environments: Collection[str]
) -> tuple[list[str], list[str]]:
    """Remove what is marked: (state directories that are gone, those that stay for now).

    `environments`: the names that exist. Raises DeployProblem, OSError.
    """
    left = [
        path for path in marked(account, settings) if os.path.basename(path) not in environments
    ]
    if not left or ended.live_jobs(str(account.uid)) != set():
        return [], left
    gone = []
    for path in left:
        with State(path, create=False) as state:
            if _in_use_again(state):
                os.unlink(MARK, dir_fd=state.fd)
                continue
            # The mark last: killed before, the next one goes on.
            for name in os.listdir(state.fd):
                if name != MARK:
                    with contextlib.suppress(IsADirectoryError):
                        os.unlink(name, dir_fd=state.fd)
            shutil.rmtree(path)
        gone.append(path)
    return gone, []


def marked(account: Account, settings: Settings) -> list[str]:
    """The state directories with a mark. Raises OSError."""
    found = []
    for way in places.TRANSPORTS:
        top = os.path.dirname(places.state_directory(account, settings, "any", way))
        with contextlib.suppress(FileNotFoundError, PermissionError), os.scandir(top) as entries:
            found += [
                entry.path
                for entry in entries
                if entry.is_dir(follow_symlinks=False)
                and os.path.lexists(os.path.join(entry.path, MARK))
            ]
    return sorted(found)


def _in_use_again(state: State) -> bool:
    """Whether there is a generation from after the removal: of a new environment, or of a job."""
    try:
        with open(os.path.join(state.path, MARK), "rb") as file:
            last = int(file.read(32))
    except ValueError:
        raise DeployProblem(f"{state.path}/{MARK} isn't understood; remove it") from None
    return max(state.numbers(), default=0) > last
