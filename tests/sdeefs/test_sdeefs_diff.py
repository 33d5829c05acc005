"""`sdeefs diff` and `fsck` over layers that are made by hand: no mount, no server."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sdeefs.diff import differences
from sdeefs.diff_command import line


@pytest.fixture
def layers(tmp_path: Path) -> tuple[Path, Path]:
    upper, lower = tmp_path / "upper", tmp_path / "lower"
    for directory in (upper, lower, lower / "dir", lower / "dir" / "deep", lower / "gone"):
        directory.mkdir()
    for name in ("same", "changed", "removed", "dir/inner", "dir/deep/leaf", "kind"):
        (lower / name).write_text(f"{name} in lower")
    (lower / "link").symlink_to("same")
    return upper, lower


def whiteout(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))


def lines(upper: Path, *lowers: Path, prefix: bool = False) -> list[str]:
    found = differences(os.fsencode(upper), [os.fsencode(p) for p in lowers], prefix=prefix)
    return [line(d).decode() for d in found]


def test_an_empty_upper_changes_nothing(layers: tuple[Path, Path]) -> None:
    assert lines(*layers) == []


def test_each_kind_of_difference(layers: tuple[Path, Path]) -> None:
    upper, lower = layers
    (upper / "added").write_text("x")
    (upper / "new").mkdir()
    (upper / "new" / "file").write_text("x")
    (upper / "changed").write_text("other")
    whiteout(upper / "removed")
    whiteout(upper / "gone")
    (upper / "kind").mkdir()
    (upper / "link").symlink_to("elsewhere")
    (upper / "dir").mkdir()
    (upper / "dir" / "deep").mkdir()
    os.setxattr(upper / "dir" / "deep", "user.overlay.opaque", b"y")
    (upper / "dir" / "deep" / "leaf").write_text("again")
    assert lines(upper, lower) == [
        "A added",
        "C changed",
        "O dir/deep/",
        "A dir/deep/leaf",
        "D gone",
        "T kind/  (file -> directory)",
        "C link",
        "A new/",
        "A new/file",
        "D removed",
    ]


def test_whiteouts_in_xattrs_and_by_prefix(layers: tuple[Path, Path]) -> None:
    upper, lower = layers
    os.setxattr(upper, "user.overlay.opaque", b"x")
    (upper / "removed").touch()
    os.setxattr(upper / "removed", "user.overlay.whiteout", b"y")
    (upper / "dir").mkdir()
    (upper / "dir" / ".wh.inner").touch()
    (upper / "dir" / "deep").mkdir()
    (upper / "dir" / "deep" / ".wh..wh..opq").touch()
    assert lines(upper, lower) == [
        "A dir/.wh.inner", "A dir/deep/.wh..wh..opq", "D removed"
    ]  # fmt: skip
    assert lines(upper, lower, prefix=True) == ["D dir/inner", "O dir/deep/", "D removed"]


def test_what_was_copied_up_without_change_is_no_difference(layers: tuple[Path, Path]) -> None:
    upper, lower = layers
    subprocess.run(["cp", "-a", f"{lower}/.", str(upper)], check=True, timeout=20)
    assert lines(upper, lower) == []
    os.setxattr(upper / "same", "user.mine", b"1")
    (upper / "changed").chmod(0o600)
    os.chown(upper / "dir", 1, 2)
    whiteout(upper / "never was")
    assert lines(upper, lower) == ["C changed", "C dir/", "C same"]


def test_moved_directories(layers: tuple[Path, Path]) -> None:
    upper, lower = layers
    (upper / "renamed").mkdir()
    os.setxattr(upper / "renamed", "trusted.overlay.redirect", b"dir")
    whiteout(upper / "dir")
    whiteout(upper / "renamed" / "inner")
    (upper / "renamed" / "moved deep").mkdir()
    os.setxattr(upper / "renamed" / "moved deep", "trusted.overlay.redirect", b"/dir/deep")
    assert lines(upper, lower) == [
        "D dir",
        "R renamed/  (from dir/)",
        "D renamed/inner",
        "R renamed/moved deep/  (from dir/deep/)",
    ]


def test_owners_in_xattrs_are_those_of_merged(layers: tuple[Path, Path]) -> None:
    upper, lower = layers
    source = lower / "same"
    os.chown(source, 12, 34)
    subprocess.run(["cp", "-a", str(source), str(upper)], check=True, timeout=20)
    os.chown(upper / "same", 0, 0)
    assert lines(upper, lower) == ["C same"]
    mode = stat.S_IMODE(source.stat().st_mode)
    os.setxattr(upper / "same", "user.containers.override_stat", f"12:34:0{mode:o}".encode())
    assert lines(upper, lower) == []


def test_several_lowers(layers: tuple[Path, Path], tmp_path: Path) -> None:
    upper, lower = layers
    middle = tmp_path / "middle"
    middle.mkdir()
    whiteout(middle / "removed")
    (middle / "dir").mkdir()
    os.setxattr(middle / "dir", "trusted.overlay.opaque", b"y")
    (upper / "removed").write_text("x")
    whiteout(upper / "changed")
    (upper / "dir").mkdir()
    whiteout(upper / "dir" / "inner")
    assert lines(upper, middle, lower) == ["D changed", "A removed"]


def test_names_that_are_no_text(layers: tuple[Path, Path]) -> None:
    upper, lower = layers
    with open(os.fsencode(upper) + b"/\xff\n", "wb"):
        pass
    done = subprocess.run(
        [sys.executable, "-m", "sdeefs", "diff", "--json", str(upper), str(lower)],
        capture_output=True, check=True, timeout=30,
    )  # fmt: skip
    changes = json.loads(done.stdout)["changes"]
    assert changes == [{"change": "added", "path": "\udcff\n", "kind": "file"}]
    done = subprocess.run(
        [sys.executable, "-m", "sdeefs", "diff", str(upper), str(lower)],
        capture_output=True, check=True, timeout=30,
    )  # fmt: skip
    assert done.stdout == b"A \xff\n\n"
