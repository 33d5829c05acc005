"""A real sshd on a loopback port, with keys of its own and two users whose shell is sdee-login."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import User
from tests.env.daemon_lab import Daemon, running_daemon, wait_for
from tests.env.screen_lab import Screen

BIN = os.path.dirname(sys.executable)
LOGIN = os.path.join(BIN, "sdee-login")
SDEE = os.path.join(BIN, "sdee")
CONFIGURATION = Path("/etc/sdee/sdee.toml")
SECONDS = 60


@contextlib.contextmanager
def node_is_ours() -> Iterator[None]:
    """Keep other test runs from the node's daemon, its configuration and the users' shells."""
    with open("/run/lock/sdee-tests-node.lock", "w") as lock:
        deadline = time.monotonic() + 120
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                assert time.monotonic() < deadline, "other tests keep the node's daemon"
                time.sleep(0.2)
        yield


@contextlib.contextmanager
def configuration(text: str) -> Iterator[None]:
    """/etc/sdee/sdee.toml, for the length of a block."""
    old = CONFIGURATION.read_text() if CONFIGURATION.exists() else None
    CONFIGURATION.parent.mkdir(exist_ok=True)
    CONFIGURATION.write_text(text)
    CONFIGURATION.chmod(0o644)
    try:
        yield
    finally:
        if old is None:
            CONFIGURATION.unlink()
        else:
            CONFIGURATION.write_text(old)


@contextlib.contextmanager
def login_shell(shell: str, *users: User) -> Iterator[None]:
    """Accounts with this login shell, and logins allowed without a password."""
    before = {user.name: pwd.getpwnam(user.name).pw_shell for user in users}
    for name in before:
        _run(["usermod", "-s", shell, "-p", "*", name])
    try:
        yield
    finally:
        for name, old in before.items():
            _run(["usermod", "-s", old, name])


def _run(words: list[str]) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=SECONDS)


class Sshd:
    """One sshd, and `ssh` to it."""

    def __init__(self, directory: Path, users: tuple[User, ...], extra: str = "") -> None:
        self.directory = directory
        self.users = users
        self.extra = extra
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Make the keys and start it."""
        self.directory.mkdir(exist_ok=True)
        self.directory.chmod(0o755)
        for name in ("host", *(user.name for user in self.users)):
            if not (self.directory / name).exists():
                _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{self.directory}/{name}"])  # fmt: skip
            (self.directory / f"{name}.pub").chmod(0o644)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        public = (self.directory / "host.pub").read_text().split()
        (self.directory / "known").write_text(f"[127.0.0.1]:{self.port} {public[0]} {public[1]}\n")
        (self.directory / "config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.directory}/host\n"
            f"AuthorizedKeysFile {self.directory}/%u.pub\nStrictModes no\nUsePAM yes\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPidFile none\n"
            "MaxStartups 200\nMaxSessions 100\nX11Forwarding yes\nX11UseLocalhost yes\n"
            "PrintMotd no\nUseDNS no\nAcceptEnv LANG LC_* SDEE_*\nLoginGraceTime 60\n"
            "Subsystem sftp /usr/lib/openssh/sftp-server\n" + self.extra
        )
        os.makedirs("/run/sshd", exist_ok=True)
        log = open(self.directory / "sshd.log", "ab")  # noqa: SIM115 - the process's
        self.process = subprocess.Popen(
            ["/usr/sbin/sshd", "-D", "-e", "-f", str(self.directory / "config")],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/",
        )  # fmt: skip
        log.close()
        wait_for(self._answers, "sshd listens")

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.directory / "sshd.log").read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5):
            return True
        return False

    def stop(self) -> None:
        """End it; what is logged in stays."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(SECONDS)

    def options(self, user: User) -> list[str]:
        """What ssh, scp and sftp are told."""
        return [
            "-F", "none", "-i", str(self.directory / user.name),
            "-o", f"UserKnownHostsFile={self.directory}/known", "-o", "BatchMode=yes",
            "-o", "IdentitiesOnly=yes", "-o", "ConnectTimeout=60", "-o", "LogLevel=ERROR",
        ]  # fmt: skip

    def command(self, user: User, *words: str) -> list[str]:
        """An ssh command line; words that start with "-" go before the host."""
        flags = [word for word in words if word.startswith("-")]
        rest = [word for word in words if not word.startswith("-")]
        return [
            "ssh", *self.options(user), "-p", str(self.port), *flags, f"{user.name}@127.0.0.1",
            *rest,
        ]  # fmt: skip

    def run(
        self, user: User, *words: str, input: str | None = None, seconds: float = SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """`ssh host words`, to its end."""
        return subprocess.run(
            self.command(user, *words),
            input=input, stdin=subprocess.DEVNULL if input is None else None, text=True,
            capture_output=True, timeout=seconds, check=False, errors="replace",
        )  # fmt: skip

    def say(self, user: User, script: str, seconds: float = SECONDS) -> str:
        """What a shell script prints there. Fails unless it ends with 0."""
        done = self.run(user, script, seconds=seconds)
        assert done.returncode == 0, f"{script}\n{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()


@contextlib.contextmanager
def running_sshd(directory: Path, *users: User, extra: str = "") -> Iterator[Sshd]:
    """An sshd for the length of a block."""
    server = Sshd(directory, users, extra)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class Terminal(Screen):
    """A program on a terminal of its own, and what a person would see and type."""

    patience = SECONDS

    def __init__(self, words: list[str]) -> None:
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.environ["TERM"] = "dumb"
            os.execvp(words[0], words)
        self.seen = ""

    def wait(self, seconds: float = SECONDS) -> int:
        """Its exit status, when it has ended."""
        deadline = time.monotonic() + seconds
        while True:
            if select.select([self.fd], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    os.read(self.fd, 65536)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < deadline, "it doesn't end"

    def close(self) -> None:
        """Hang up."""
        os.close(self.fd)
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@contextlib.contextmanager
def terminal(words: list[str]) -> Iterator[Terminal]:
    """A terminal for the length of a block."""
    opened = Terminal(words)
    try:
        yield opened
    finally:
        opened.close()


def build_deb(directory: Path, name: str) -> Path:
    """A small Debian package with one command, `name`."""
    tree = directory / f"{name}-deb"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "usr/bin").mkdir(parents=True)
    (tree / "etc").mkdir()
    (tree / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <no@body>\n"
        "Description: a test\n"
    )
    (tree / "DEBIAN/conffiles").write_text(f"/etc/{name}.conf\n")
    (tree / f"etc/{name}.conf").write_text("as shipped\n")
    (tree / f"usr/bin/{name}").write_text(f"#!/bin/sh\necho {name} runs\n")
    (tree / f"usr/bin/{name}").chmod(0o755)
    target = directory / f"{name}.deb"
    _run(["dpkg-deb", "--root-owner-group", "--build", str(tree), str(target)])
    shutil.rmtree(tree)
    return target


def build_wheel(directory: Path, name: str) -> Path:
    """A small pure Python wheel, made by hand: no network, no build tools."""
    target = directory / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(target, "w") as wheel:
        wheel.writestr(f"{name}.py", "def hello():\n    return 'wheel runs'\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(
            f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n"
        )
    return target


class Node:
    """A machine as a site has it: the daemon, sshd, users whose login shell is sdee-login."""

    def __init__(self, daemon: Daemon, sshd: Sshd, engine: str) -> None:
        self.daemon = daemon
        self.sshd = sshd
        self.engine = engine

    def say(self, user: User, script: str) -> str:
        """What a script prints inside."""
        return self.sshd.say(user, script)

    def as_host(self, user: User, words: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a program on the host as this user; 126 if that isn't permitted."""
        try:
            return subprocess.run(
                words, user=user.uid, group=user.gid, extra_groups=[], cwd="/", timeout=SECONDS,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(user.home), "USER": user.name},
                capture_output=True, text=True, check=False, errors="replace",
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except PermissionError as error:
            return subprocess.CompletedProcess(words, 126, "", str(error))

    @contextlib.contextmanager
    def sleeping(self, user: User) -> Iterator[int]:
        """A process that stays inside, by the host's number for it."""
        process = subprocess.Popen(
            self.sshd.command(user, "echo here; exec sleep 1000"),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "here\n"
            found: list[int] = []

            def look() -> bool:
                for instance in self.daemon.instances():
                    processes = instance["processes"]
                    assert isinstance(processes, list)
                    if instance["uid"] == user.uid:
                        found.extend(p["pid"] for p in processes if p["command"] == "sleep 1000")
                return bool(found)

            wait_for(look, "the sleeper is seen")
            yield found[0]
            with contextlib.suppress(ProcessLookupError):
                os.kill(found[0], signal.SIGTERM)
        finally:
            process.terminate()
            process.wait(SECONDS)
            if process.stdout is not None:
                process.stdout.close()

    def servers(self, user: User) -> list[int]:
        """The servers of sdeefs that serve this user."""
        found: list[int] = []
        for item in self.daemon.instances():
            servers = item["servers"]
            assert isinstance(servers, list)
            if item["uid"] == user.uid:
                found += servers
        return found

    def end(self, user: User) -> None:
        """No instance of this user lives any more."""
        for item in self.daemon.instances():
            if item["uid"] == user.uid:
                with contextlib.suppress(Exception):
                    self.daemon.request("kill", uid=user.uid, env=item["env"])

    @contextlib.contextmanager
    def secret(self, path: str) -> Iterator[str]:
        """A file of root's that nobody else may read; an existing one is taken as it is."""
        file = Path(path)
        if file.exists():
            yield file.read_bytes()[:60].decode("latin-1")
            return
        text = f"secret {os.urandom(8).hex()}"
        made = file.parent if not file.parent.exists() else None
        file.parent.mkdir(exist_ok=True)
        if made:
            made.chmod(0o700)
        file.touch(0o600)
        file.write_text(text + "\n")
        try:
            yield text
        finally:
            file.unlink()
            if made:
                made.rmdir()

    def rescan_for(self, user: User) -> None:
        """The daemon knows the secrets as they are now, and the user's next instance as well."""
        if self.engine == "kernel":
            self.daemon.request("node", rescan=True)
            self.end(user)

    def upper(self, user: User) -> Path:
        """Where the host has the upper of the user's default environment."""
        return user.home / ".local/share/sdee/environments/default/upper"


@contextlib.contextmanager
def login_node(engine: str, *users: User, extra: str = "") -> Iterator[Node]:
    """A whole node for the length of a block. `extra` goes to sshd's configuration."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        with (
            node_is_ours(),
            configuration(f'[environments]\nengine = "{engine}"\n'),
            login_shell(LOGIN, *users),
            running_daemon(directory, "/run/sdee", "/run/sdee/sdeed.sock") as daemon,
            running_sshd(directory / "sshd", *users, extra=extra) as sshd,
        ):
            for user in users:  # begin with fresh environments
                subprocess.run(
                    ["rm", "-rf", "--one-file-system", f"{user.home}/.local/share/sdee"],
                    check=True, timeout=SECONDS,
                )  # fmt: skip
            yield Node(daemon, sshd, engine)


PIP = (
    "if command -v pip3 >/dev/null; then pip3 install --break-system-packages --no-index {0}; else "
    "PYTHONPATH=$(ls -d /usr/share/python-wheels/pip-*.whl) python3 -m pip install "
    "--break-system-packages --no-index {0}; fi"
)


def the_scenario(node: Node, alice: User, bob: User, tmp_path: Path, name: str) -> None:
    """The issue's: log in, be root, install, log out, log in and find it; nobody else sees it."""
    package, wheel = build_deb(tmp_path, f"{name}-pack"), build_wheel(tmp_path, f"{name}_wheel")
    assert node.say(alice, "id -u; whoami; echo $HOME; echo $USER") .split() == [
        "0", "root", str(alice.home), alice.name,
    ]  # fmt: skip
    options = [x if x != "-p" else "-P" for x in node.sshd.options(alice)]
    subprocess.run(
        ["scp", *options, "-P", str(node.sshd.port), str(package), str(wheel),
         f"{alice.name}@127.0.0.1:/opt/"],
        check=True, timeout=120, capture_output=True,
    )  # fmt: skip
    node.sshd.say(
        alice, f"DEBIAN_FRONTEND=noninteractive apt-get install -y /opt/{package.name} 2>&1", 120
    )
    node.sshd.say(alice, PIP.format(f"/opt/{wheel.name}") + " 2>&1", 120)
    node.say(alice, f"echo changed >> /etc/{name}-pack.conf; rm /etc/motd 2>/dev/null; true")
    node.end(alice)
    assert node.daemon.instances() == []
    assert node.say(alice, f"{name}-pack") == f"{name}-pack runs"
    assert (
        node.say(alice, f"python3 -c 'import {name}_wheel as w; print(w.hello())'") == "wheel runs"
    )
    assert "ii" in node.say(alice, f"dpkg -l {name}-pack | tail -1")
    # The host, and the other user, have nothing of it.
    assert not Path(f"/usr/bin/{name}-pack").exists()
    assert subprocess.run(
        ["dpkg", "-s", f"{name}-pack"], capture_output=True, check=False
    ).returncode
    assert node.sshd.run(bob, f"{name}-pack").returncode == 127
    assert node.sshd.run(bob, f"ls /usr/bin/{name}-pack /opt/{package.name}").returncode != 0
    node.say(alice, f"dpkg --purge {name}-pack; rm -f /opt/{package.name} /opt/{wheel.name}")
