"""Attacks that use the host's side: the owner's rights there, another user, the daemon's work."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdee_launch import protocol
from tests.conftest import User
from tests.env.daemon_lab import as_user
from tests.env.login_lab import SDEE, Node, login_node


@pytest.fixture(scope="module", params=["kernel", "fuse"])
def node(request: pytest.FixtureRequest, alice: User, bob: User) -> Iterator[Node]:
    with login_node(request.param, alice, bob) as made:
        made.say(alice, "true")
        yield made


def test_the_owner_joins_by_hand_with_every_capability(node: Node, alice: User) -> None:
    """An owner can always enter, and take away what is mounted inside: secrets must stay."""
    with node.secret("/secret-of-root") as text, node.sleeping(alice) as pid:
        node.rescan_for(alice)
        script = (
            "umount -l /proc; umount -l /tmp; umount -l /run; umount -l /dev/shm; umount -l /root; "
            "umount -l /home; umount -a -l; cat /etc/shadow /secret-of-root /etc/ssh/*_key; "
            "cat /etc/munge/munge.key | od -c; ls -la /root /tmp /home/* /run; "
            "mount -o remount,bind /; mknod /opt/d b 254 0; cat /opt/d; ls /proc/1/root/../"
        )
        done = node.as_host(
            alice,
            ["nsenter", "--target", str(pid), "--user", "--mount", "--setuid", "0", "--setgid", "0",
             "sh", "-c", script],
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert text not in said
        assert "PRIVATE KEY" not in said
        for field in _hashes():
            assert field not in said
    node.end(alice)


def _hashes() -> list[str]:
    fields = [line.split(":")[1] for line in Path("/etc/shadow").read_text().splitlines()]
    return [field for field in fields if field.startswith("$")]


def test_a_setuid_program_planted_inside(node: Node, alice: User, bob: User) -> None:
    """Setuid root inside is setuid alice on disk, and nobody else gets there."""
    node.say(alice, "cp /bin/sh /opt/rootsh && chmod 6755 /opt/rootsh && chown 0:0 /opt/rootsh && chmod 6755 /opt/rootsh && cp /opt/rootsh /opt/binsh && chown 2:2 /opt/binsh && chmod 4755 /opt/binsh")  # fmt: skip
    planted = node.upper(alice) / "opt/rootsh"
    assert planted.stat().st_uid == alice.uid
    for path in (planted, node.upper(alice) / "opt/binsh"):
        assert path.stat().st_uid not in (0, 1, 2)
        done = node.as_host(alice, [str(path), "-p", "-c", "id -u; cat /etc/shadow"])
        assert done.stdout.strip() in ("", str(alice.uid), str(path.stat().st_uid))
        assert node.as_host(bob, [str(path), "-p", "-c", "id"]).returncode != 0
        assert node.as_host(bob, ["ls", str(path)]).returncode != 0


def test_descriptors_smuggled_out(node: Node, alice: User) -> None:
    """A descriptor of the inside's root gives a process outside nothing that it couldn't read."""
    with (
        node.secret("/secret-of-root") as text,
        tempfile.TemporaryDirectory(dir=alice.home) as home,
    ):
        node.rescan_for(alice)
        os.chmod(home, 0o777)
        path = f"{home}/s"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(path)
            os.chmod(path, 0o777)
            listener.listen(1)
            code = (
                "import os,socket\n"
                f"s=socket.socket(socket.AF_UNIX);s.connect({path!r})\n"
                "socket.send_fds(s,[b'x'],[os.open('/',os.O_RDONLY),os.open('/opt',os.O_RDONLY)])\n"
                "s.recv(1)\n"
            )
            node.say(alice, "cp /bin/sh /opt/rootsh; chmod 6755 /opt/rootsh")
            process = subprocess.Popen(
                node.sshd.command(alice, "python3 -"), stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            try:
                assert process.stdin is not None
                process.stdin.write(code.encode())
                process.stdin.close()
                listener.settimeout(60)
                peer, _ = listener.accept()
                with peer:
                    _, fds, _, _ = socket.recv_fds(peer, 1, 4)
                    assert len(fds) == 2

                    def use() -> object:
                        found = []
                        for name in ("secret-of-root", "etc/shadow", "etc/ssh/ssh_host_rsa_key"):
                            try:
                                fd = os.open(name, os.O_RDONLY, dir_fd=fds[0])
                                found.append(os.read(fd, 100000).decode())
                            except OSError:
                                continue
                        child = os.fork()
                        if not child:
                            os.fchdir(fds[1])
                            os.execv("./rootsh", ["sh", "-p", "-c", f"id -u > {home}/id"])
                        os.waitpid(child, 0)
                        return found

                    said = as_user(alice.uid, alice.gid, use)
                for fd in fds:
                    os.close(fd)
            finally:
                process.wait(60)
        assert text not in said and not any(x in said for x in _hashes())
        assert "PRIVATE KEY" not in said
        if os.path.exists(f"{home}/id"):
            assert Path(f"{home}/id").read_text().strip() == str(alice.uid)


def test_descriptors_smuggled_in(node: Node, alice: User) -> None:
    """The host's / handed inside: the capabilities of env-root reach nothing of host-root's."""
    with node.secret("/secret-of-root") as text, node.sleeping(alice) as pid:

        def enter() -> object:
            fd = os.open("/", os.O_RDONLY)
            os.set_inheritable(fd, True)
            return subprocess.run(
                ["nsenter", "--target", str(pid), "--user", "--mount", "--pid", "--setuid", "0",
                 "--setgid", "0", "sh", "-c",
                 f"cd /proc/self/fd/{fd} && cat secret-of-root etc/shadow; "
                 f"echo x > etc/planted; chown 0 etc/passwd; rm -f etc/hostname"],
                pass_fds=[fd], capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip

        said = as_user(alice.uid, alice.gid, enter)
        assert text not in said
        assert not any(x in said for x in _hashes())
    assert not Path("/etc/planted").exists()
    assert Path("/etc/hostname").exists() and Path("/etc/passwd").stat().st_uid == 0


def test_crafted_xattrs_in_upper(node: Node, alice: User) -> None:
    """The owner writes overlayfs's own attributes, to see by them what is hidden."""
    with node.secret("/secret-of-root") as text:
        node.rescan_for(alice)
        node.say(alice, "mkdir -p /opt/crafted/a /opt/crafted/b && echo x > /opt/crafted/f")
        node.end(alice)
        upper = node.upper(alice)

        def craft() -> object:
            for name, value in (("redirect", b"/root"), ("redirect", b"/etc/ssh")):
                os.setxattr(upper / "opt/crafted/a", f"user.overlay.{name}", value)
            os.setxattr(upper / "opt/crafted/b", "user.overlay.redirect", b"../../../root")
            for name, value in (
                ("redirect", b"/secret-of-root"), ("metacopy", b""), ("origin", b"\0" * 29),
                ("protattr", b"x"), ("upper", b"x"),
            ):  # fmt: skip
                os.setxattr(upper / "opt/crafted/f", f"user.overlay.{name}", value)
            for name in ("trusted.overlay.redirect", "security.capability"):
                try:
                    os.setxattr(upper / "opt/crafted/f", name, b"/root")
                except OSError:
                    continue
                return f"{name} could be set"
            return "crafted"

        assert as_user(alice.uid, alice.gid, craft) == "'crafted'"
        done = node.sshd.run(
            alice, "cd /opt/crafted; ls -laR; cat f; cat a/*key; cat b/*; cat a/../f; true"
        )
        said = done.stdout + done.stderr
        assert text not in said and "PRIVATE KEY" not in said
    node.end(alice)
    node.as_host(alice, ["rm", "-rf", str(upper / "opt/crafted")])
    assert node.say(alice, "id -u") == "0"


