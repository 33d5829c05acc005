"""Few descriptors: a mount works or is refused in one line, and never hangs."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdeefs import descriptors
from sdeefs.options import Options
from sdeefs.refusals import Refused
from tests.conftest import User
from tests.sdeefs.conftest import Lab, mounted, wait_until

LOGS = Path("/run/sdeefs")
TRANSPORTS = ("ring", "device", "pyfuse3", "auto")
TOO_LOW = re.compile(
    r"sdeefs mount: open files: the limit of (\d+) is too low for a mount:"
    r" at least (\d+) \(ulimit -n\)\n"
)
#: The command where the limit (argument 1) can't be raised, whoever runs it.
LIMITED = """
import resource, sys
from sdeefs import descriptors, privileges
privileges.give_up(privileges.CAP_SYS_RESOURCE)
limit = int(sys.argv.pop(1))
if sys.argv[1] == "unchecked":
    sys.argv.pop(1)
    descriptors.transport_for = lambda options: options.transport or "auto"
from sdeefs.cli import main
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
sys.exit(main())
"""


def limited(limit: int, *words: str | Path, user: User | None = None) -> tuple[int, str]:
    """Exit status and output of a command under a limit. A hang is a failure."""
    become = []
    if user is not None:
        become = ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--init-groups"]
    done = subprocess.run(
        [*become, sys.executable, "-c", LIMITED, str(limit), *map(str, words)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=30, check=False, env={**os.environ, "XDG_RUNTIME_DIR": ""},
    )  # fmt: skip
    return done.returncode, done.stdout


def servers(point: Path) -> list[str]:
    """The processes that have a mount point on their command line."""
    found = subprocess.run(["pgrep", "-f", "--", str(point)], capture_output=True, text=True)
    return found.stdout.split()


def refused_then_enough(lab: Lab, transport: str, user: User | None = None) -> None:
    words = ("mount", "--transport", transport, lab.upper, lab.lower, lab.merged)
    for limit in (10, 20, 40) if user is None else (18,):
        status, said = limited(limit, *words, user=user)
        told = TOO_LOW.fullmatch(said)
        assert status == 1 and told is not None, (limit, status, said)
        assert int(told[1]) == limit
        assert not mounted(lab.merged) and not servers(lab.merged)
    assert limited(int(told[2]), *words, user=user) == (0, "")
    if user is None:
        # As many directories and files as it has room for.
        for number in range(30):
            assert (lab.merged / f"d{number}" / "file").read_text() == "f"
        with contextlib.ExitStack() as opened:
            for number in range(8):
                opened.enter_context(open(lab.merged / f"d{number}" / "file", "a"))
    assert limited(256, "umount", lab.merged, user=user) == (0, "")
    assert not mounted(lab.merged) and not servers(lab.merged)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_too_few_are_refused_and_what_is_asked_for_is_enough(lab: Lab, transport: str) -> None:
    for number in range(30):
        (lab.lower / f"d{number}").mkdir()
        (lab.lower / f"d{number}" / "file").write_text("f")
    refused_then_enough(lab, transport)


def test_of_a_user(alice: User) -> None:
    lab = Lab(alice.home / "descriptors")
    shutil.rmtree(lab.place, ignore_errors=True)
    try:
        for directory in (lab.place, lab.lower, lab.upper, lab.merged):
            directory.mkdir()
            os.chown(directory, alice.uid, alice.gid)
        refused_then_enough(lab, "auto", alice)
    finally:
        lab.take_away()
        shutil.rmtree(lab.place, ignore_errors=True)


@pytest.mark.parametrize(
    ("transport", "limit"),
    [("ring", 20), ("ring", 23), ("device", 18), ("device", 19), ("pyfuse3", 23), ("auto", 16)],
)
def test_running_out_while_mounting_ends_it(lab: Lab, transport: str, limit: int) -> None:
    words = ("unchecked", "mount", "--transport", transport, lab.upper, lab.lower, lab.merged)
    before = set(LOGS.glob("*.log"))
    status, said = limited(limit, *words)
    if status == 0:  # there were just enough, or there will be too few for what comes later
        limited(256, "umount", lab.merged)
        wait_until(lambda: not servers(lab.merged), "the server's end")
        for log in set(LOGS.glob("*.log")) - before:
            if "Too many open files" in log.read_text():
                log.unlink()
    else:
        assert (status, said.count("\n")) == (1, 1), said
        assert said.startswith("sdeefs mount: open files: the limit"), said
    assert not mounted(lab.merged) and not servers(lab.merged)


def test_auto_takes_the_device_where_rings_need_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1 << 20)
    monkeypatch.setattr(descriptors.resource, "getrlimit", lambda _: (1000, 1000))
    options = Options(lowers=(b"/usr",))
    assert descriptors.transport_for(options) == "device"
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert descriptors.transport_for(options) == "auto"
    with pytest.raises(Refused, match="at least"):
        descriptors.transport_for(Options(lowers=(b"/usr",) * 500))


def test_what_fails_leaves_the_mount_below_it(lab: Lab, tmp_path: Path) -> None:
    lab.mount()
    other = Lab(tmp_path / "other")
    for directory in (other.place, other.lower, other.upper):
        directory.mkdir()
    words = ("--transport", "pyfuse3", "-o", "passthrough=on", other.upper, other.lower)
    refused = lab.sdeefs("mount", *words, lab.merged, status=1)
    assert "passthrough=on" in refused.stderr
    assert (lab.merged / "file").read_text() == "of lower\n"
    lab.umount()


def test_the_table_of_descriptors_grows_before_there_are_threads(lab: Lab) -> None:
    lab.mount()
    try:
        status = Path(f"/proc/{lab.pid()}/status").read_text()
        assert "\nFDSize:\t2048\n" in status
    finally:
        lab.umount()
