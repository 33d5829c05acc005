"""A day of two users on a node: real ssh, root inside, packages, files, terminals."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import User
from tests.env.daemon_lab import wait_for
from tests.env.login_lab import (
    LOGIN,
    Node,
    configuration,
    login_node,
    login_shell,
    running_sshd,
    terminal,
    the_scenario,
)
from tests.env.x11_lab import x11_is_forwarded


@pytest.fixture(scope="module")
def node(alice: User, bob: User) -> Iterator[Node]:
    with login_node("kernel", alice, bob) as made:
        yield made


def test_the_scenario(node: Node, alice: User, bob: User, tmp_path: Path) -> None:
    the_scenario(node, alice, bob, tmp_path, "kernelish")


def test_the_host_changes_under_the_user(node: Node, alice: User) -> None:
    path = Path("/usr/share/sdee-test-file")
    node.say(alice, "true")
    path.write_text("one\n")
    try:
        assert node.say(alice, f"cat {path}") == "one"
        path.write_text("two\n")
        wait_for(lambda: node.say(alice, f"cat {path}") == "two", "the change is seen", 20)
        assert node.say(alice, f"echo mine > {path}; cat {path}") == "mine"
        assert path.read_text() == "two\n"
    finally:
        path.unlink()
    assert node.say(alice, f"cat {path}; rm {path}") == "mine"


def test_exit_status_output_and_input(node: Node, alice: User) -> None:
    done = node.sshd.run(alice, "cat; echo err >&2; exit 7", input="typed\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, "typed\n", "err\n")
    assert node.sshd.run(alice, "kill -9 $$").returncode in (137, 255)
    data = os.urandom(300_000)
    back = subprocess.run(
        node.sshd.command(alice, "cat"), input=data, capture_output=True, timeout=60, check=True
    )
    assert back.stdout == data


def test_files_by_scp_sftp_and_rsync(node: Node, alice: User, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "one").write_bytes(os.urandom(100_000))
    (source / "two words").write_text("two\n")
    host, port = f"{alice.name}@127.0.0.1", str(node.sshd.port)
    options = node.sshd.options(alice)

    def run(words: list[str], input: str | None = None) -> None:
        done = subprocess.run(
            words, input=input, text=True, capture_output=True, timeout=120, check=False
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)

    for flags, name in (([], "scp-new"), (["-O"], "scp-old")):
        run(["scp", *flags, "-r", *options, "-P", port, str(source), f"{host}:/opt/{name}"])
        run(
            ["scp", *flags, "-r", *options, "-P", port, f"{host}:/opt/{name}", str(tmp_path / name)]
        )
    run(["sftp", *options, "-P", port, "-b", "-", host],
        f"mkdir /opt/by-sftp\nput {source}/one /opt/by-sftp/one\nget /opt/by-sftp/one {tmp_path}/sftp-one\n")  # fmt: skip
    shell = " ".join(["ssh", *options, "-p", port])
    run(["rsync", "-a", "-e", shell, f"{source}/", f"{host}:/opt/by-rsync/"])
    run(["rsync", "-a", "-e", shell, f"{host}:/opt/by-rsync/", f"{tmp_path}/by-rsync/"])
    for back in (tmp_path / "scp-new", tmp_path / "scp-old", tmp_path / "by-rsync"):
        assert (back / "one").read_bytes() == (source / "one").read_bytes()
        assert (back / "two words").read_text() == "two\n"
    assert (tmp_path / "sftp-one").read_bytes() == (source / "one").read_bytes()
    assert not Path("/opt/by-rsync").exists() and not Path("/opt/by-sftp").exists()
    node.say(alice, "rm -r /opt/by-sftp /opt/by-rsync /opt/scp-new /opt/scp-old")


def test_a_terminal(node: Node, alice: User) -> None:
    """Prompt, window size, job control, ^C, logout."""
    with terminal(node.sshd.command(alice, "-tt")) as screen:
        screen.expect("# ")
        screen.type("stty size; tty; echo login=$(shopt -q login_shell && echo yes)\n")
        screen.expect("/dev/pts/")
        screen.expect("login=yes")
        screen.type("sleep 1000\n")
        wait_for(lambda: "sleep 1000" in str(node.daemon.instances()), "sleep runs")
        screen.type("\x1a")
        screen.expect("Stopped")
        screen.type("jobs; kill %1; wait; echo sta''tus=$?\n")
        screen.expect("status=")
        screen.type("sleep 1001\n")
        wait_for(lambda: "sleep 1001" in str(node.daemon.instances()), "sleep runs")
        screen.type("\x03")
        screen.type("echo interr''upted=$?\n")
        screen.expect("interrupted=130")
        screen.type("exit 3\n")
        assert screen.wait() == 3
    wait_for(lambda: node.daemon.instances() == [], "the instance ends with its last session")


def test_hanging_up_ends_what_ran(node: Node, alice: User) -> None:
    with terminal(node.sshd.command(alice, "-tt")) as screen:
        screen.expect("# ")
        screen.type("sleep 2000\n")
        wait_for(lambda: "sleep 2000" in str(node.daemon.instances()), "sleep runs")
    wait_for(lambda: node.daemon.instances() == [], "all is gone after the connection broke")


def test_twenty_at_once(node: Node, alice: User, bob: User) -> None:
    """One instance, twenty sessions in it; and Bob beside."""
    node.end(alice)
    running = [
        subprocess.Popen(
            node.sshd.command(user, "echo start; readlink /proc/self/ns/pid; read x"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for user in [alice] * 18 + [bob] * 2
    ]  # fmt: skip
    try:
        seen = []
        for process in running:
            assert process.stdout is not None
            first = process.stdout.readline()
            assert first == "start\n", process.communicate(input="\n", timeout=60)
            seen.append(process.stdout.readline().strip())
        assert len(set(seen[:18])) == 1 and len(set(seen[18:])) == 1 and seen[0] != seen[19]
        assert len(node.daemon.instances()) == 2
        for process in running:
            process.communicate(input="\n", timeout=60)
            assert process.returncode == 0
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.communicate(timeout=60)
    wait_for(lambda: node.daemon.instances() == [], "they end with their last member")


def test_x11(node: Node, alice: User) -> None:
    x11_is_forwarded(node, alice)


def test_agent_and_variables(node: Node, alice: User, tmp_path: Path) -> None:
    """The agent answers inside, under the name that sshd gave it; variables survive."""
    agent = subprocess.Popen(
        ["ssh-agent", "-D", "-a", str(tmp_path / "agent")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    environ = {**os.environ, "SSH_AUTH_SOCK": str(tmp_path / "agent"), "LC_TIME": "C.UTF-8"}
    try:
        wait_for((tmp_path / "agent").exists, "the agent listens")
        key = node.sshd.directory / alice.name
        subprocess.run(["ssh-add", "-q", str(key)], env=environ, check=True, timeout=60, capture_output=True)  # fmt: skip
        command = node.sshd.command(
            alice, "-A", "-oSendEnv=LC_*", "-oSetEnv=SDEE_TEST_DISPLAY=host:10.0",
            "echo $SSH_AUTH_SOCK $LC_TIME; echo $SSH_CONNECTION; ssh-add -l; ssh-add -l; "
            "echo display $SDEE_TEST_DISPLAY",
        )  # fmt: skip
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
        assert done.stdout.count("ED25519") == 2, (done.stdout, done.stderr)
        assert "/agent." in done.stdout and "C.UTF-8" in done.stdout
        assert "127.0.0.1" in done.stdout and "display host:10.0" in done.stdout
    finally:
        agent.terminate()
        agent.wait(60)


def test_su_and_login(node: Node, alice: User) -> None:
    done = subprocess.run(
        ["su", "-", alice.name, "-c", "id -u; echo $HOME; cat /proc/1/comm"],
        capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.stdout.split()[:2] == ["0", str(alice.home)], done
    with terminal(["su", "-", alice.name]) as screen:
        screen.expect("# ")
        screen.type("id -u; exit 5\n")
        screen.expect("0")
        assert screen.wait() == 5
    with terminal(["login", "-f", alice.name]) as screen:
        screen.expect("# ")
        screen.type("echo ho''me=$HOME; exit\n")
        screen.expect(f"home={alice.home}")
        screen.wait()


def test_force_command(node: Node, alice: User, bob: User, tmp_path: Path) -> None:
    """A plain login shell in passwd, and sshd sends everybody inside; internal-sftp, too."""
    tmp_path.chmod(0o755)
    extra = f"Match User *\n    ForceCommand {LOGIN}\n"
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        os.chmod(name, 0o755)
        with login_shell("/bin/bash", alice), running_sshd(Path(name) / "s", alice, extra=extra) as sshd:  # fmt: skip
            config = Path(name) / "s/config"
            assert sshd.say(alice, "id -u; echo $SHELL; echo forced > /opt/forced").split() == [
                "0", "/bin/bash",
            ]  # fmt: skip
            assert not Path("/opt/forced").exists()
            with terminal(sshd.command(alice, "-tt")) as screen:
                screen.expect("# ")
                screen.type("exit 4\n")
                assert screen.wait() == 4
            for subsystem in ("/usr/lib/openssh/sftp-server", "internal-sftp"):
                config.write_text(
                    config.read_text().replace(
                        "Subsystem sftp /usr/lib/openssh/sftp-server", f"Subsystem sftp {subsystem}"
                    )
                )
                sshd.stop()
                sshd.process = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", str(config)], stderr=subprocess.DEVNULL)  # fmt: skip
                wait_for(sshd._answers, "sshd listens")
                done = subprocess.run(
                    ["sftp", *sshd.options(alice), "-P", str(sshd.port), "-b", "-", f"{alice.name}@127.0.0.1"],
                    input=f"get /opt/forced {name}/got\n", text=True, capture_output=True, timeout=60, check=False,
                )  # fmt: skip
                assert done.returncode == 0, done
                assert Path(f"{name}/got").read_text() == "forced\n"
                os.unlink(f"{name}/got")


@pytest.mark.parametrize("choice", ["shell", "deny"])
def test_when_the_environment_cannot_be_made(
    node: Node, alice: User, choice: str, tmp_path: Path
) -> None:
    """Told why, and a plain shell of the host, or nothing."""
    node.say(alice, "true")
    node.end(alice)
    with configuration(f'[environments]\nengine = "kernel"\n[login]\non_failure = "{choice}"\n'):
        blocked = _block(node, alice)
        try:
            done = node.sshd.run(alice, "id -u")
            assert "can't be entered" in done.stderr
            if choice == "shell":
                assert (done.returncode, done.stdout.strip()) == (0, str(alice.uid))
                assert node.say(alice, "@host id -u") == str(alice.uid)
            else:
                assert done.returncode == 254 and done.stdout == ""
                refused = node.sshd.run(alice, "@host id -u")
                assert refused.returncode == 254 and refused.stdout == ""
        finally:
            _unblock(blocked)
    assert node.say(alice, "id -u") == "0"


def _block(node: Node, alice: User) -> Path:
    """Put something in the way of the environment: its upper is no directory."""
    upper = node.upper(alice)
    upper.rename(upper.with_name("upper.kept"))
    upper.write_text("in the way")
    return upper


def _unblock(upper: Path) -> None:
    upper.unlink()
    upper.with_name("upper.kept").rename(upper)


def test_a_restart_of_the_daemon_leaves_sessions_alone(node: Node, alice: User) -> None:
    """Killed and started again: the session lives, a second one joins it, the end is noticed."""
    with terminal(node.sshd.command(alice, "-tt")) as screen:
        screen.expect("# ")
        screen.type("echo alive > /tmp/alive\n")
        for number in (15, 9):
            node.daemon.stop(number)
            screen.type("echo st''ill=$(cat /tmp/alive)\n")
            screen.expect("still=alive")
            node.daemon.start()
            assert [x["env"] for x in node.daemon.instances()] == ["default"]
            assert node.say(alice, "cat /tmp/alive") == "alive"
        screen.type("exit\n")
        screen.wait()
    wait_for(lambda: node.daemon.instances() == [], "the new daemon sees the end")


def test_an_instance_that_ended_while_no_daemon_ran(node: Node, alice: User) -> None:
    with terminal(node.sshd.command(alice, "-tt")) as screen:
        screen.expect("# ")
        node.daemon.stop(9)
        screen.type("exit\n")
        screen.wait()
    node.daemon.start()
    wait_for(lambda: node.daemon.instances() == [], "nothing is believed to live")
    assert node.say(alice, "id -u") == "0"


def test_the_init_killed(node: Node, alice: User) -> None:
    """Every process and mount of the instance is gone, and the next login works."""
    with terminal(node.sshd.command(alice, "-tt")) as screen:
        screen.expect("# ")
        screen.type("sleep 3000 & sleep 3001\n")
        wait_for(lambda: "sleep 3001" in str(node.daemon.instances()), "they run")
        (instance,) = node.daemon.instances()
        assert isinstance(instance["processes"], list)
        pids = [p["pid"] for p in instance["processes"]]
        assert isinstance(instance["init"], int)
        os.kill(instance["init"], 9)
        screen.wait()
    for pid in pids:
        wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists(), f"{pid} is gone")  # type: ignore[misc]
    wait_for(lambda: node.daemon.instances() == [], "the daemon knows")
    assert node.say(alice, "id -u") == "0"


def test_this_python_is_for_all() -> None:
    """The tests' Python must be one that users can run: scripts/test sees to it."""
    assert os.stat(os.path.realpath(sys.executable)).st_mode & 0o005 == 0o005
    assert not sys.executable.startswith("/root")
