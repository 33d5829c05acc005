"""Ways out of an instance, tried for real by its owner, who is root in it: none may work.

Each script runs inside, by ssh; it prints what came of the attempt. A marker in the environment's
own layer tells inside from outside.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import User
from tests.env.daemon_lab import wait_for
from tests.env.login_lab import Node, login_node

PRELUDE = """
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    result = libc.syscall(number, *args)
    return 'done' if result >= 0 else errno.errorcode[ctypes.get_errno()]
def attempt(work, *args, **kw):
    try:
        work(*args, **kw)
        return 'done'
    except OSError as error:
        return errno.errorcode[error.errno]
"""


@pytest.fixture(scope="module", params=["kernel", "fuse"])
def node(request: pytest.FixtureRequest, alice: User, bob: User) -> Iterator[Node]:
    with login_node(request.param, alice, bob) as made:
        made.say(alice, "echo inside > /marker-of-alice")
        yield made


def _python(node: Node, user: User, code: str) -> list[str]:
    """Run a script inside; what it prints, as words."""
    done = node.sshd.run(user, "python3 -", input=PRELUDE + code)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_chroot_by_a_kept_descriptor(node: Node, alice: User) -> None:
    """The classic: it works against chroot(2), and leads nowhere where the root was pivoted."""
    said = _python(
        node, alice,
        "fd = os.open('/', os.O_RDONLY)\n"
        "os.makedirs('/opt/jail', exist_ok=True)\n"
        "print(attempt(os.chroot, '/opt/jail'))\n"
        "os.fchdir(fd)\n"
        "for _ in range(20): os.chdir('..')\n"
        "attempt(os.chroot, '.')\n"
        "print(os.path.exists('marker-of-alice'))\n",
    )  # fmt: skip
    assert said[-1] == "True"
    assert not Path("/marker-of-alice").exists()


def test_no_process_but_the_own(node: Node, alice: User, bob: User) -> None:
    node.say(bob, "true")
    said = node.say(alice, "cat /proc/1/comm; ls -d /proc/[0-9]* | wc -l; ls /proc/1/root/ || true")
    name, count, *seen = said.split()
    assert name == "sdee-init" and int(count) < 15
    assert not seen or "marker-of-alice" in seen


def test_roots_and_memory_of_another_user(node: Node, alice: User, bob: User) -> None:
    """By the host's process numbers, from bob's instance and from the host as bob."""
    with node.sleeping(alice) as pid:
        for path in (f"/proc/{pid}/root/etc/passwd", f"/proc/{pid}/mem", f"/proc/{pid}/environ"):
            assert node.as_host(bob, ["head", "-c1", path]).returncode != 0
            assert node.sshd.run(bob, f"head -c1 {path}").returncode != 0
        attach = (
            f"import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
            f"r = libc.ptrace(16, {pid}, 0, 0); print('attached' if r == 0 else 'refused')\n"
        )
        assert node.as_host(bob, ["python3", "-c", attach]).stdout.strip() == "refused"
        assert _python(node, bob, attach) == ["refused"]
        enter = ["nsenter", "--target", str(pid), "--user", "--mount", "true"]
        assert node.as_host(bob, enter).returncode != 0


def test_open_by_handle(node: Node, alice: User) -> None:
    assert _python(
        node, alice,
        "buf = ctypes.create_string_buffer(bytes([8,0,0,0, 1,0,0,0, 2,0,0,0, 0,0,0,0]))\n"
        "fd = os.open('/', os.O_RDONLY)\n"
        "print(call(304, fd, buf, os.O_RDONLY))\n",
    )[0] in ("EPERM", "ENOSYS")  # fmt: skip


def test_proc_sys_and_release_agent(node: Node, alice: User) -> None:
    said = _python(
        node, alice,
        "import glob\n"
        "paths = ['/proc/sys/kernel/core_pattern', '/proc/sys/kernel/modprobe', '/proc/sys/vm/drop_caches',\n"
        "  '/proc/sys/kernel/hostname', '/proc/sys/fs/binfmt_misc/register', '/proc/sysrq-trigger',\n"
        "  '/proc/sys/net/ipv4/ip_forward', '/proc/sys/kernel/ns_last_pid', '/proc/kcore', '/proc/kmem',\n"
        "  '/sys/kernel/uevent_helper', '/sys/power/state', '/sys/module/fuse/parameters/enable_uring',\n"
        "  *glob.glob('/sys/fs/cgroup/*/release_agent'), *glob.glob('/sys/fs/cgroup/release_agent'),\n"
        "  '/sys/fs/cgroup/cgroup.procs', '/sys/fs/cgroup/unified/cgroup.procs']\n"
        "for path in paths:\n"
        "    try: open(path, 'r+b', 0).write(b'0')\n"
        "    except OSError: continue\n"
        "    print(path)\n",
    )  # fmt: skip
    assert said == []


def test_devices(node: Node, alice: User) -> None:
    said = _python(
        node, alice,
        "import glob, stat\n"
        "print(attempt(os.mknod, '/opt/disk', 0o60660, os.makedev(254, 0)))\n"
        "print(attempt(os.mknod, '/opt/mem', 0o20660, os.makedev(1, 1)))\n"
        "print(attempt(os.mknod, '/dev/shm/disk', 0o60660, os.makedev(254, 0)))\n"
        "for path in ['/dev/mem', '/dev/kmsg', *glob.glob('/dev/vd*'), *glob.glob('/dev/sd*'), *glob.glob('/dev/nvme*')]:\n"
        "    for flags in (os.O_RDONLY, os.O_RDWR):\n"
        "        try: os.open(path, flags)\n"
        "        except OSError: continue\n"
        "        if not (path == '/dev/kmsg'): print('opened', path)\n",
    )  # fmt: skip
    assert said == ["EPERM", "EPERM", "EPERM"]
    # A node made on the host in the owner's upper can't be: mknod needs the host's root.


def test_mounts(node: Node, alice: User) -> None:
    said = _python(
        node, alice,
        "def mount(source, target, kind, flags, data=None):\n"
        "    r = libc.mount(source, target, kind, ctypes.c_ulong(flags), data)\n"
        "    return 'done' if r >= 0 else errno.errorcode[ctypes.get_errno()]\n"
        "os.makedirs('/opt/m', exist_ok=True)\n"
        "print(mount(b't', b'/opt/m', b'tmpfs', 0), mount(b'p', b'/opt/m', b'proc', 0),\n"
        "  mount(b's', b'/opt/m', b'sysfs', 0), mount(b'c', b'/opt/m', b'cgroup', 0, b'memory'),\n"
        "  mount(b'/', b'/opt/m', None, 4096), mount(None, b'/', None, 32), mount(None, b'/proc', None, 32 | 4096),\n"
        "  mount(b'/dev/vda', b'/opt/m', b'ext4', 0))\n"
        "print('done' if libc.umount2(b'/proc', 2) == 0 else 'refused')\n"
        "print(call(272, 0x20000), call(428, -100, b'/', 1), call(430, b'tmpfs', 0))\n",
    )  # fmt: skip
    assert len(said) == 12 and "done" not in said, said


def test_a_namespace_of_ones_own_reveals_nothing(node: Node, alice: User) -> None:
    """Inside, one may make user namespaces (bubblewrap does); what is mounted stays locked."""
    with node.secret("/secret-file") as text:
        node.rescan_for(alice)
        done = node.sshd.run(
            alice,
            "unshare --user --map-root-user --mount sh -c 'umount -l /tmp; umount -l /proc; "
            "umount -a -l; cat /secret-file /etc/shadow /etc/ssh/*key; mount -t tmpfs t /mnt && "
            "echo own; mount -o bind / /mnt; cat /mnt/secret-file; ls /home/*'",
        )
        said = done.stdout + done.stderr
        assert text not in said and "PRIVATE KEY" not in said


def test_calls_that_the_filter_refuses(node: Node, alice: User) -> None:
    """keyctl, add_key, bpf, userfaultfd, finit_module, kexec_load, init_module, perf_event_open."""
    said = _python(
        node, alice,
        "print(call(250, 0, -3, 1), call(248, b'user', b'x', b'y', 1, -3), call(321, 0, 0, 0), call(323, 0),\n"
        "  call(313, 0, b'', 0), call(246, 0, 0, 0, 0), call(175, 0, 0, b''), call(176, b'fuse', 0),\n"
        "  call(169, 0xfee1dead, 672274793, 0, 0), call(167, b'/x', 0), call(153))\n",
    )  # fmt: skip
    assert all(word in ("EPERM", "ENOSYS", "EACCES") for word in said[:10]), said


def test_clock_and_names_of_the_host(node: Node, alice: User) -> None:
    said = _python(
        node,
        alice,
        "import socket, time\n"
        "print(attempt(time.clock_settime, time.CLOCK_REALTIME, 1), attempt(socket.sethostname, 'x'))\n",
    )
    assert said == ["EPERM", "EPERM"]


def test_capabilities_and_filter(node: Node, alice: User) -> None:
    said = node.say(alice, "grep -E 'CapBnd|CapEff|Seccomp:' /proc/self/status")
    fields = dict(line.split(":\t") for line in said.splitlines())
    dropped = (16, 17, 21, 22, 25)  # SYS_MODULE, SYS_RAWIO, SYS_ADMIN, SYS_BOOT, SYS_TIME
    for name in ("CapBnd", "CapEff"):
        for number in dropped:
            assert not int(fields[name], 16) >> number & 1, (name, number)
    assert fields["Seccomp"] == "2"


def test_tiocsti(node: Node, alice: User) -> None:
    """Nothing can be typed into the terminal on which one is logged in."""
    done = node.sshd.run(
        alice, "-tt",
        "python3 -c \"import fcntl,termios; fcntl.ioctl(0, termios.TIOCSTI, b'x')\"",
    )  # fmt: skip
    assert done.returncode != 0
    assert "PermissionError" in done.stdout or "Operation not permitted" in done.stdout, done


SECRETS = (
    "/etc/ssh/ssh_host_ed25519_key", "/etc/munge/munge.key", "/root-secrets/key", "/secret-file",
)  # fmt: skip
READING = (
    "cat {0}; cp {0} /tmp/copy && cat /tmp/copy; tar cf - {0} | tar xOf -; cat < {0}; dd if={0} bs=1; "
    "find $(dirname {0}) -maxdepth 1 -type f -exec cat {{}} +; chmod 644 {0}; cat {0}; "
    "chown nobody {0}; su nobody -s /bin/sh -c 'cat {0}'; setfacl -m u:nobody:r {0}; "
    "ln {0} /opt/linked && cat /opt/linked; touch {0}; echo >> {0}; cat {0}; "
    "mv {0} /opt/moved && cat /opt/moved; chmod 666 /opt/moved; cat /opt/moved"
)


def test_secrets_of_the_host(node: Node, alice: User) -> None:
    """Neither read, nor after any change that copies them up; replacing them works."""
    with contextlib.ExitStack() as stack:
        texts = [stack.enter_context(node.secret(path)) for path in SECRETS]
        node.rescan_for(alice)
        for path in SECRETS:
            done = node.sshd.run(alice, READING.format(path))
            for text in texts:
                assert text not in done.stdout + done.stderr, path
        replace = "rm -f {0}; mkdir -p $(dirname {0}); echo mine > {0} && cat {0}"
        script = " && ".join(f"({replace.format(path)})" for path in SECRETS)
        assert node.say(alice, script).split() == ["mine"] * 4
        for path, text in zip(SECRETS, texts, strict=True):
            assert text in Path(path).read_bytes().decode("latin-1")


def test_a_secret_made_while_the_instance_lives(node: Node, alice: User) -> None:
    """sdeefs has no window; the kernel engine hides it with the next scan."""
    path = Path("/secret-of-today")
    with node.sleeping(alice):
        path.touch(0o600)
        try:
            path.write_text("of today\n")
            if node.engine == "fuse":
                assert "of today" not in node.sshd.run(alice, f"cat {path}").stdout
                # One that everybody could read until now.
                path.chmod(0o644)
                wait_for(
                    lambda: "today" in node.sshd.run(alice, f"cat {path}").stdout, "it is open"
                )
                path.chmod(0o600)
                wait_for(
                    lambda: "today" not in node.sshd.run(alice, f"cat {path}").stdout, "closed"
                )
            node.daemon.request("node", rescan=True)
            assert "of today" not in node.sshd.run(alice, f"cat {path}").stdout
            node.end(alice)
            assert "of today" not in node.sshd.run(alice, f"cat {path}").stdout
        finally:
            path.unlink()


def test_a_secret_in_etc_is_hidden_soon(node: Node, alice: User) -> None:
    """From an instance that lives, and without a scan that is asked for."""
    path, directory = Path("/etc/sdee-key"), Path("/etc/sdee-new")
    with node.sleeping(alice):
        try:
            path.write_text("for all\n")
            assert node.say(alice, f"cat {path}") == "for all"
            path.chmod(0o600)
            path.write_text("of today\n")
            directory.mkdir()
            (directory / "key").touch(0o600)
            (directory / "key").write_text("of today\n")
            names = f"{path} {directory}/key"
            wait_for(
                lambda: "today" not in node.sshd.run(alice, f"cat {names}").stdout, "hidden", 10
            )
        finally:
            path.unlink()
            shutil.rmtree(directory)


def test_what_becomes_secret_is_hidden_from_who_has_seen_it(node: Node, alice: User) -> None:
    """Names that the kernel has in its cache: looked up in vain, read, and below a new directory."""
    missing, public = Path("/etc/sdee-missing"), Path("/usr/share/sdee-public")
    directory, closed = Path("/opt/sdee-new-directory"), Path("/usr/share/sdee-closed")
    files = (missing, public, directory / "key", closed / "key")
    with node.sleeping(alice):
        try:
            for place in (directory, closed):
                place.mkdir()
            for path in files[1:]:
                path.write_text("for all\n")
            names = " ".join(map(str, files))
            assert node.say(alice, f"cat {names} 2>/dev/null; true").split() == ["for", "all"] * 3
            for path in files:
                path.touch(0o600)
                path.chmod(0o600)
                path.write_text("of today\n")
            closed.chmod(0o700)
            node.daemon.request("node", rescan=True)
            said = node.sshd.run(alice, f"cat {names}")
            assert "of today" not in said.stdout and said.stderr.count("denied") >= 3, said
            assert node.say(alice, f"ls {closed}") == ""
            mine = node.say(alice, f"rm {missing}; echo mine > {missing}; cat {missing}")
            assert mine == "mine" and missing.read_text() == "of today\n"
            node.say(alice, f"rm {missing}")
            node.end(alice)
            assert "of today" not in node.sshd.run(alice, f"cat {names}").stdout
        finally:
            for path in files:
                path.unlink(missing_ok=True)
            directory.rmdir()
            closed.rmdir()
    # The last scan's secrets were in directories that are gone now.
    node.end(alice)
    assert node.say(alice, "id -u") == "0"


def test_private_files_of_others_are_never_readable(node: Node, alice: User, bob: User) -> None:
    """Not by a mask, but by their ids: also what another user makes just now."""
    theirs, own = Path("/srv/of-bob"), Path("/srv/of-alice")
    with node.sleeping(alice):
        try:
            for path, user in ((theirs, bob), (own, alice)):
                path.touch(0o600)
                path.write_text(f"private to {user.name}\n")
                os.chown(path, user.uid, user.gid)
            said = node.sshd.run(alice, READING.format(theirs))
            assert f"private to {bob.name}" not in said.stdout
            said_own = node.say(alice, f"cat {own}; echo more >> {own}; tail -1 {own}")
            assert said_own == f"private to {alice.name}\nmore"
            assert own.read_text() == f"private to {alice.name}\n"
        finally:
            theirs.unlink()
            own.unlink()


def test_shadow_has_no_hash_and_works(node: Node, alice: User) -> None:
    host = Path("/etc/shadow").read_text()
    said = node.say(alice, "cat /etc/shadow /etc/gshadow")
    assert "root:" in said
    for field in re.findall(r":([^:\n]{3,})", host):
        assert "$" not in field or field not in said
    node.say(alice, "useradd -m carl && echo carl:geheim | chpasswd && id carl && grep -q '^carl:.[y6]' /etc/shadow")  # fmt: skip
    node.say(alice, "groupadd friends && usermod -aG friends carl && su carl -c id | grep friends")
    node.say(alice, "userdel -r carl; groupdel friends; ! id carl 2>/dev/null")
    assert "carl" not in Path("/etc/passwd").read_text()
