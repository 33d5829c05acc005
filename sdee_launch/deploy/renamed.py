"""Generations of an environment that was renamed: they are its own under the new name, too.

A job in the queue has the old name's state directory in its hands. So that one stays as if its
environment had been removed (retired.py), and the new one shares its files, none of which is ever
written to again.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil

from sdee_launch.accounts import Account
from sdee_launch.config import Settings
from sdee_launch.deploy import places
from sdee_launch.deploy.generations import State

#: What makes up the generations; `sent.json`: who has been sent which (slurm/broadcast.py).
_SHARED = re.compile(r"[1-9][0-9]{0,17}\.(manifest|pack|json)|identity|sent\.json")


def take_over(account: Account, settings: Settings, old: str, new: str) -> None:
    """Give `new` the generations of `old`, unless it has some. Raises DeployProblem, OSError."""
    for way in places.TRANSPORTS:
        source = places.state_directory(account, settings, old, way)
        target = places.state_directory(account, settings, new, way)
        if os.path.isdir(source) and not os.path.islink(source) and not os.path.lexists(target):
            with State(source, create=False) as state:
                _share(state, target)


def _share(state: State, target: str) -> None:
    made = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.new")
    shutil.rmtree(made, ignore_errors=True)
    os.mkdir(made, 0o700)
    try:
        for name in os.listdir(state.fd):
            if _SHARED.fullmatch(name):
                os.link(name, os.path.join(made, name), src_dir_fd=state.fd, follow_symlinks=False)
        # Nodes know generations by identity and number: two directories that go on counting must
        # not have the same. Jobs in the queue have brought the old one with them.
        state.new_identity()
        with contextlib.suppress(FileNotFoundError):
            os.unlink("sent.json", dir_fd=state.fd)
        os.rename(made, target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
