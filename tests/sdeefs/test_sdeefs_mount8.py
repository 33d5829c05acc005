"""mount(8) with type fuse.sdeefs, lines of fstab, and remounting."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mount_helpers.mountinfo import mount_at
from tests.sdeefs.conftest import Lab, mounted

HELPER = Path("/sbin/mount.fuse.sdeefs")


@pytest.fixture(scope="module")
def helper() -> Iterator[Path]:
    """The helper where mount(8) looks for it."""
    ours = Path(sys.executable).with_name("mount.fuse.sdeefs")
    before = os.readlink(HELPER) if HELPER.is_symlink() else None
    if before is not None or HELPER.exists():
        HELPER.unlink()
    HELPER.symlink_to(ours)
    yield HELPER
    HELPER.unlink()
    if before is not None:
        HELPER.symlink_to(before)


def run(*words: str | Path, status: int = 0) -> str:
    done = subprocess.run(
        [str(w) for w in words], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == status, (words, done.returncode, done.stdout, done.stderr)
    return done.stderr


def layers(lab: Lab) -> str:
    lab.work.mkdir(exist_ok=True)
    return f"lowerdir={lab.lower},upperdir={lab.upper},workdir={lab.work}"


def test_mount_and_umount(lab: Lab, helper: Path) -> None:
    options = layers(lab) + ",allow_other,nosuid,x-test.word=1"
    run("mount", "-t", "fuse.sdeefs", "a source", lab.merged, "-o", options)
    mount = mount_at(str(lab.merged))
    assert mount is not None
    assert (mount.source, mount.fstype) == (b"a source", "fuse.sdeefs")
    assert "nosuid" in mount.options and "allow_other" in mount.super_options
    (lab.merged / "new").write_text("x")
    pid = lab.pid()
    run("umount", lab.merged)
    lab.ended(pid)
    assert (lab.upper / "new").read_text() == "x"


def test_a_line_of_fstab(lab: Lab, helper: Path) -> None:
    fstab = lab.place / "fstab"
    fstab.write_text(
        f"overlay-of-test {lab.merged} fuse.sdeefs noauto,nofail,_netdev,{layers(lab)} 0 0\n"
    )
    run("mount", "-T", fstab, lab.merged)
    assert mounted(lab.merged)
    (lab.merged / "new").touch()
    pid = lab.pid()
    run("umount", lab.merged)
    lab.ended(pid)
    assert (lab.upper / "new").exists()


def test_failures_have_the_exit_codes_of_mount(lab: Lab, helper: Path) -> None:
    said = run("mount", "-t", "fuse.sdeefs", "s", lab.merged, "-o", "lowerdir=/no/such", status=32)
    assert "/no/such" in said
    said = run("mount", "-t", "fuse.sdeefs", "s", lab.merged, "-o", "lowerdir=/,fast", status=1)
    assert "'fast'" in said
    run("mount", "-s", "-t", "fuse.sdeefs", "s", lab.merged, "-o", f"fast,{layers(lab)}")
    pid = lab.pid()
    run("umount", lab.merged)
    lab.ended(pid)


def test_read_only_and_back(lab: Lab, helper: Path) -> None:
    run("mount", "-t", "fuse.sdeefs", "s", lab.merged, "-o", layers(lab))
    pid = lab.pid()
    run("mount", "-o", "remount,ro", lab.merged)
    with pytest.raises(OSError, match="Read-only"):
        (lab.merged / "x").touch()
    run("mount", "-o", "remount,rw", lab.merged)
    (lab.merged / "x").touch()
    run("umount", lab.merged)
    lab.ended(pid)
    run("mount", "-r", "-t", "fuse.sdeefs", "s", lab.merged, "-o", layers(lab))
    pid = lab.pid()
    with pytest.raises(OSError, match="Read-only"):
        (lab.merged / "y").touch()
    run("umount", lab.merged)
    lab.ended(pid)


def test_as_the_program_of_a_fuse_type(lab: Lab) -> None:
    """libfuse's mount.fuse runs `sdeefs SOURCE MERGED -o …`."""
    lab.sdeefs("some source", lab.merged, "-o", f"rw,dev,suid,{layers(lab)}")
    mount = mount_at(str(lab.merged))
    assert mount is not None and mount.source == b"some source"
    lab.umount()
