"""The public function: a server whose mount is handed over, and ends when nobody has it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mount_helpers import syscalls
from sdeefs import refusals
from sdeefs.public import (
    Options,
    Refused,
    Server,
    parse,
    receive_server,
    run_server,
    start_server,
)
from tests.sdeefs.conftest import Lab, alive, wait_until


@pytest.fixture
def options(lab: Lab) -> Options:
    lab.work.mkdir()
    return parse([f"lowerdir={lab.lower},upperdir={lab.upper},workdir={lab.work},allow_other"])


@contextmanager
def running(server: Server) -> Iterator[Server]:
    try:
        yield server
    finally:
        server.stop()
        assert not alive(server.pid)


def forked(options: Options) -> tuple[socket.socket, int]:
    """A server in a fork of this process: the channel that its mount comes by, and its pid."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if not pid:
        status = 70
        try:
            ours.close()
            status = run_server(options, theirs)
        finally:
            os._exit(status)
    theirs.close()
    return ours, pid


def inside(server: Server, name: str) -> str:
    return f"/proc/self/fd/{server.mount_fd}/{name}"


def test_a_mount_that_is_attached_nowhere(lab: Lab, options: Options) -> None:
    with running(start_server(options)) as server:
        assert f" 0:{server.minor} " not in Path("/proc/self/mountinfo").read_text()
        fd = os.open("file", os.O_RDONLY, dir_fd=server.mount_fd)
        assert os.read(fd, 100) == b"of lower\n"
        os.close(fd)
        os.mkdir("new", dir_fd=server.mount_fd)
        assert os.stat(".", dir_fd=server.mount_fd).st_dev == os.makedev(0, server.minor)
    assert (lab.upper / "new").is_dir()


def test_a_busy_machine_does_not_starve_it(options: Options) -> None:
    group = Path("/proc/self/autogroup")
    if not group.exists():
        pytest.skip("needs a kernel with CONFIG_SCHED_AUTOGROUP")
    mine = group.read_text()
    with running(start_server(options)) as server:
        assert Path(f"/proc/{server.pid}/autogroup").read_text().endswith(" nice -10\n")
    assert group.read_text() == mine


def test_attached_and_ended_by_umount(lab: Lab, options: Options) -> None:
    server = start_server(options)
    try:
        server.attach(str(lab.merged))
        server.release()
        assert (lab.merged / "file").read_text() == "of lower\n"
        assert not server.ended(0.2)
        syscalls.umount2(str(lab.merged), syscalls.MNT_DETACH)
        assert server.ended(30)
    finally:
        server.stop()
    assert server.ended()


def test_the_server_ends_with_the_last_descriptor(options: Options) -> None:
    server = start_server(options)
    server.release()
    assert server.ended(30)


def test_a_server_in_use_is_stopped(lab: Lab, options: Options) -> None:
    server = start_server(options)
    fd = os.open("file", os.O_RDONLY, dir_fd=server.mount_fd)
    server.flush()
    server.stop()
    assert not alive(server.pid)
    os.close(fd)
    # Its layers are free again.
    start_server(options).stop()


def test_a_server_that_hangs_is_aborted(options: Options) -> None:
    server = start_server(options)
    os.kill(server.pid, 19)
    fd = os.open("/", os.O_PATH)
    os.close(fd)
    server.abort()
    assert not alive(server.pid)


def test_refusals_reach_the_caller(
    lab: Lab, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How long an ending server is waited for.
    monkeypatch.setattr(refusals.lock_layers, "__defaults__", (0.5,))
    fds = [os.open(path, os.O_PATH) for path in (lab.lower, lab.upper, lab.work)]
    words = zip(("lowerdir", "upperdir", "workdir"), fds, strict=True)
    again = parse([",".join(f"{word}=/proc/self/fd/{fd}" for word, fd in words)])
    named = f"upper {lab.upper} is in use: process [0-9]+, which serves another mount namespace"
    with running(start_server(options)):
        ours, pid = forked(again)
        with ours, pytest.raises(Refused, match=named):
            receive_server(ours, pid)
        os.waitpid(pid, 0)
    for fd in fds:
        os.close(fd)
    absent = parse([f"lowerdir={lab.place}/absent"])
    with pytest.raises(Refused, match="absent"):
        start_server(absent)


def test_layers_by_descriptor(lab: Lab) -> None:
    fd = os.open(lab.lower, os.O_PATH)
    try:
        options = parse([f"lowerdir=/proc/self/fd/{fd}"])
        with running(start_server(options, pass_fds=[fd])) as server:
            assert sorted(os.listdir(inside(server, "."))) == ["dir", "file"]
            with pytest.raises(OSError, match="Read-only"):
                os.mkdir("new", dir_fd=server.mount_fd)
    finally:
        os.close(fd)


def test_in_a_fork_of_a_warm_process(lab: Lab, options: Options) -> None:
    ours, pid = forked(options)
    with ours, running(receive_server(ours, pid)) as server:
        assert Path(inside(server, "file")).read_text() == "of lower\n"


def test_nobody_takes_the_mount(options: Options) -> None:
    """The caller dies before the mount is handed over: nothing stays."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()
    pid = os.fork()
    if not pid:
        status = 70
        try:
            status = run_server(options, theirs)
        finally:
            os._exit(status)
    theirs.close()
    wait_until(lambda: not alive(pid), "the end of a server that nobody wants")
    os.waitpid(pid, 0)
