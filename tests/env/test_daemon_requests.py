"""The daemon against clients that mean harm, and what one user can see of another."""

from __future__ import annotations

import array
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdee_launch import protocol
from tests.conftest import User
from tests.env.daemon_lab import Daemon, as_user, connect, running_daemon, wait_for


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    # Not below pytest's own directory: users must reach the socket.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        os.chmod(directory, 0o755)
        with running_daemon(Path(directory)) as started:
            yield started


def _say(daemon: Daemon, data: bytes) -> bytes:
    """Send raw bytes, end the sending side, and give all that comes back."""
    with connect(daemon.socket) as sock:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = b""
        try:
            while more := sock.recv(65536):
                answer += more
        except ConnectionResetError:
            pass
        return answer


def _frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def test_status_tells_a_user_of_nothing_but_the_own(daemon: Daemon, alice: User) -> None:
    said = as_user(alice.uid, alice.gid, lambda: protocol.request("status", path=daemon.socket)[0])
    assert "'instances': []" in said


@pytest.mark.parametrize(
    "fields",
    [
        {"op": "node"},
        {"op": "job-prepare", "job": 1, "uid": 0},
        {"op": "job-join", "job": 1},
        {"op": "ps", "uid": 0},
        {"op": "kill", "uid": 0, "env": "default"},
        {"op": "kill", "env": "default"},
        {"op": "kill", "env": "../../x"},
        {"op": "kill", "env": ["default"]},
        {"op": "kill", "env": "default", "pid": 1},
        {"op": "join", "env": "../up"},
        {"op": "join", "env": "a/b"},
        {"op": "join", "env": ""},
        {"op": "join", "env": "."},
        {"op": "join", "env": "-x"},
        {"op": "join", "env": "a\x00b"},
        {"op": "join", "env": "a\nb"},
        {"op": "join", "env": "x" * 65},
        {"op": "join", "env": 7},
        {"op": "join", "env": "ok", "engine": "none"},
        {"op": "join", "env": "ok", "binds": "x"},
        {"op": "join", "env": "ok", "binds": [1]},
        {"op": "join", "env": "ok", "binds": ["a\x00b"]},
        {"op": "join", "env": "ok", "binds": ["x"] * 1000},
        {"op": "deploy-exclude"},
        {"op": "deploy-exclude", "environment": "../x"},
        {"op": "deploy-exclude", "environment": "no-such", "add": "x"},
        {"op": "deploy-exclude", "environment": "no-such", "add": ["x"]},
        {"op": None},
        {"op": []},
        {"op": "__init__"},
        {},
    ],
)
def test_requests_that_are_refused(daemon: Daemon, alice: User, fields: dict[str, object]) -> None:
    def ask() -> object:
        body = _frame(protocol.encode(fields).encode())
        return protocol.decode(_say(daemon, body)[4:])

    assert "'ok': False" in as_user(alice.uid, alice.gid, ask)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"\xff\xff\xff\xff",
        b"\x7f\xff\xff\xffx",
        _frame(b""),
        _frame(b"{"),
        _frame(b"[]"),
        _frame(b'{"op":'),
        _frame(b'{"op":NaN}'),
        _frame(b"\xff\xfe"),
        _frame(b"[" * 60000),
        _frame(b'{"a":' * 10000),
        _frame(b'{"op":"status"}') * 50,
        _frame(b"9" * 60000),
        b"\0\0\0\x10short",
        b"GET / HTTP/1.0\r\n\r\n",
    ],
)
def test_bytes_that_are_no_request(daemon: Daemon, data: bytes) -> None:
    _say(daemon, data)
    assert daemon.answers()


