"""What a user is and can in an instance, in each mode and with each engine."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import User
from tests.env.instance_lab import KINDS, Lab, laboratory


@pytest.fixture(scope="module", params=KINDS)
def lab(request: pytest.FixtureRequest, alice: User) -> Iterator[Lab]:
    with laboratory(request.param, alice) as made:
        yield made


def test_root_with_the_own_processes_only(lab: Lab) -> None:
    assert lab.say("id -u; id -g; id -un") == "0\n0\nroot"
    said = lab.say("ps -eo pid=,args=").splitlines()
    assert said[0].split() == ["1", "sdee-init", "lab"]
    assert all("sdee-init" in x or "ps -eo" in x or "sh -c" in x for x in said), said
    assert lab.say("cat /proc/1/comm") == "sdee-init"


def test_the_engine_is_the_one_that_was_asked_for(lab: Lab) -> None:
    fstype = lab.say("stat -f -c %T / ; findmnt -n -o FSTYPE /").splitlines()
    assert fstype[1] == ("overlay" if lab.engine == "kernel" else "fuse.sdeefs")


def test_home_user_and_shell_stay(lab: Lab) -> None:
    said = lab.say("echo $HOME $USER $SHELL; pwd; echo $SDEE_ENVIRONMENT", cwd=lab.user.home)
    assert said.splitlines() == [
        f"{lab.user.home} {lab.user.name} /bin/bash", str(lab.user.home), "lab",
    ]  # fmt: skip


def test_files_in_home_are_the_hosts(lab: Lab) -> None:
    lab.say("echo mine > $HOME/from-inside; stat -c %u $HOME/from-inside")
    file = lab.user.home / "from-inside"
    assert file.read_text() == "mine\n"
    assert file.stat().st_uid == lab.user.uid
    assert file.stat().st_gid == lab.user.gid
    file.unlink()


def test_host_files_change_for_the_user_only(lab: Lab) -> None:
    before = Path("/etc/login.defs").read_bytes()
    said = lab.say(
        "echo '# changed' >> /etc/login.defs; tail -1 /etc/login.defs; echo new > /usr/share/new-of-lab;"
        " rm /etc/issue.net; ls /etc/issue.net 2>&1; mv /usr/share/new-of-lab /opt/; cat /opt/new-of-lab"
    )
    assert said.splitlines()[0] == "# changed"
    assert "No such file" in said and said.endswith("new")
    assert Path("/etc/login.defs").read_bytes() == before
    assert Path("/etc/issue.net").exists()
    assert not Path("/opt/new-of-lab").exists()
    # ... and it lasts
    assert lab.say("tail -1 /etc/login.defs; cat /opt/new-of-lab") == "# changed\nnew"
    assert (lab.upper() / "etc/login.defs").stat().st_uid == lab.user.uid


def test_all_ids_work(lab: Lab) -> None:
    said = lab.say(
        "touch /srv/f; for id in 1 33 1000 65534; do chown $id:$id /srv/f; stat -c %u:%g /srv/f; done;"
        " su nobody -s /bin/sh -c 'id -un; cat /root/x 2>&1; touch /etc/x 2>&1';"
        " touch /srv/n && chown nobody /srv/n; chmod 600 /srv/n; su nobody -s /bin/sh -c 'echo w > /srv/n';"
        " cat /srv/n; rm /srv/f /srv/n"
    ).splitlines()
    assert said[:5] == ["1:1", "33:33", "1000:1000", "65534:65534", "nobody"]
    assert "Permission denied" in said[5] and "Permission denied" in said[6]
    assert said[7] == "w"


def test_setuid_programs_work_inside(lab: Lab) -> None:
    said = lab.say(
        "cp /usr/bin/id /usr/local/bin/suid-id; chmod 4755 /usr/local/bin/suid-id;"
        " su nobody -s /bin/sh -c '/usr/local/bin/suid-id -u'; rm /usr/local/bin/suid-id"
    )
    assert said == "0"


def test_file_capabilities_are_kept(lab: Lab) -> None:
    said = lab.say(
        "cp /bin/true /srv/t; setcap cap_net_raw+ep /srv/t; getcap /srv/t; rm /srv/t", env="lab"
    )
    assert "cap_net_raw=ep" in said


def test_private_places(lab: Lab) -> None:
    token = f"of-the-host-{os.getpid()}"
    made = [Path(f"/tmp/{token}"), Path(f"/dev/shm/{token}")]
    for path in made:
        path.write_text("x")
    try:
        for place in ("/tmp", "/dev/shm", "/run"):
            assert token not in lab.say(f"ls -a {place}")
            assert lab.say(f"echo y > {place}/mine; cat {place}/mine") == "y"
        for place in ("/tmp", "/dev/shm"):
            assert not Path(place, "mine").exists()
            mode = int(lab.say(f"stat -c %a {place}"), 8)
            assert mode == 0o1777
        # They are the instance's: gone with it.
        assert lab.say("ls /tmp") == ""
    finally:
        for path in made:
            path.unlink()


def test_homes_of_others_are_hidden(lab: Lab, bob: User) -> None:
    assert bob.home.exists()
    homes = lab.say("ls /home").split()
    assert lab.user.home.name in homes
    assert bob.home.name not in homes
    assert lab.say("ls -A /root; stat -c '%u %a' /root") == "0 700"
    # What packages make there stays.
    lab.say("mkdir /home/made; touch /root/kept")
    assert lab.say("ls -d /home/made /root/kept") == "/home/made\n/root/kept"
    assert not Path("/home/made").exists()
    lab.say("rmdir /home/made; rm /root/kept")


def test_the_host_changes_under_the_users_feet(lab: Lab) -> None:
    path = Path(f"/usr/share/sdee-lab-{os.getpid()}")
    try:
        with lab.member() as process:
            assert process.poll() is None
            path.write_text("one")
            deadline = 'for i in $(seq 200); do [ "$(cat {0} 2>/dev/null)" = {1} ] && exit 0; sleep 0.1; done; exit 1'
            lab.say(deadline.format(path, "one"))
            path.write_text("two")
            lab.say(deadline.format(path, "two"))
    finally:
        path.unlink()


def test_secrets_cannot_be_read(lab: Lab) -> None:
    hashes = [x.split(":")[1] for x in Path("/etc/shadow").read_text().splitlines()]
    shadow = lab.say("cat /etc/shadow")
    assert shadow.splitlines()[0].startswith("root:*:")
    assert not any(len(h) > 2 and h in shadow for h in hashes)
    secret = Path(f"/etc/sdee-secret-{os.getpid()}")
    secret.touch(0o600)
    secret.write_text("secret")
    try:
        if lab.daemon is not None:
            lab.daemon.request("node", rescan=True)
            lab.sdee("kill", "lab")
        for attempt in ("cat {0}", "cp {0} /tmp/x; cat /tmp/x", "ln {0} /etc/l; cat /etc/l",
                        "chmod 666 {0}; cat {0}", "mv {0} /etc/m; cat /etc/m"):  # fmt: skip
            away = f"; rm -f /etc/l /etc/m {secret}"
            done = lab.run("sh", "-c", attempt.format(secret) + away)
            assert "secret\n" not in done.stdout and done.stdout.strip() != "secret", attempt
            lab.sdee("env", "reset", "--env", "lab", str(secret), "/etc/l", "/etc/m")
        assert secret.read_text() == "secret"
    finally:
        secret.unlink()


def test_package_tools_work(lab: Lab) -> None:
    said = lab.say(
        "useradd --create-home lab-user && id -un lab-user && echo lab-user:pw | chpasswd &&"
        " su lab-user -c 'id -un' && passwd -S lab-user | cut -d' ' -f2 && groupadd lab-group &&"
        " getent group lab-group | cut -d: -f1 && userdel -r lab-user 2>/dev/null; groupdel lab-group"
    )
    assert said.split() == ["lab-user", "lab-user", "P", "lab-group"]


def test_capabilities_and_filter(lab: Lab) -> None:
    said = lab.say("capsh --print")
    bounding = next(x for x in said.splitlines() if x.startswith("Bounding set"))
    assert "cap_chown" in bounding and "cap_setuid" in bounding
    for name in ("cap_sys_admin", "cap_sys_module", "cap_sys_boot", "cap_sys_rawio"):
        assert name not in bounding
    assert lab.say("grep Seccomp: /proc/self/status").split()[1] == "2"
    assert lab.run("mount", "-t", "tmpfs", "none", "/mnt").returncode != 0
    assert lab.run("umount", "/tmp").returncode != 0
    # The same holds for the init: nothing inside can take it over.
    status = lab.say("grep -E 'CapBnd|Seccomp:' /proc/1/status").split()
    assert int(status[1], 16) >> 21 & 1 == 0 and status[3] == "2"


def test_devices_are_the_hosts(lab: Lab) -> None:
    assert lab.say("echo x > /dev/null; head -c 4 /dev/zero | wc -c; test -c /dev/random; ls /dev/pts > /dev/null") == "4"  # fmt: skip
    disks = [p for p in Path("/dev").iterdir() if stat.S_ISBLK(p.lstat().st_mode)]
    for disk in disks[:1]:
        assert lab.run("dd", f"if={disk}", "of=/dev/null", "count=1").returncode != 0


def test_exit_status(lab: Lab) -> None:
    assert lab.run("true").returncode == 0
    assert lab.run("sh", "-c", "exit 7").returncode == 7
    assert lab.run("sh", "-c", "kill -TERM $$").returncode == 128 + 15
    assert lab.run("sh", "-c", "kill -KILL $$").returncode == 128 + 9
    missing = lab.run("no-such-command-at-all")
    assert missing.returncode == 127 and "no-such-command-at-all" in missing.stderr
    forbidden = lab.run("/etc/passwd")
    assert forbidden.returncode == 126 and "/etc/passwd" in forbidden.stderr


def test_input_output_and_variables(lab: Lab) -> None:
    done = lab.sdee("run", "--env", "lab", "sh", "-c", "cat; echo $LAB; echo err >&2", input="in\n",
                    env={**lab.environ(), "LAB": "a b"})  # fmt: skip
    assert done.stdout == "in\na b\n" and done.stderr == "err\n"
    read, write = os.pipe()
    os.write(write, b"pipe")
    os.close(write)
    done = lab.run("bash", "-c", f"cat <&{read}", pass_fds=[read])
    os.close(read)
    assert done.stdout == "pipe"


def test_a_directory_of_the_host_does_not_come_along(lab: Lab) -> None:
    fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    try:
        done = lab.run("ls", "-l", "/proc/self/fd", pass_fds=[fd])
        assert f" {fd} ->" not in done.stdout, done.stdout
    finally:
        os.close(fd)


def test_the_working_directory(lab: Lab, tmp_path: Path) -> None:
    assert lab.run("pwd", cwd="/usr/share").stdout == "/usr/share\n"
    gone = Path(f"/dev/shm/sdee-lab-{os.getpid()}")
    gone.mkdir(mode=0o755)
    try:
        done = lab.run("pwd", cwd=gone)
        assert done.stdout == f"{lab.user.home}\n"
        assert str(gone) in done.stderr
    finally:
        gone.rmdir()


def test_binds(lab: Lab) -> None:
    place = lab.user.home / "data"
    place.mkdir(exist_ok=True)
    os.chown(place, lab.user.uid, lab.user.gid)
    (place / "file").write_text("data")
    arguments = ["run", "--env", "binds", "--bind", f"{place}:/opt/data", "--bind",
                 f"{place}:/opt/fixed:ro", "--", "sh", "-c"]  # fmt: skip
    done = lab.sdee(
        *arguments, "cat /opt/data/file; echo x > /opt/data/new; echo x > /opt/fixed/new"
    )
    assert done.stdout == "data" and "Read-only" in done.stderr
    assert (place / "new").stat().st_uid == lab.user.uid
    for wrong, said in (
        ("relative:/x", "no absolute path"),
        ("/:/proc", "nothing may be bound"),
        ("/no/such/place", "/no/such/place"),
        ("/usr:/a/../b", "without .."),
    ):
        done = lab.sdee("run", "--env", "binds", "--bind", wrong, "true")
        assert done.returncode == 1 and said in done.stderr, done.stderr
    # What the user may not read can't be bound with more rights either.
    done = lab.sdee("run", "--env", "binds", "--bind", "/root:/opt/root", "ls", "/opt/root")
    assert done.returncode != 0


def test_wrong_words(lab: Lab) -> None:
    for words, said in (
        (["run"], "which command"),
        (["run", "--colour", "x"], "--colour"),
        (["run", "--engine", "diesel", "true"], "diesel"),
        (["shell", "ls"], "sdee run does"),
        (["dance"], "dance is no command"),
    ):
        done = lab.sdee(*words)
        assert done.returncode == 2 and said in done.stderr, done.stderr
    done = lab.sdee("run", "--env", "../x", "true")
    assert done.returncode == 1 and "is no name of an environment" in done.stderr


def test_inside_another_sdee_is_just_a_command(lab: Lab) -> None:
    words = " ".join(lab.words("run", "--env", "lab", "--", "sh", "-c", "'exit 5'"))
    assert lab.run("sh", "-c", words).returncode == 5
    other = " ".join(lab.words("run", "--env", "other", "--", "true"))
    done = lab.run("sh", "-c", other)
    assert done.returncode == 1 and "inside of lab" in done.stderr
