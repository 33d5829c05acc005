"""`sdeefs mount`, `umount` and `status` with real mounts, on every transport."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mount_helpers.trials import in_child
from sdeefs.umount_command import unmount
from tests.sdeefs.conftest import Lab, alive, mounted, wait_until

TRANSPORTS = ("device", "pyfuse3", "ring")


#: The command of an installation whose C extensions couldn't be built.
PURE = """
import sys
for name in ("_ring", "_device", "_shortcuts"):
    sys.modules["sdeefs.transports." + name] = None
from sdeefs.__main__ import main
sys.exit(main())
"""


def test_without_the_c_extensions(lab: Lab) -> None:
    words = ["mount", "-v", str(lab.upper), str(lab.lower), str(lab.merged)]
    done = subprocess.run(
        [sys.executable, "-c", PURE, *words], capture_output=True, text=True, timeout=90
    )
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    assert lab.status()["transport"] == "device"
    assert (lab.merged / "file").read_text() == "of lower\n"
    (lab.merged / "file").write_text("ours\n")
    assert (lab.upper / "file").read_text() == "ours\n"
    lab.umount()


def test_a_server_is_prepared_without_the_c_extensions() -> None:
    code = PURE.replace(
        "from sdeefs.__main__ import main\nsys.exit(main())", "import sdeefs.public"
    )
    code += "sdeefs.public.preload()\n"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_mount_shows_lower_and_keeps_changes_in_upper(lab: Lab, transport: str) -> None:
    said = lab.mount("-v", "--transport", transport)
    assert "engine fuse" in said.stderr
    assert (lab.merged / "file").read_text() == "of lower\n"
    with open(lab.merged / "file", "a") as file:
        file.write("and ours\n")
    (lab.merged / "new").mkdir()
    (lab.merged / "dir" / "inner").unlink()
    told = lab.status()
    assert (told["engine"], told["state"], told["transport"]) == ("fuse", "live", transport)
    assert told["upper"] == str(lab.upper)
    assert told["lowers"] == [str(lab.lower)]
    assert sum(told["requests"].values()) > 3  # type: ignore[attr-defined]
    assert int(str(told["memory"])) > 1 << 20
    lab.umount()
    assert (lab.lower / "file").read_text() == "of lower\n"
    assert (lab.upper / "file").read_text() == "of lower\nand ours\n"
    assert lab.sdeefs("diff", lab.upper, lab.lower).stdout.split("\n")[:-1] == [
        "D dir/inner",
        "C file",
        "A new/",
    ]
    assert lab.sdeefs("fsck", lab.upper, lab.lower).stdout == ""


def test_mounted_by_its_own_engine_and_by_the_kernel(lab: Lab) -> None:
    lab.mount("--engine", "kernel")
    (lab.merged / "by kernel").write_text("k")
    (lab.merged / "file").unlink()
    assert lab.status()["engine"] == "kernel"
    lab.sdeefs("umount", lab.merged)
    lab.mount()
    assert (lab.merged / "by kernel").read_text() == "k"
    assert not (lab.merged / "file").exists()
    (lab.merged / "by sdeefs").write_text("s")
    lab.umount()
    said = lab.mount("--engine", "auto", "-v")
    assert "engine kernel" in said.stderr
    assert sorted(os.listdir(lab.merged)) == ["by kernel", "by sdeefs", "dir"]
    lab.sdeefs("umount", lab.merged)


def test_auto_takes_sdeefs_for_what_the_kernel_has_no_word_for(lab: Lab) -> None:
    said = lab.mount("--engine", "auto", "-v", "-o", "uidmap=0:0:65536")
    assert "engine fuse" in said.stderr and "option uidmap" in said.stderr
    lab.umount()
    refused = lab.mount("--engine", "kernel", "-o", "uidmap=0:0:65536", status=1)
    assert "kernel overlayfs can't" in refused.stderr


def test_lowers_alone_are_read_only(lab: Lab, tmp_path: Path) -> None:
    other = tmp_path / "other:lower"
    other.mkdir()
    (other / "top").touch()
    escaped = str(other).replace(":", "\\:")
    lab.sdeefs("mount", "-o", f"lowerdir={escaped}:{lab.lower}", lab.merged)
    assert sorted(os.listdir(lab.merged)) == ["dir", "file", "top"]
    with pytest.raises(OSError, match="Read-only"):
        (lab.merged / "x").touch()
    lab.umount()


def test_an_upper_in_use_is_refused_and_free_after_umount(lab: Lab, tmp_path: Path) -> None:
    lab.mount()
    (tmp_path / "second").mkdir()
    words = ("mount", lab.upper, lab.lower, tmp_path / "second")
    refused = lab.sdeefs(*words, status=1)
    assert "in use" in refused.stderr and str(lab.merged) in refused.stderr
    assert refused.stderr.count("\n") == 1
    refused = lab.sdeefs("mount", "--engine", "kernel", *words[1:], status=1)
    assert "in use" in refused.stderr
    refused = lab.sdeefs("fsck", lab.upper, status=1)
    assert "in use" in refused.stderr
    # By umount(8), and at once again: the ending server is waited for.
    subprocess.run(["umount", str(lab.merged)], check=True, timeout=30)
    lab.mount()
    lab.umount()


@pytest.mark.parametrize("name", ["a,b", "a\\b", "a:b", "a\nb"])
def test_an_upper_of_any_name_in_use_by_the_kernel_is_refused(
    lab: Lab, tmp_path: Path, name: str
) -> None:
    upper, other = lab.place / name, tmp_path / "other"
    upper.mkdir()
    other.mkdir()
    lab.sdeefs("mount", "--engine", "kernel", upper, lab.lower, lab.merged)
    assert lab.status()["upper"] == str(upper)
    assert "in use" in lab.sdeefs("mount", upper, lab.lower, other, status=1).stderr
    lab.sdeefs("umount", lab.merged)


def test_every_lower_of_the_kernel_is_listed(lab: Lab, tmp_path: Path) -> None:
    above = tmp_path / "a:b"
    above.mkdir()
    layers = f"lowerdir+={above},lowerdir+={lab.lower}"
    lab.sdeefs("mount", "--engine", "kernel", "-o", layers, lab.merged)
    assert lab.status()["lowers"] == [str(above), str(lab.lower)]
    lab.sdeefs("umount", lab.merged)


def test_mount_points_that_are_none(lab: Lab) -> None:
    for point, words in (("/", "a root"), ("/..", "a root"), ("", "an empty path")):
        said = lab.sdeefs("mount", lab.upper, lab.lower, point, status=1).stderr
        assert words in said and "Traceback" not in said
    for command in ("umount", "status"):
        assert "an empty path" in lab.sdeefs(command, "", status=1).stderr
    assert "upper ''" in lab.sdeefs("mount", "", lab.lower, lab.merged, status=1).stderr


def test_a_link_to_the_mount_point(lab: Lab) -> None:
    link = lab.place / "link"
    link.symlink_to(lab.merged)
    lab.mount()
    assert "live" in lab.sdeefs("status", link).stdout
    lab.sdeefs("umount", link)
    assert not mounted(lab.merged)


def test_what_cannot_be_remounted(lab: Lab) -> None:
    said = lab.sdeefs("mount", "-o", "remount,ro", lab.merged, status=1).stderr
    assert "nothing is mounted there" in said
    assert "a proc mount" in lab.sdeefs("mount", "-o", "remount,rw", "/proc", status=1).stderr
    lab.sdeefs("mount", "-o", "ro", lab.upper, lab.lower, lab.merged)
    assert lab.status()["work"] is None
    assert "read-only" in lab.sdeefs("mount", "-o", "remount,rw", lab.merged, status=1).stderr
    lab.sdeefs("mount", "-o", "remount,ro,noexec", lab.merged)
    lab.umount()


def test_streams_that_are_closed(lab: Lab) -> None:
    words = (
        f"exec {sys.executable} -m sdeefs mount {lab.upper} {lab.lower} {lab.merged} <&- >&- 2>&-"
    )
    assert subprocess.run(["sh", "-c", words], timeout=60, check=False).returncode == 0
    assert (lab.merged / "file").read_text() == "of lower\n"
    lab.umount()


def test_a_log_that_cannot_be_written_is_refused(lab: Lab) -> None:
    words = ("--log-file", lab.place / "no" / "log", lab.upper, lab.lower, lab.merged)
    assert "no/log: No such file" in lab.sdeefs("mount", *words, status=1).stderr
    assert not mounted(lab.merged)


def test_a_copy_elsewhere_is_named(lab: Lab, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    lab.mount()
    subprocess.run(["mount", "--bind", lab.merged, copy], check=True, timeout=30)
    assert f"for {copy}" in lab.sdeefs("umount", lab.merged).stderr
    lab.sdeefs("umount", copy)


def test_errors_before_the_mount_reach_the_caller(lab: Lab) -> None:
    os.symlink("nowhere", lab.place / "dangling")
    refused = lab.sdeefs("mount", lab.upper, lab.place / "dangling", lab.merged, status=1)
    assert refused.stderr.count("\n") == 1 and "dangling" in refused.stderr
    assert not mounted(lab.merged)
    lab.mount("-o", "whiteouts=never", status=2)


def test_a_dead_mount_of_ours_is_cleaned_and_mounted(lab: Lab) -> None:
    lab.mount()
    pid = lab.pid()
    (lab.merged / "kept").write_text("x")
    os.kill(pid, signal.SIGKILL)
    lab.ended(pid)
    wait_until(lambda: lab.status()["state"] == "dead", "state dead")
    lab.mount()
    assert (lab.merged / "kept").read_text() == "x"
    assert Path("/proc/self/mountinfo").read_text().count(f" {lab.merged} ") == 1
    lab.umount()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_signals_unmount(lab: Lab, number: signal.Signals, transport: str) -> None:
    lab.mount("--transport", transport)
    pid = lab.pid()
    (lab.merged / "written").write_text("before the end")
    os.kill(pid, number)
    lab.ended(pid)
    assert not mounted(lab.merged)
    assert (lab.upper / "written").read_text() == "before the end"


def test_a_signal_ends_even_a_busy_mount(lab: Lab) -> None:
    lab.mount()
    pid = lab.pid()
    with open(lab.merged / "file") as held:
        assert held.readline() == "of lower\n"
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGTERM)  # twice: don't wait for who has files open
        lab.ended(pid)
        with pytest.raises(OSError):
            os.stat(held.fileno())
            os.statvfs(held.fileno())
    assert not mounted(lab.merged)


def test_a_busy_mount_is_not_unmounted_unless_lazily(lab: Lab) -> None:
    lab.mount()
    pid = lab.pid()
    with open(lab.merged / "file") as held:
        refused = lab.sdeefs("umount", lab.merged, status=1)
        assert "in use" in refused.stderr
        lab.sdeefs("umount", "--lazy", lab.merged)
        assert not mounted(lab.merged)
        assert held.readline() == "of lower\n"
        assert alive(pid)
    lab.ended(pid)


def test_a_stuck_server_is_told_of_and_aborted(lab: Lab) -> None:
    lab.mount()
    pid = lab.pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        assert lab.status()["state"] == "stuck"
        assert time.monotonic() - started < 20
        lab.sdeefs("umount", "--force", lab.merged)
        assert not mounted(lab.merged)
        assert not alive(pid)
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_trial_on_a_stuck_server_is_given_up(lab: Lab) -> None:
    """A request that the server has taken can't be interrupted, not even by SIGKILL."""
    lab.mount()
    pid = lab.pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        works, why = in_child(lambda: str(os.statvfs(lab.merged)), seconds=0.2)
        assert not works and "no answer" in why
        assert time.monotonic() - start < 10
    finally:
        os.kill(pid, signal.SIGCONT)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(-1, 0)  # the trial's process, if it was left alone
    lab.umount()