def test_random_requests(daemon: Daemon, alice: User) -> None:
    """Neither random bytes nor well-formed nonsense does any harm."""
    chance = random.Random(20261128)
    before = len(daemon.log.read_text())
    words: list[object] = [
        None, True, -1, 2**70, 1.5, "", "default", "x" * 5000, "\x00", "../..", [], {}, [[]],
        {"a": {"b": []}}, ["a", 1],
    ]  # fmt: skip
    keys = ["op", "env", "engine", "binds", "uid", "pid", "job", "signal", "rescan", "generation"]
    ops = ["ps", "kill", "status", "node", "job-join", "job-end", "nothing"]

    def fuzz() -> str:
        for _ in range(300):
            if chance.random() < 0.3:
                _say(daemon, chance.randbytes(chance.randrange(200)))
                continue
            fields = {chance.choice(keys): chance.choice(words) for _ in range(4)}
            fields["op"] = chance.choice([*ops, chance.choice(words)])
            _say(daemon, _frame(protocol.encode(fields).encode()))
        return "done"

    assert as_user(alice.uid, alice.gid, fuzz) == "'done'"
    assert daemon.answers()
    assert "Traceback" not in daemon.log.read_text()[before:]


def test_descriptors_that_nobody_asked_for_are_closed(daemon: Daemon) -> None:
    assert daemon.process is not None
    held = Path(f"/proc/{daemon.process.pid}/fd")
    before = len(list(held.iterdir()))
    for count in (1, 8, 200):
        with connect(daemon.socket) as sock, open("/dev/null", "rb") as null:
            rights = array.array("i", [null.fileno()] * count)
            sock.sendmsg(
                [_frame(b'{"op":"status"}')], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
            )
            assert b'"ok":false' in sock.recv(65536)
    wait_for(lambda: len(list(held.iterdir())) <= before, "descriptors are closed")


def test_one_user_cannot_exhaust_the_daemon(daemon: Daemon, alice: User, bob: User) -> None:
    """Alice holds as many silent connections as she gets; Bob is served, and she is told."""

    def hold() -> object:
        held = [connect(daemon.socket) for _ in range(80)]
        # The first 64 are waited for; the others are told to go, without saying a word.
        refused = [s.recv(4096) for s in held[-5:]]
        assert all(b"too many requests" in text for text in refused), refused
        return "held"

    def ask() -> object:
        return protocol.request("status", path=daemon.socket)[0]["ok"]

    ready, told = os.pipe()
    go, let_go = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setgroups([])
            os.setresgid(alice.gid, alice.gid, alice.gid)
            os.setresuid(alice.uid, alice.uid, alice.uid)
            hold()
            os.write(told, b"y")
        except BaseException as error:
            os.write(told, repr(error).encode()[:200])
        os.close(let_go)
        os.read(go, 1)
        os._exit(0)
    os.close(go)
    try:
        assert os.read(ready, 200) == b"y"
        assert as_user(bob.uid, bob.gid, ask) == "True"
    finally:
        os.close(let_go)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(told)
    wait_for(lambda: as_user(alice.uid, alice.gid, ask) == "True", "alice is served again")


def test_a_user_without_an_account_gets_nothing(daemon: Daemon) -> None:
    said = as_user(
        987654, 987654, lambda: protocol.request("join", env="default", path=daemon.socket)
    )
    assert "no account" in said


def test_a_second_daemon_takes_the_place_of_a_killed_one(daemon: Daemon) -> None:
    daemon.stop(9)
    with pytest.raises(protocol.Unavailable):
        protocol.request("status", path=daemon.socket)
    daemon.start()
    assert daemon.request("node")["masks"]


def test_a_socket_of_systemd_is_used(tmp_path: Path) -> None:
    """Socket activation: descriptor 3, LISTEN_FDS and LISTEN_PID."""
    path = str(tmp_path / "activated.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(8)
        code = (
            "import os,sys;os.dup2(int(sys.argv[1]),3);os.environ['LISTEN_FDS']='1';"
            "os.environ['LISTEN_PID']=str(os.getpid());"
            "os.execv(sys.executable,[sys.executable,'-m','sdee_launch.daemon','--state',"
            "sys.argv[2],'--socket','/nonexistent/none'])"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(listener.fileno()), str(tmp_path / "state")],
            pass_fds=[listener.fileno()], cwd="/",
        )  # fmt: skip
    try:
        assert protocol.request("status", path=path)[0]["pid"] == process.pid
    finally:
        process.terminate()
        process.wait(60)
