"""A Slurm cluster on this machine: munge, a controller, a login node and compute nodes.

Each node lives in network, mount, UTS, IPC and PID namespaces of its own, with a private /run,
/tmp and the parts of /var that daemons write. Nothing of it is seen in the host's network, and
all of it ends with the process that started it, however that ends.

`python -m tests.jobs.cluster_lab shell USER` opens a shell on the login node.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent

#: Longer than any healthy step takes on a loaded machine.
PATIENCE = 90.0

#: Stands for a GPU: each node has one, for the job that asks for it.
DEVICE = "/dev/full"

#: Directories of the host that nodes mount over; made if missing, taken away if still empty.
MOUNT_POINTS = ("/etc/sdee", "/var/lib/sdee", "/etc/slurm", "/var/log/slurm", "/var/lib/slurm")

SLURM_CONF = """\
ClusterName=lab
SlurmctldHost=ctl(10.77.0.2)
AuthType=auth/munge
CredType=cred/munge
SlurmUser=slurm
StateSaveLocation=/var/lib/slurm/slurmctld
SlurmdSpoolDir=/var/lib/slurm/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
SlurmdDebug={debug}
ProctrackType={proctrack}
TaskPlugin={task}
TaskPluginParam=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
ReturnToService=2
MailProg=/bin/true
KillWait=3
BcastParameters=DestDir=/tmp
MessageTimeout=60
SlurmdTimeout=120
UnkillableStepTimeout=120
BatchStartTimeout=60
InactiveLimit=0
MpiDefault=none
{hooks}
NodeName={computes} NodeAddr={addresses} CPUs=4 RealMemory=64000 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=FORCE:4 State=UP
"""


PREFIX = "sdee-cluster-"


class ClusterError(RuntimeError):
    """The cluster did not do what it must within its time."""


def wait_for(condition: Callable[[], object], what: str, patience: float = PATIENCE) -> object:
    """The first true answer of `condition`; ClusterError with `what` if none comes in time."""
    deadline = time.monotonic() + patience
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {patience:.0f} s in vain: {what}")
        time.sleep(0.05)


@dataclass
class Node:
    """A machine of the cluster: namespaces that hang on the life of `init`."""

    name: str
    address: str
    role: str
    outer: subprocess.Popen[bytes] | None = None
    init: int = 0

    @property
    def enter(self) -> list[str]:
        """The words before a command that run it on this node as root."""
        return ["nsenter", "-t", str(self.init), "-n", "-m", "-u", "-i", "-p", "--wd=/"]


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    def ok(self) -> str:
        """The output of a command that must have succeeded."""
        assert self.code == 0, f"exit {self.code}\nstdout: {self.out}\nstderr: {self.err}"
        return self.out


@dataclass
class Cluster:
    """The whole: `with Cluster() as cluster:`."""

    hooks: str = "PrologFlags=Alloc,Contain,DeferBatch"
    plugstack: str = ""
    debug: str = "info"
    directory: Path = field(default_factory=Path)
    nodes: dict[str, Node] = field(default_factory=dict)
    _switch: subprocess.Popen[bytes] | None = None
    _made: list[Path] = field(default_factory=list)

    @property
    def computes(self) -> list[str]:
        """Names of the compute nodes."""
        return [node.name for node in self.nodes.values() if node.role == "compute"]

    @property
    def cgroup(self) -> str:
        """Name of the cluster's directory in each cgroup hierarchy."""
        return self.directory.name

    @property
    def limits_by_cgroup(self) -> bool:
        """Whether Slurm can hold jobs to their memory and devices: with hierarchies of cgroup v1."""
        top = Path("/sys/fs/cgroup")
        return all((top / name / "cgroup.procs").exists() for name in ("devices", "memory"))

    def __enter__(self) -> Cluster:
        self._sweep()
        self.directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/var/tmp"))
        self.directory.chmod(0o755)
        (self.directory / "owner").write_text(str(os.getpid()))
        try:
            self._up()
        except BaseException:
            self._print_logs()
            self._down()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self._print_logs()
        self._down()

    @classmethod
    def _sweep(cls) -> None:
        """Remove the files of clusters whose owner was killed; their processes died with it."""
        for directory in Path("/var/tmp").glob(f"{PREFIX}*"):
            try:
                owner = int((directory / "owner").read_text())
            except (OSError, ValueError):
                continue
            if not os.path.exists(f"/proc/{owner}"):
                for controller in Path("/sys/fs/cgroup").iterdir():
                    cls._remove_cgroups(controller / directory.name)
                shutil.rmtree(directory, ignore_errors=True)

    # -- up and down ------------------------------------------------------------------

    def _up(self) -> None:
        members = {"ctl": "controller", "login1": "login", "n1": "compute", "n2": "compute", "n3": "compute"}  # fmt: skip
        for number, (name, role) in enumerate(members.items(), start=2):
            self.nodes[name] = Node(name, f"10.77.0.{number}", role)
        for path in map(Path, MOUNT_POINTS):
            if not path.exists():
                path.mkdir(parents=True)
                self._made.append(path)
        self._write_etc()
        for controller in Path("/sys/fs/cgroup").iterdir():
            if (controller / "cgroup.procs").exists() and controller.name in (
                "devices",
                "freezer",
                "memory",
            ):
                (controller / self.cgroup).mkdir(exist_ok=True)
        self._switch = self._spawn(
            ["unshare", "--net", "--kill-child", "--fork", "sleep", "infinity"], "switch"
        )
        self._in_switch("true")
        self._in_switch("ip", "link", "add", "bridge", "type", "bridge")
        self._in_switch("ip", "link", "set", "bridge", "up")
        for name in self.nodes:
            self.start_node(name)
        for name in self.nodes:
            self.wait_node(name)

    def wait_idle(self, patience: float = PATIENCE) -> None:
        """Until the controller calls every compute node idle."""

        def idle() -> bool:
            states = self.run("login1", ["sinfo", "-h", "-N", "-o", "%T"]).out.split()
            return len(states) == len(self.computes) and set(states) == {"idle"}

        wait_for(idle, "all nodes idle", patience)

    def _write_etc(self) -> None:
        lab = self.directory
        hosts = "".join(f"{node.address} {node.name}\n" for node in self.nodes.values())
        (lab / "hosts").write_text("127.0.0.1 localhost\n" + hosts)
        (lab / "etc-sdee").mkdir()
        slurm = lab / "etc-slurm"
        slurm.mkdir()
        computes = [self.nodes[name] for name in self.computes]
        freezer = Path("/sys/fs/cgroup/freezer").is_dir()
        limits = freezer and self.limits_by_cgroup
        (slurm / "slurm.conf").write_text(
            SLURM_CONF.format(
                computes=",".join(node.name for node in computes),
                addresses=",".join(node.address for node in computes),
                proctrack="proctrack/cgroup" if freezer else "proctrack/linuxproc",
                task="task/cgroup,task/affinity" if limits else "task/affinity",
                hooks=self.hooks,
                debug=self.debug,
            )
        )
        (slurm / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nConstrainRAMSpace=yes\n"
            "ConstrainDevices=yes\n"
        )
        (slurm / "gres.conf").write_text(f"Name=gpu File={DEVICE}\n")
        (slurm / "plugstack.conf").write_text(self.plugstack)
        munge = lab / "etc-munge"
        munge.mkdir()
        (munge / "munge.key").write_bytes(os.urandom(128))
        (munge / "munge.key").chmod(0o600)
        munge.chmod(0o700)
        for path in (munge, munge / "munge.key"):
            shutil.chown(path, "munge", "munge")

    def _spawn(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        """Start `command` so that it dies with this process, however this one ends."""
        with open(self.directory / f"{name}.log", "ab") as log:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/",
            )  # fmt: skip

    def _inside(self, outer: subprocess.Popen[bytes], namespace: str) -> int:
        """The child of an unshare(1) once it is in a `namespace` of its own."""
        ours = os.readlink(f"/proc/self/ns/{namespace}")
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")

        def child() -> int:
            if outer.poll() is not None:
                raise ClusterError(f"{outer.args!r} ended with {outer.returncode}")
            for pid in children.read_text().split():
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/ns/{namespace}") != ours:
                        return int(pid)
            return 0

        return int(str(wait_for(child, f"namespaces of {outer.args!r}")))

    def _in_switch(self, *command: str) -> None:
        assert self._switch is not None
        pid = self._inside(self._switch, "net")
        subprocess.run(
            ["nsenter", "-t", str(pid), "-n", *command], check=True, timeout=PATIENCE,
            capture_output=True,
        )  # fmt: skip

    def start_node(self, name: str) -> None:
        """Power on."""
        node = self.nodes[name]
        node.outer = self._spawn(
            ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child",
             "--propagation", "private", "--mount-proc",
             "bash", str(HERE / "cluster_node.sh"), name, node.address, node.role,
             str(self.directory), self.cgroup], name,
        )  # fmt: skip
        node.init = self._inside(node.outer, "net")
        end = f"v-{name}"
        with contextlib.suppress(subprocess.CalledProcessError):  # a dead namespace frees it late
            self._in_switch("ip", "link", "del", end)
        # One address for life: the others remember it when the node comes back.
        hardware = "02:00:" + ":".join(f"{int(part):02x}" for part in node.address.split("."))
        self._in_switch("ip", "link", "add", end, "type", "veth", "peer", "name", "eth0", "address", hardware, "netns", str(node.init))  # fmt: skip
        self._in_switch("ip", "link", "set", end, "master", "bridge", "up")

    def wait_node(self, name: str) -> None:
        """Until the node's daemons have been started."""
        node = self.nodes[name]

        def up() -> bool:
            assert node.outer is not None
            if node.outer.poll() is not None:
                raise ClusterError(f"node {name} died: {self.log(name)}")
            return os.path.exists(f"/proc/{node.init}/root/run/node-is-up")

        wait_for(up, f"node {name} up")

    def crash_node(self, name: str) -> None:
        """Power off without a word."""
        node = self.nodes[name]
        assert node.outer is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(node.init, signal.SIGKILL)
        node.outer.wait(PATIENCE)

    def _down(self) -> None:
        for node in self.nodes.values():
            if node.outer is None:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(node.init or node.outer.pid, signal.SIGKILL)
        for process in [*(node.outer for node in self.nodes.values()), self._switch]:
            if process is None:
                continue
            try:
                process.wait(1 if process is self._switch else 60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(60)
        for controller in Path("/sys/fs/cgroup").iterdir():
            self._remove_cgroups(controller / self.cgroup)
        shutil.rmtree(self.directory, ignore_errors=True)
        for path in self._made:
            with contextlib.suppress(OSError):
                path.rmdir()

    @staticmethod
    def _remove_cgroups(top: Path) -> None:
        deadline = time.monotonic() + 30
        while top.exists():
            for directory, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
            if time.monotonic() > deadline:
                return
            if top.exists():
                time.sleep(0.1)

    # -- use --------------------------------------------------------------------------

    def run(
        self,
        node: str,
        command: Sequence[str] | str,
        user: str = "root",
        timeout: float = 120,
        env: Mapping[str, str] | None = None,
        input: str | None = None,
        cwd: str | None = None,
    ) -> Result:
        """Run a command (a string: by bash) on a node and wait for its end."""
        words = self.words(node, command, user, timeout, env, cwd)
        done = subprocess.run(
            words, capture_output=True, timeout=timeout + 30, check=False,
            input=input.encode() if input is not None else None,
            stdin=None if input is not None else subprocess.DEVNULL,
        )  # fmt: skip
        return Result(
            done.returncode,
            done.stdout.decode(errors="replace"),
            done.stderr.decode(errors="replace"),
        )

    def words(
        self,
        node: str,
        command: Sequence[str] | str,
        user: str = "root",
        timeout: float = 120,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
    ) -> list[str]:
        """The words of a command line that runs `command` on a node."""
        account = pwd.getpwnam(user)
        if isinstance(command, str):
            command = ["bash", "-c", command]
        variables = {
            "HOME": account.pw_dir,
            "USER": user,
            "LOGNAME": user,
            "SHELL": "/bin/bash",
            "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            **(env or {}),
        }
        place = cwd or (account.pw_dir if user != "root" else "/")
        identity = (
            []
            if user == "root"
            else [
                "setpriv",
                f"--reuid={account.pw_uid}",
                f"--regid={account.pw_gid}",
                "--init-groups",
            ]
        )
        return [
            *self.nodes[node].enter,
            *identity,
            "env", "-i", f"--chdir={place}", *(f"{key}={value}" for key, value in variables.items()),
            "timeout", "-k", "10", str(int(timeout)),
            *command,
        ]  # fmt: skip

    def pid_of(self, node: str, program: str) -> int:
        """The (host's) pid of a daemon on a node, by the name of its program."""
        inner = self.run(node, ["pgrep", "-o", "-x", program]).out.split()
        if not inner:
            raise ClusterError(f"{program} does not run on {node}")
        namespace = os.readlink(f"/proc/{self.nodes[node].init}/ns/pid")
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{entry}/ns/pid") != namespace:
                    continue
                for line in Path(f"/proc/{entry}/status").read_text().splitlines():
                    if line.startswith("NSpid:") and line.split()[-1] == inner[0]:
                        return int(entry)
        raise ClusterError(f"{program} ended on {node}")

    def log(self, name: str) -> str:
        """What a node's init wrote."""
        with contextlib.suppress(OSError):
            return (self.directory / f"{name}.log").read_text(errors="replace")
        return ""

    def _print_logs(self) -> None:
        for path in sorted(self.directory.glob("*.log")) + sorted(
            self.directory.glob("nodes/*/var/log-slurm/*.log")
        ):
            with contextlib.suppress(OSError):
                lines = path.read_text(errors="replace").splitlines()[-40:]
                if lines:
                    print(
                        f"--- {path.relative_to(self.directory)}", *lines, sep="\n", file=sys.stderr
                    )


@contextlib.contextmanager
def plain_cluster() -> Iterator[Cluster]:
    """A cluster without SDEE."""
    with Cluster() as cluster:
        cluster.wait_idle()
        yield cluster


def main(verb: str, *arguments: str) -> int:
    """`run USER COMMAND…`: on the login node of a plain cluster."""
    user, *command = arguments
    with plain_cluster() as cluster:
        if verb == "run":
            return subprocess.call(cluster.words("login1", " ".join(command), user))
    return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
