"""The relay of ssh's agent, into namespaces of the test's own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from sdee_launch import login_agent
from tests.conftest import User
from tests.env.daemon_lab import as_user

INSIDE = (
    "import socket,sys\n"
    "s=socket.socket(socket.AF_UNIX);s.connect(sys.argv[1]);s.sendall(b'hello');print(s.recv(99))\n"
)


def _through(path: str) -> str:
    """As the user: an instance of sorts with a private /tmp, and the relay into it."""
    holder = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c",
         "mount -t tmpfs tmpfs /tmp && echo ready && exec sleep 1000"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    relay = None
    fds = []
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        fds = [os.open(f"/proc/{holder.pid}/ns/{name}", os.O_RDONLY) for name in ("user", "mnt")]
        relay = login_agent.relay(path, fds[0], fds[1])
        assert relay is not None
        assert login_agent.relay(path, fds[0], fds[1]) is None  # it is there now
        assert login_agent.relay(path + "x", fds[0], fds[1]) is None
        enter = [
            "nsenter",
            "--target",
            str(holder.pid),
            "--user",
            "--mount",
            "--preserve-credentials",
        ]
        said = ""
        for _ in range(3):
            done = subprocess.run(
                [*enter, "python3", "-c", INSIDE, path],
                capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            said += done.stdout + done.stderr
        return said
    finally:
        for fd in fds:
            os.close(fd)
        if relay is not None:
            os.kill(relay, signal.SIGTERM)
            os.waitpid(relay, 0)
        holder.kill()
        holder.communicate()


def test_an_agent_answers_inside(alice: User) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ssh-") as directory:
        os.chown(directory, alice.uid, alice.gid)
        path = f"{directory}/agent.1"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            os.chown(path, alice.uid, alice.gid)
            listener.listen(4)
            pid = os.fork()
            if not pid:
                try:
                    while True:
                        peer, _ = listener.accept()
                        with peer:
                            peer.sendall(b"you said " + peer.recv(99))
                finally:
                    os._exit(0)
            try:
                said = as_user(alice.uid, alice.gid, lambda: _through(path))
            finally:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        assert said.count("you said hello") == 3, said


def test_the_relay_dies_with_its_login(alice: User, tmp_path: Path) -> None:
    path = str(tmp_path / "agent")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        read_end, write_end = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                user = os.open("/proc/self/ns/user", os.O_RDONLY)
                pretended = socket.socket(socket.AF_UNIX)
                pretended.bind(path + "2")
                pretended.listen(1)
                login_agent._listen_inside = lambda *_: pretended  # type: ignore[assignment]
                os.write(write_end, str(login_agent.relay(path, user, user)).encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        relay = int(os.read(read_end, 20))
        os.close(read_end)
        os.close(write_end)
        deadline = time.monotonic() + 30
        while Path(f"/proc/{relay}").exists():
            if Path(f"/proc/{relay}/stat").read_text().split()[2] == "Z":
                break
            assert time.monotonic() < deadline
            time.sleep(0.02)
