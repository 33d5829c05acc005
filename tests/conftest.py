"""What all rooms of tests share: real users, and proof that a test leaves nothing behind."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# The packages are those that are installed; only `tests.*` comes from this checkout.
sys.path.append(str(Path(__file__).resolve().parent.parent))

#: While this file exists (or SDEE_TESTS_SHARED is set) several runs share the machine: left-overs
#: can't be told from the others' work, and users are kept.
SHARED = Path("/run/sdee-tests-shared")

#: Mounts of these types that a test leaves behind are ours.
OUR_TYPES = ("fuse.sdeefs", "overlay")


@dataclass(frozen=True)
class User:
    """An account that the tests made."""

    name: str
    uid: int
    gid: int
    home: Path


def _shared() -> bool:
    return bool(os.environ.get("SDEE_TESTS_SHARED")) or SHARED.exists()


def _mounts() -> set[tuple[str, str]]:
    """(mount point, type) of every mount of this namespace, without touching any."""
    found = set()
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        left, right = line.split(" - ", 1)
        found.add((left.split()[4], right.split()[0]))
    return found


def _our_processes() -> dict[int, str]:
    """pid -> command line of every process that runs our code, the tests' own excepted."""
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            line = (
                Path(f"/proc/{entry}/cmdline")
                .read_bytes()
                .replace(b"\0", b" ")
                .decode("utf-8", "replace")
            )
        except OSError:
            continue
        words = line.split()
        if any(
            word.endswith(("/sdeefs", "/sdeed", "/sdee", "/sdeefs-overlayfs"))
            or word in ("sdeefs", "sdee_launch", "sdee_launch.daemon")
            for word in words[:4]
        ):
            found[int(entry)] = line.strip()
    return found


def _abort(point: str) -> None:
    """Take a left-over mount away, whatever state its server is in."""
    subprocess.run(["umount", "-i", "-l", point], timeout=20, check=False, capture_output=True)


@pytest.fixture(autouse=True)
def no_left_overs(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that leaves a mount or a process of ours behind fails, and it is cleaned away.

    What was there before the test (a room's own server or cluster) may be there after it.
    """
    os.umask(0o022)  # the core sets its own, in this process too where a test calls it
    mounts, processes = _mounts(), set(_our_processes())
    yield
    if _shared():
        return
    deadline = time.monotonic() + 20
    while True:
        left_mounts = {m for m in _mounts() - mounts if m[1] in OUR_TYPES}
        left_processes = {p: c for p, c in _our_processes().items() if p not in processes}
        if not left_mounts and not left_processes:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for point, _ in left_mounts:
        _abort(point)
    for pid in left_processes:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    pytest.fail(f"left behind: mounts {sorted(left_mounts)}, processes {left_processes}")


def _make_user(name: str, uid: int, subordinate: int) -> User:
    home = Path("/home") / name
    try:
        pwd.getpwnam(name)
    except KeyError:
        subprocess.run(
            ["useradd", "--uid", str(uid), "--home-dir", str(home), "--create-home", "--shell", "/bin/bash", name],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
    os.chmod(home, 0o700)
    for file in ("/etc/subuid", "/etc/subgid"):
        lines = [x for x in Path(file).read_text().splitlines() if not x.startswith(f"{name}:")]
        Path(file).write_text("\n".join([*lines, f"{name}:{subordinate}:65536"]) + "\n")
    record = pwd.getpwnam(name)
    return User(name, record.pw_uid, record.pw_gid, home)


def _remove_user(user: User) -> None:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if os.stat(f"/proc/{entry}").st_uid == user.uid:
                    os.kill(int(entry), signal.SIGKILL)
            except OSError:
                continue
    subprocess.run(["userdel", "--force", user.name], check=False, capture_output=True, timeout=60)
    shutil.rmtree(user.home, ignore_errors=True)


def _user(name: str, uid: int, subordinate: int) -> Iterator[User]:
    user = _make_user(name, uid, subordinate)
    try:
        yield user
    finally:
        if not _shared():
            _remove_user(user)


@pytest.fixture(scope="session")
def alice() -> Iterator[User]:
    """A user without privileges, with 65536 subordinate ids."""
    yield from _user("sdee-alice", 2101, 21010000)


@pytest.fixture(scope="session")
def bob() -> Iterator[User]:
    """A second one."""
    yield from _user("sdee-bob", 2102, 21110000)
