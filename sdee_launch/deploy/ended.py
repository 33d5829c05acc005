"""Which jobs hold generations of a node's cache without being there any more.

An Epilog gives a job's generation back, and the daemon does for jobs that ended while it was away.
Where both failed a mark stays behind, and would keep its generation for as long as the node is up.
"""

from __future__ import annotations

import subprocess

from sdee_launch.accounts import Account
from sdee_launch.deploy import cache

#: Seconds for squeue; a busy controller answers late.
PATIENCE = 120


def release_ended(account: Account, where: str) -> list[str]:
    """Release what jobs use that Slurm doesn't know any more; who they were. Nothing is released
    where Slurm gives no answer. Raises DeployProblem."""
    jobs = [key for key in cache.users(account, where) if key.removeprefix("job-").isdigit()]
    live = live_jobs(str(account.uid)) if jobs else None
    if live is None:
        return []
    ended = [key for key in jobs if key.removeprefix("job-") not in live]
    for key in ended:
        cache.release(account, where, key)
    return ended


def live_jobs(user: str) -> set[str] | None:
    """The numbers of the jobs of a user (name or uid) that haven't ended; None: nobody can tell."""
    try:
        done = subprocess.run(
            ["squeue", "-h", "-u", user, "-o", "%A"],
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return None if done.returncode else set(done.stdout.split())
