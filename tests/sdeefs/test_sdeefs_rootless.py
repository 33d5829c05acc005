"""A user without privileges: by fusermount3, and as root of a user namespace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import User

COMMAND = f"{sys.executable} -m sdeefs"
SCRIPT = """
set -e
cd {place}
export HOME={place} XDG_RUNTIME_DIR={place}/run
mkdir -m 700 -p run lower upper merged
echo 'of lower' > lower/file; mkdir -p lower/dir; echo inner > lower/dir/inner
trap '{command} umount --lazy merged 2>/dev/null || true' EXIT
{command} mount {options} upper lower merged
cat merged/file
echo changed > merged/file
rm -r merged/dir
mkdir merged/new
chmod 750 merged/new
stat -c '%u %a' merged/new
{command} status merged
{command} mount upper lower merged 2>&1 || echo "refused with $?"
{command} umount merged
trap - EXIT
{command} diff upper lower
{command} fsck upper lower
cat lower/file
"""


@pytest.fixture
def place(alice: User) -> Iterator[Path]:
    made = alice.home / "rootless"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    os.chown(made, alice.uid, alice.gid)
    try:
        yield made
    finally:
        point = str(made / "merged")
        subprocess.run(["umount", "-i", "-l", point], capture_output=True, timeout=20, check=False)
        shutil.rmtree(made, ignore_errors=True)


def run(user: User, place: Path, options: str, *enter: str) -> str:
    script = SCRIPT.format(place=place, command=COMMAND, options=options)
    done = subprocess.run(
        ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--init-groups",
         "env", "-i", "PATH=/usr/bin:/bin:/usr/sbin", *enter, "sh", "-c", script],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


CHANGES = "D dir\nC file\nA new/\nof lower\n"


@pytest.mark.parametrize("transport", ["device", "pyfuse3", "ring"])
def test_by_fusermount(alice: User, place: Path, transport: str) -> None:
    said = run(alice, place, f"--transport {transport}")
    assert said.startswith(f"of lower\n{alice.uid} 750\n")
    assert f"transport    {transport}" in said
    assert "in use" in said and "refused with 1" in said
    assert said.endswith(CHANGES)


@pytest.mark.parametrize("transport", ["device", "pyfuse3", "ring"])
def test_in_a_user_namespace(alice: User, place: Path, transport: str) -> None:
    enter = ("unshare", "--user", "--map-root-user", "--mount")
    said = run(alice, place, f"--transport {transport}", *enter)
    assert said.startswith("of lower\n0 750\n")
    assert said.endswith(CHANGES)