def test_sighup_opens_the_log_anew(lab: Lab) -> None:
    log = lab.place / "log"
    lab.mount("--log-file", log, "--log-level", "info")
    pid = lab.pid()
    wait_until(log.exists, "a line in the log")
    log.rename(lab.place / "log.1")
    os.kill(pid, signal.SIGHUP)
    wait_until(log.exists, "a new log")
    lab.umount()


def test_the_server_outlives_its_terminal_in_the_same_session(lab: Lab) -> None:
    words = ["mount", "--log-file", "log", "upper", "lower", "merged"]
    shell, terminal = pty.fork()
    if shell == 0:
        os.chdir(lab.place)
        os.execv(sys.executable, [sys.executable, "-m", "sdeefs", *words])
    said = b""
    with contextlib.suppress(OSError):  # EIO: nobody has it open any more
        while part := os.read(terminal, 4096):
            said += part
    _, status = os.waitpid(shell, 0)
    assert status == 0, said
    os.close(terminal)
    pid = lab.pid()
    assert (os.getsid(pid), os.getpgid(pid)) == (shell, pid)
    assert (lab.merged / "file").read_text() == "of lower\n"
    lab.umount()


def test_a_good_run_logs_nothing(lab: Lab) -> None:
    log = lab.place / "log"
    lab.mount("--log-file", log)
    (lab.merged / "file").write_text("x")
    lab.umount()
    assert not log.exists() or log.read_text() == ""


