"""The test cluster with SDEE on every node: plugin, hooks, configuration and a sdeed each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from sdee_launch.slurm import install
from tests.jobs.cluster_lab import PATIENCE, Cluster, Result, wait_for

#: As nodes see it: the plugin, the hooks and the client program.
LIBRARY = "/etc/slurm/sdee"

#: Directories that only the test cluster mounts over the host's: no filesystems of their own.
CONFIGURATION = """\
[instance]
not_there = [
    "/boot", "/efi", "/etc/munge", "/etc/sdee", "/etc/slurm", "/var/lib/munge", "/var/lib/sdee",
    "/var/lib/slurm", "/var/log/munge", "/var/log/slurm",
]
"""

#: Asked at once, for it is asked often.
SEPARATOR = "-- next --"
LEFT_OVERS = f"""\
set -e
for d in /run/sdee/jobs /var/lib/sdee/{{jobs,inbox}}; do ls -A $d 2>/dev/null || true; done
echo '{SEPARATOR}'; cat /proc/self/mountinfo
echo '{SEPARATOR}'; sdee node --json
echo '{SEPARATOR}'; ps -eo args --no-headers
"""

SDEE_NODES = ("login1", "n1", "n2", "n3")


@dataclass
class SdeeCluster(Cluster):
    """`with SdeeCluster() as cluster:` gives an idle cluster, ready for jobs in environments."""

    configuration: str = CONFIGURATION
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        library = Path(LIBRARY)
        self.hooks = "\n".join(install.slurm_conf_lines(library))
        self.plugstack = install.plugstack_line(library) + "\n"

    def _write_etc(self) -> None:
        super()._write_etc()
        library = self.directory / "etc-slurm" / "sdee"
        install.build(library)
        install.write_hooks(library)
        (self.directory / "etc-sdee" / "sdee.toml").write_text(self.configuration)

    def __enter__(self) -> SdeeCluster:
        super().__enter__()
        try:
            for node in SDEE_NODES:
                self.start_daemon(node)
            for node in SDEE_NODES:
                self.wait_daemon(node)
            self.wait_idle()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    # -- the daemons

    def start_daemon(self, node: str) -> None:
        """Start sdeed on a node."""
        command = [sys.executable, "-I", "-m", "sdee_launch.daemon", "-v"]
        words = self.words(node, command, timeout=3600)
        # No timeout(1) around a daemon.
        at = words.index("timeout")
        words = [*words[:at], *words[at + 4 :]]
        self.daemons[node] = self._spawn(words, f"sdeed-{node}")

    def wait_daemon(self, node: str) -> None:
        """Until it answers."""

        def answers() -> bool:
            process = self.daemons[node]
            assert process.poll() is None, self.log(f"sdeed-{node}")
            ask = 'from sdee_launch import protocol; protocol.request("status")'
            return self.run(node, [sys.executable, "-I", "-c", ask], timeout=60).code == 0

        socket = Path(f"/proc/{self.nodes[node].init}/root/run/sdee/sdeed.sock")
        wait_for(
            lambda: socket.exists() or self.daemons[node].poll() is not None, f"sdeed on {node}"
        )
        wait_for(answers, f"sdeed on {node} answers")

    def kill_daemon(self, node: str) -> None:
        """SIGKILL to sdeed itself."""
        pid = self.daemon_pid(node)
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.daemons[node].wait(PATIENCE)

    def crash_node(self, name: str) -> None:
        """Power off without a word; its daemon goes with it."""
        super().crash_node(name)
        if name in self.daemons:
            self.daemons[name].wait(PATIENCE)

    def daemon_pid(self, node: str) -> int:
        """The host's pid of sdeed on a node."""
        outer = self.daemons[node].pid
        # nsenter -p forks: the daemon is its only child, or itself.
        children = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
        return int(children[0]) if children else outer

    def _down(self) -> None:
        super()._down()
        for process in self.daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)

    # -- what is left

    @staticmethod
    def _strangers(listed: str) -> list[str]:
        """Of command lines of a node's processes, those that are no daemon's of the cluster."""
        own = (
            "slurmd",
            "slurmctld",
            "munged",
            "sdeed",
            "bash",
            "sleep",
            "ps",
            "sdee_launch.daemon",
        )
        found = []
        for line in listed.splitlines():
            if not any(word in line.split(" ", 1)[0] or word in line for word in own):
                found.append(line)
        return found

    def left_overs(self, node: str) -> dict[str, object]:
        """All that a job may have left on a node; empty values are well."""
        records, mounts, told, listed = self.run(node, LEFT_OVERS).ok().split(f"{SEPARATOR}\n")
        return {
            "records": records.split(),
            "mounts": [
                x
                for x in mounts.splitlines()
                if " - overlay sdee " in x or "fuse.sdeefs sdee " in x
            ],
            "instances": json.loads(told)["instances"],
            "servers": [x for x in self._strangers(listed) if "sdeefs" in x],
        }

    def used_by(self, node: str) -> list[str]:
        """Jobs that a node's cache says are using generations of it."""
        marks = self.run(node, "ls -d /var/lib/sdee/cache/*/*/*/users/* 2>/dev/null").out.split()
        return sorted(mark.rpartition("/")[2] for mark in marks)

    def job_state(self, job: str) -> str:
        """As the controller has it; COMPLETING is none of a job's end."""
        return self._shown(job).get("JobState", "")

    def _shown(self, job: str) -> dict[str, str]:
        """What the controller has of a job; nothing of one that it doesn't know."""
        shown = self.run("login1", ["scontrol", "show", "job", "-o", job]).out
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait_job(self, job: str) -> tuple[str, str]:
        """State and exit code of a job that has ended. (`sbatch -W` looks after 2, 6, 14 s.)"""

        def ended() -> tuple[str, str] | None:
            told = self._shown(job)
            running = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
            return None if told["JobState"] in running else (told["JobState"], told["ExitCode"])

        found = wait_for(ended, f"the end of job {job}")
        assert isinstance(found, tuple)
        return found

    def wait_clean(self, patience: float = PATIENCE) -> None:
        """Until no compute node has anything left of any job."""
        last: dict[str, object] = {}

        def clean() -> bool:
            last.clear()
            for node in self.computes:
                left = {key: value for key, value in self.left_overs(node).items() if value}
                if left:
                    last[node] = left
                    return False
            return True

        try:
            wait_for(clean, "nodes clean", patience)
        except RuntimeError as error:
            raise AssertionError(f"{error}: {last}") from None

    def inside(
        self,
        command: str,
        user: str,
        environment: str = "jobs",
        timeout: float = 150,
        options: str = "",
        env: dict[str, str] | None = None,
    ) -> Result:
        """Run a bash command line on the login node, inside the user's environment."""
        words = ["sdee", "run", "--env", environment, *options.split(), "--", "bash", "-c", command]
        return self.run("login1", words, user, timeout, env=env)
