"""The life of instances: members, ends, crashes of each part, many at once."""

from __future__ import annotations

import fcntl
import io
import os
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import User
from tests.env.daemon_lab import wait_for
from tests.env.instance_lab import KINDS, SECONDS, Lab, laboratory, processes_of
from tests.env.login_lab import build_deb


@pytest.fixture(scope="module", params=KINDS)
def lab(request: pytest.FixtureRequest, alice: User) -> Iterator[Lab]:
    with laboratory(request.param, alice) as made:
        yield made


def _servers(lab: Lab, env: str) -> list[int]:
    for one in lab.instances():
        if one["env"] == env and one.get("servers"):
            return [int(p) for p in one["servers"]]
    return []


def test_a_second_session_joins_the_first(lab: Lab) -> None:
    with lab.member("two") as first:
        assert first.poll() is None
        lab.say("echo shared > /tmp/of-both", env="two")
        with lab.member("two"):
            init = lab.init("two")
            assert lab.say("cat /tmp/of-both; pgrep -c cat", env="two") == "shared\n2"
            assert lab.init("two") == init
        assert lab.say("pgrep -c cat", env="two") == "1"
    lab.wait_gone("two")
    assert lab.say("ls /tmp", env="two") == ""


def test_it_ends_with_its_last_member(lab: Lab) -> None:
    said = lab.say("setsid sleep 2001 >/dev/null 2>&1 & setsid nohup sleep 2001 >/dev/null 2>&1 & echo on", env="ends")  # fmt: skip
    assert said == "on"
    lab.wait_gone("ends")
    wait_for(lambda: not processes_of(lab.user, "sleep 2001"), "what it left is gone", SECONDS)
    # Nothing of an instance is ever mounted where the host sees it.
    assert str(lab.user.home).encode() not in Path("/proc/self/mountinfo").read_bytes()


def test_killing_the_init_ends_everything(lab: Lab) -> None:
    with lab.member("init") as process:
        lab.say("setsid sleep 2002 >/dev/null 2>&1 & echo upper > /etc/of-init", env="init")
        os.kill(lab.init("init"), signal.SIGKILL)
        assert process.wait(SECONDS) == 128 + 9
    wait_for(lambda: not processes_of(lab.user, "sleep 2002"), "all is gone", SECONDS)
    assert lab.say("cat /etc/of-init", env="init") == "upper"


def test_a_killed_client_takes_its_command_along(lab: Lab) -> None:
    process = lab.start("run", "--env", "client", "--", "sh", "-c", "echo here; sleep 2003; :")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.kill()
        process.wait(SECONDS)
        lab.wait_gone("client")
        wait_for(lambda: not processes_of(lab.user, "sleep 2003"), "the command is gone", SECONDS)
    finally:
        process.kill()
        process.communicate()
    assert lab.run("true", env="client").returncode == 0


def test_a_killed_file_server_ends_the_instance(lab: Lab) -> None:
    if lab.engine != "fuse":
        return  # the kernel engine has none
    with lab.member("server") as process:
        lab.say("echo kept > /etc/of-server", env="server")
        servers = [int(p) for one in _records(lab, "server") for p in one]
        assert servers
        for pid in servers:
            os.kill(pid, signal.SIGKILL)
        assert process.wait(SECONDS) != 0
    lab.wait_gone("server")
    assert lab.say("cat /etc/of-server", env="server") == "kept"


def _records(lab: Lab, env: str) -> list[list[int]]:
    """The servers of an instance, from whoever knows them."""
    if lab.daemon is None:
        return [_servers(lab, env)]
    import json

    found = []
    for path in Path(lab.daemon.state, "instances", str(lab.user.uid)).glob("*.json"):
        record = json.loads(path.read_text())
        if record["environment"] == env:
            found.append([int(p["pid"]) for p in record["servers"]])
    return found


def test_a_server_is_gone_with_its_instance(lab: Lab) -> None:
    with lab.member("gone"):
        servers = [int(p) for one in _records(lab, "gone") for p in one]
        assert bool(servers) == (lab.engine == "fuse")
    lab.wait_gone("gone")
    for pid in servers:
        wait_for(lambda: _ended(pid), "the server is gone", SECONDS)  # noqa: B023