def test_in_the_foreground(lab: Lab) -> None:
    server = subprocess.Popen(
        [sys.executable, "-m", "sdeefs", "mount", "-f", lab.upper, lab.lower, lab.merged],
        stderr=subprocess.PIPE,
    )
    try:
        wait_until(lambda: mounted(lab.merged) or server.poll() is not None, "a mount")
        assert (lab.merged / "file").read_text() == "of lower\n"
        subprocess.run(["umount", str(lab.merged)], check=True, timeout=30)
        assert server.wait(30) == 0
        assert server.stderr is not None and server.stderr.read() == b""
    finally:
        server.kill()
        server.wait(10)
        assert server.stderr is not None
        server.stderr.close()


def test_flags_of_the_mount(lab: Lab) -> None:
    lab.mount("-o", "nosuid,nodev,noexec,noatime", "--source", "a source")
    line = next(
        x for x in Path("/proc/self/mounts").read_text().splitlines() if str(lab.merged) in x
    )
    source, _, fstype, options = line.split()[:4]
    assert (source, fstype) == ("a\\040source", "fuse.sdeefs")
    assert {"nosuid", "nodev", "noexec", "noatime", "allow_other"} <= set(options.split(","))
    lab.umount()


def test_data_paths_that_are_forced(lab: Lab) -> None:
    for option, path in (
        ("passthrough=on", "passthrough"),
        ("writeback=on", "writeback"),
        ("passthrough=off,writeback=off", "plain"),
    ):
        lab.mount("-o", option, "--transport", "device")
        assert lab.status()["data_path"] == path
        (lab.merged / path).write_text(path)
        assert (lab.merged / path).read_text() == path
        lab.umount()
        assert (lab.upper / path).read_text() == path


