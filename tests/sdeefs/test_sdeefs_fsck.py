"""`sdeefs fsck`: each thing that can be wrong in an upper, found and mended."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def layers(tmp_path: Path) -> tuple[Path, Path, Path]:
    upper, lower, work = tmp_path / "upper", tmp_path / "lower", tmp_path / "upper.work"
    for directory in (upper, lower, work, work / "work", work / "index", lower / "dir"):
        directory.mkdir()
    (work / "index" / "00fb").touch()
    return upper, lower, work


def fsck(*words: str | Path) -> tuple[int, dict[str, dict[str, object]]]:
    done = subprocess.run(
        [sys.executable, "-m", "sdeefs", "fsck", "--json", *map(str, words)],
        capture_output=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    assert not done.stderr, done.stderr
    found = json.loads(done.stdout)["findings"]
    return done.returncode, {f"{f['path']}": f for f in found}


def test_a_good_upper(layers: tuple[Path, Path, Path]) -> None:
    upper, lower, _ = layers
    os.mknod(upper / "gone", stat.S_IFCHR, 0)
    (upper / "dir").mkdir()
    os.setxattr(upper / "dir", "trusted.overlay.opaque", b"y")
    os.setxattr(upper / "dir", "trusted.overlay.origin", b"\0\xfb")
    os.setxattr(upper / "dir", "trusted.overlay.overlay.opaque", b"nested")
    os.setxattr(upper / "dir", "trusted.overlay.sdeefs.secret", b"y")
    assert fsck(upper) == (0, {})
    assert fsck(upper, lower) == (0, {})


def test_everything_that_can_be_mended(layers: tuple[Path, Path, Path]) -> None:
    upper, lower, work = layers
    (work / "work" / "#1f").write_text("half a file")
    (work / "work" / "#20").mkdir()
    (work / "work" / "#20" / "x").touch()
    for name in ("file", "full", "lonely"):
        (upper / name).touch()
    for name in ("odd", "lost", "bad"):
        (upper / name).mkdir()
    os.setxattr(upper / "file", "trusted.overlay.opaque", b"y")
    os.setxattr(upper / "odd", "trusted.overlay.opaque", b"maybe")
    (upper / "full").write_text("data")
    os.setxattr(upper / "full", "user.overlay.whiteout", b"y")
    os.setxattr(upper / "lonely", "user.overlay.whiteout", b"y")
    os.setxattr(upper / "lost", "trusted.overlay.redirect", b"/no/where")
    os.setxattr(upper / "bad", "trusted.overlay.redirect", b"a/b")
    os.setxattr(upper / "bad", "trusted.overlay.invention", b"1")
    status, found = fsck(upper, lower)
    assert status == 1
    assert set(found) == {
        f"{work}/work/#1f", f"{work}/work/#20", "file", "odd", "full", "lonely", "lost", "bad"
    }  # fmt: skip
    assert all(f["repair"] for f in found.values())
    status, again = fsck(upper, lower, "--repair")
    assert status == 0
    assert set(again) == set(found)
    assert all(f["repaired"] for f in again.values())
    assert fsck(upper, lower) == (0, {})
    assert os.getxattr(upper, "user.overlay.opaque") == b"x"
    assert (upper / "full").read_text() == "data"
    assert os.listdir(work / "work") == []
    assert os.listdir(work / "index") == ["00fb"]


def test_what_only_a_person_can_decide(layers: tuple[Path, Path, Path]) -> None:
    upper, _, _ = layers
    (upper / "file").touch()
    os.setxattr(upper / "file", "trusted.overlay.metacopy", b"")
    status, found = fsck(upper, "--repair")
    assert status == 1
    assert not found["file"]["repaired"]


def test_redirects_that_lead_somewhere(layers: tuple[Path, Path, Path]) -> None:
    upper, lower, _ = layers
    (upper / "moved").mkdir()
    os.setxattr(upper / "moved", "trusted.overlay.redirect", b"dir")
    (lower / "dir" / "sub").mkdir()
    (upper / "moved" / "again").mkdir()
    os.setxattr(upper / "moved" / "again", "trusted.overlay.redirect", b"sub")
    assert fsck(upper, lower) == (0, {})


def test_a_missing_upper_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sdeefs", "fsck", str(tmp_path / "absent")],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "absent" in done.stderr