def _ended(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] in "ZX"
    except OSError:
        return True


def test_sdee_kill(lab: Lab) -> None:
    with lab.member("killed") as process:
        listed = lab.sdee("ps")
        assert "killed: engine" in listed.stdout and " cat" in listed.stdout
        one = next(i for i in lab.instances() if i["env"] == "killed")
        cat = next(p["pid"] for p in one["processes"] if p["command"] == "cat")
        done = lab.sdee("kill", "killed", "--pid", str(cat), "--signal", "USR1")
        assert done.returncode == 0, done.stderr
        assert process.wait(SECONDS) == 128 + signal.SIGUSR1
    lab.wait_gone("killed")
    with lab.member("killed") as process:
        assert lab.sdee("kill", "killed").returncode == 0
        assert process.wait(SECONDS) == 128 + 9
    done = lab.sdee("kill", "killed")
    assert done.returncode == 1 and "not alive" in done.stderr


def test_many_commands_at_once(lab: Lab) -> None:
    count = 20 if lab.mode == "site" else 8
    started = [
        lab.start("run", "--env", "many", "--", "sh", "-c", f"echo {n} >> /etc/many; echo {n}")
        for n in range(count)
    ]
    for number, process in enumerate(started):
        out, err = process.communicate(timeout=SECONDS)
        assert (process.returncode, out) == (0, f"{number}\n"), err
    said = lab.say("sort -n /etc/many", env="many")
    assert said.split() == [str(n) for n in range(count)]


def test_one_after_the_other_without_a_pause(lab: Lab) -> None:
    """Each finds the last one's instance alive, just ending, or gone: all of it works."""
    for number in range(25 if lab.engine == "kernel" else 8):
        assert lab.run("sh", "-c", f"exit {number}", env="rows").returncode == number


def test_one_that_comes_while_the_instance_ends(lab: Lab) -> None:
    """All that /proc has of its init is root's by then: it isn't taken for another account's."""
    if lab.mode != "rootless":
        return  # the daemon may look at everybody's
    with lab.member("late") as first, open(lab.store() / "late" / "lock") as lock:
        init = lab.init("late")
        # Only it can reap the command, without which the init of a PID namespace doesn't end.
        first.send_signal(signal.SIGSTOP)
        os.kill(init, signal.SIGKILL)
        fcntl.flock(lock, fcntl.LOCK_EX)  # as one has it who is about to make a new instance
        second = lab.start("run", "--env", "late", "echo", "new")
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                second.wait(2)
            assert not _ended(init)
            first.send_signal(signal.SIGCONT)
            assert first.wait(SECONDS) == 128 + 9
            fcntl.flock(lock, fcntl.LOCK_UN)
            out, err = second.communicate(timeout=SECONDS)
            assert (second.returncode, out) == (0, "new\n"), err
        finally:
            first.send_signal(signal.SIGCONT)
            second.kill()
            second.communicate()


def test_another_engine_finds_the_same_upper(lab: Lab) -> None:
    if lab.mode != "site":
        return  # rootless there is only one
    other = {"kernel": "fuse", "fuse": "kernel"}[lab.engine]

    def with_engine(engine: str, script: str) -> str:
        done = lab.sdee("run", "--env", "both", "--engine", engine, "--", "sh", "-c", script)
        assert done.returncode == 0, done.stderr
        lab.wait_gone("both")
        return done.stdout.strip()

    with_engine(
        lab.engine,
        "echo x >> /etc/login.defs; rm /etc/issue.net; rm -r /srv; mkdir /srv; touch /srv/new;"
        " ln /etc/login.defs /etc/other-name; chown 33:44 /srv/new; rm -rf /usr/share/doc/adduser",
    )
    look = (
        "tail -1 /etc/login.defs; ls /etc/issue.net 2>&1 | grep -c such; ls -An /srv | tail -1 |"
        " cut -d' ' -f3,4; stat -c %h /etc/other-name; ls -d /usr/share/doc/adduser 2>&1 | grep -c such"
    )
    expected = with_engine(lab.engine, look)
    assert with_engine(other, look) == expected
    with_engine(other, "echo y >> /etc/login.defs; touch /etc/issue.net; rm /srv/new")
    last = "tail -2 /etc/login.defs; ls -s /etc/issue.net; ls -A /srv"
    assert with_engine(lab.engine, last) == with_engine(other, last)