def test_a_mount_over_its_own_lower(lab: Lab) -> None:
    """As an environment does it with /: merged and upper lie in lower."""
    upper, merged = lab.lower / "home" / "upper", lab.lower / "home" / "merged"
    upper.mkdir(parents=True)
    merged.mkdir()
    lab.sdeefs("mount", upper, lab.lower, merged)
    try:
        assert (merged / "file").read_text() == "of lower\n"
        assert os.listdir(merged / "home" / "merged") == []
        (merged / "new").touch()
        assert os.listdir(upper) == ["new"]
    finally:
        lab.sdeefs("umount", merged)


def test_a_copy_in_another_mount_namespace_is_told_of(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.mount()
    pid = lab.pid()
    keeper = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; exec sleep 1000"],
        stdout=subprocess.PIPE,
    )
    try:
        assert keeper.stdout is not None and keeper.stdout.readline() == b"\n"
        unmount(os.fsencode(lab.merged), wait=0.5)
        assert "another mount namespace" in capsys.readouterr().err
        assert alive(pid)
        lab.sdeefs("umount", "--force", lab.merged)
        lab.ended(pid)
        lab.sdeefs("umount", "--force", lab.merged, status=1)
    finally:
        keeper.kill()
        keeper.wait(10)
        assert keeper.stdout is not None
        keeper.stdout.close()


def test_with_few_descriptors(lab: Lab) -> None:
    """Where the limit is low and can't be raised, directories make room for files."""
    for number in range(300):
        (lab.lower / f"d{number}").mkdir()
        (lab.lower / f"d{number}" / "file").write_text(str(number))
    script = (
        "import resource, sys; from sdeefs.cli import main;"
        "from sdeefs import privileges; privileges.give_up(privileges.CAP_SYS_RESOURCE);"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); sys.exit(main())"
    )
    command = [sys.executable, "-c", script, "mount", lab.upper, lab.lower, lab.merged]
    subprocess.run(command, check=True, timeout=60)
    for _ in range(2):
        for number in range(300):
            assert (lab.merged / f"d{number}" / "file").read_text() == str(number)
    with open(lab.merged / "d7" / "file", "a") as file:
        file.write("!")
    assert int(str(lab.status()["open_descriptors"])) < 200
    subprocess.run(["umount", str(lab.merged)], check=True, timeout=30)
    assert (lab.upper / "d7" / "file").read_text() == "7!"