def test_a_symlink_swapped_under_the_daemon(node: Node, alice: User, bob: User) -> None:
    """The environment's own directory keeps becoming a link to somebody else's while it is made."""
    node.end(alice)
    place = node.upper(alice)
    target = bob.home / "target"
    target.mkdir(exist_ok=True)
    os.chown(target, bob.uid, bob.gid)
    stop = threading.Event()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setresgid(alice.gid, alice.gid, alice.gid)
            os.setresuid(alice.uid, alice.uid, alice.uid)
            end = time.monotonic() + 90
            while time.monotonic() < end:
                for here in (place, place.parent):
                    away = here.with_name(here.name + ".away")
                    try:
                        os.rename(here, away)
                        os.symlink(target, here)
                        time.sleep(0.003)
                        os.unlink(here)
                        os.rename(away, here)
                    except OSError:
                        time.sleep(0.01)
        finally:
            os._exit(0)
    try:
        for _ in range(6):
            node.sshd.run(alice, "echo planted > /planted; cat /etc/hostname")
            node.end(alice)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        stop.set()
        _put_back(place)
    assert list(target.iterdir()) == []
    target.rmdir()
    node.say(alice, "true")


def _put_back(place: Path) -> None:
    for here in (place.parent, place):
        away = here.with_name(here.name + ".away")
        if here.is_symlink():
            here.unlink()
        if away.exists() and not here.exists():
            away.rename(here)


def test_another_user_sees_and_reaches_nothing(node: Node, alice: User, bob: User) -> None:
    """Files, /tmp, shared memory, environments, processes; by name and by the daemon."""
    node.say(alice, "echo hers > /opt/hers; echo hers > /tmp/hers; echo hers > /dev/shm/hers")
    for path in ("/opt/hers", "/tmp/hers", "/dev/shm/hers"):
        assert not Path(path).exists()
        assert node.sshd.run(bob, f"ls {path}").returncode != 0
    assert node.as_host(bob, ["ls", str(node.upper(alice))]).returncode != 0
    assert node.sshd.run(bob, f"ls {alice.home}/ {node.upper(alice)}").returncode != 0
    with node.sleeping(alice) as pid:
        processes = node.say(bob, "ps -ef")
        assert alice.name not in processes
        assert node.sshd.run(bob, f"kill -9 {pid}").returncode != 0
        assert node.as_host(bob, ["kill", "-9", str(pid)]).returncode != 0

        def ask() -> object:
            answers = [protocol.request("ps", path=node.daemon.socket)[0]["instances"]]
            for fields in ({"env": "default", "uid": alice.uid}, {"env": "default", "pid": pid}):
                try:
                    answers.append(protocol.request("kill", path=node.daemon.socket, **fields))
                except protocol.Refused as error:
                    answers.append(error.kind)
            return answers

        node.end(bob)
        assert as_user(bob.uid, bob.gid, ask) == "[[], 'denied', 'missing']"
        assert Path(f"/proc/{pid}").exists()
    done = node.as_host(bob, [SDEE, "ps"])
    assert alice.name not in done.stdout
