"""`make demo-cluster`: a shell in an environment on the login node of the test cluster."""

from __future__ import annotations

import pwd
import subprocess
import sys
from pathlib import Path

from tests.jobs.jobs_lab import SdeeCluster

USER = "sdee-demo"
WELCOME = """\
You are root in your own environment on login1, over this machine's real /.
Install what you like, then: srun -N3 -n6 hostname; sbatch --wrap 'hostname'; sinfo; sdee jobs
The compute nodes are n1, n2 and n3. exit ends the cluster.
"""


def _make_user() -> bool:
    try:
        pwd.getpwnam(USER)
    except KeyError:
        subprocess.run(["useradd", "--create-home", "--shell", "/bin/bash", USER], check=True)
        return True
    return False


def main(command: list[str]) -> int:
    """Bring the cluster up, run the command (default: a shell) in it, take all away."""
    made = _make_user()
    try:
        with SdeeCluster() as cluster:
            print(WELCOME, flush=True)
            words = ["sdee", "run", "--", *command] if command else ["sdee", "shell"]
            line = cluster.words("login1", words, USER, timeout=86400, env={"TERM": "xterm"})
            # --foreground: the shell may use the terminal.
            at = line.index("timeout")
            return subprocess.call([*line[:at], *line[at + 4 :]])
    finally:
        if made:
            home = Path(pwd.getpwnam(USER).pw_dir)
            subprocess.run(
                ["userdel", "--force", "--remove", USER], check=False, capture_output=True
            )
            assert home != Path("/")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