def test_alive_with_another_engine_or_binds(lab: Lab) -> None:
    with lab.member("fits"):
        other = {"kernel": "fuse", "fuse": "kernel"}[lab.engine]
        done = lab.sdee("run", "--env", "fits", "--engine", other, "true")
        assert done.returncode == 1 and "sdee kill fits" in done.stderr
        done = lab.sdee("run", "--env", "fits", "--bind", "/usr:/opt/usr", "true")
        assert done.returncode == 1 and "other binds" in done.stderr


def test_kernel_engine_without_a_daemon_says_why(alice: User) -> None:
    with laboratory("rootless-fuse", alice) as made:
        done = made.sdee("run", "--engine", "kernel", "true")
        assert done.returncode == 1
        assert "host root's" in done.stderr and "--engine fuse" in done.stderr


def _apt_and_tar_do_without(made: Lab, tmp_path: Path) -> None:
    package = build_deb(tmp_path, "of-one-id").read_bytes()
    foreign = io.BytesIO()
    with tarfile.open(fileobj=foreign, mode="w") as archive:
        info = tarfile.TarInfo("of-another")
        info.uid = info.gid = 33
        archive.addfile(info)
    for name, data in (("of-one.deb", package), ("of-one.tar", foreign.getvalue())):
        (made.user.home / name).write_bytes(data)
    try:
        said = made.say(
            "cd; apt-get install -y ./of-one.deb > /dev/null; of-one-id;"
            " tar -C /opt -xf of-one.tar; stat -c %u /opt/of-another"
        )
        assert said.split("\n") == ["of-one-id runs", "0"]
    finally:
        for name in ("of-one.deb", "of-one.tar"):
            (made.user.home / name).unlink()


def test_no_subordinate_ids(bob: User, tmp_path: Path) -> None:
    """One id is enough to be root and to change the host's files; there are no others then."""
    kept = {path: Path(path).read_text() for path in ("/etc/subuid", "/etc/subgid")}
    for path, text in kept.items():
        lines = [x for x in text.splitlines(True) if not x.startswith(f"{bob.name}:")]
        Path(path).write_text("".join(lines))
    try:
        with laboratory("rootless-fuse", bob) as made:
            said = made.say(
                "id -u; touch /etc/of-one; chmod 640 /etc/of-one; stat -c %a /etc/of-one;"
                " echo '# x' >> /etc/login.defs; tail -1 /etc/login.defs; stat -c %u /etc/login.defs"
            )
            assert said.split("\n") == ["0", "640", "# x", "0"]
            assert made.say("stat -c %a /etc/of-one; tail -1 /etc/login.defs") == "640\n# x"
            assert (made.upper() / "etc/of-one").stat().st_uid == bob.uid
            assert made.run("chown", "33", "/etc/of-one").returncode == 1
            _apt_and_tar_do_without(made, tmp_path)
            doctor = made.sdee("doctor").stdout
            assert "root is the only one" in doctor and "usermod --add-subuids" in doctor
            terminal, far_end = os.openpty()
            try:
                made.sdee("run", "--env", "told", "--", "true", stderr=far_end)
                assert b"chown to others fails" in os.read(terminal, 1000)
            finally:
                os.close(far_end)
                os.close(terminal)
    finally:
        for path, text in kept.items():
            Path(path).write_text(text)


def test_status_and_doctor(lab: Lab) -> None:
    done = lab.sdee("status")
    assert done.returncode == 0 and ("rootless" in done.stdout) == (lab.mode == "rootless")
    done = lab.sdee("doctor", stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    assert "rootless mode: fuse" in done.stdout
    switch = Path("/proc/sys/kernel/sched_autogroup_enabled")
    grouped = switch.exists() and switch.read_text() != "0\n"
    assert ("sched_autogroup_enabled=0" in done.stdout) == grouped
