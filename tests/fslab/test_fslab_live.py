"""Changes of lower under a live mount are seen in merged: with fanotify, and without it by time-outs.

Each wait has a long deadline; that it takes no more than a second is the benchmark's to say.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fslab import fslab_lab as lab

#: Every wait of this module is for this time-out then.
NO_WATCH = ("watch=off", "lower_timeout=0.2")
ENGINES = lab.chosen(
    lab.RING, lab.PASSTHROUGH, lab.WRITEBACK, lab.PYFUSE3,
    *(e.with_options(*NO_WATCH) for e in lab.chosen(lab.RING, lab.PYFUSE3)),
)  # fmt: skip


@dataclass
class Live:
    """A mount whose lower changes while merged has been looked at."""

    lower: Path
    merged: Path
    mounted: lab.Mounted

    def until(self, condition: Callable[[], bool], what: str) -> None:
        def holds() -> bool:
            try:
                return condition()
            except FileNotFoundError:
                return False

        lab.wait_for(holds, what, self.mounted.alive)


@pytest.fixture(scope="module", params=ENGINES, ids=lambda engine: engine.name)
def live(request: pytest.FixtureRequest) -> Iterator[Live]:
    with lab.workspace("live") as base:
        layers = lab.Layers.make(base)
        with lab.mounted(request.param, layers) as mounted:
            yield Live(layers.lowers[0], layers.merged, mounted)


def area(live: Live, name: str) -> tuple[Path, Path]:
    """A directory of lower, and the same in merged, known to the kernel."""
    lower, merged = live.lower / name, live.merged / name
    os.listdir(live.merged)
    assert not merged.exists()  # a negative entry, too
    lower.mkdir()
    live.until(merged.is_dir, f"{name} appears")
    return lower, merged


def test_created_and_removed(live: Live) -> None:
    lower, merged = area(live, "created")
    assert os.listdir(merged) == []
    assert not (merged / "f").exists()
    (lower / "f").write_text("one")
    (lower / "d").mkdir()
    (lower / "d/inner").write_text("two")
    live.until(lambda: (merged / "f").read_text() == "one", "a new file")
    live.until(lambda: (merged / "d/inner").read_text() == "two", "a file in a new directory")
    live.until(lambda: sorted(os.listdir(merged)) == ["d", "f"], "both are listed")
    (lower / "f").unlink()
    (lower / "d/inner").unlink()
    (lower / "d").rmdir()
    live.until(lambda: not (merged / "f").exists(), "the file is gone")
    live.until(lambda: not (merged / "d").exists(), "the directory is gone")
    live.until(lambda: os.listdir(merged) == [], "nothing is listed")


def test_changed_content_and_attributes(live: Live) -> None:
    lower, merged = area(live, "changed")
    (lower / "f").write_text("before")
    live.until(lambda: (merged / "f").read_text() == "before", "the file")
    (lower / "f").write_text("after, and longer")
    live.until(lambda: (merged / "f").read_text() == "after, and longer", "new content")
    live.until(lambda: (merged / "f").stat().st_size == 17, "new size")
    (lower / "f").chmod(0o751)
    os.chown(lower / "f", 12, 34)
    live.until(lambda: (merged / "f").stat().st_mode & 0o777 == 0o751, "new mode")
    live.until(lambda: (merged / "f").stat().st_uid == 12, "new owner")
    lower.chmod(0o711)
    live.until(lambda: merged.stat().st_mode & 0o777 == 0o711, "the directory's new mode")


def test_replaced(live: Live) -> None:
    lower, merged = area(live, "replaced")
    (lower / "f").write_text("the first")
    live.until(lambda: (merged / "f").read_text() == "the first", "the file")
    with open(merged / "f") as held:
        (lower / "f.new").write_text("the second one")
        os.rename(lower / "f.new", lower / "f")
        live.until(lambda: (merged / "f").read_text() == "the second one", "the new file")
        assert held.read() == "the first"  # an open file goes on working
    live.until(lambda: os.listdir(merged) == ["f"], "one name")
    (lower / "f").unlink()
    (lower / "f").mkdir()
    live.until(lambda: (merged / "f").is_dir(), "a directory in the file's place")
    (lower / "f").rmdir()
    os.symlink("somewhere", lower / "f")
    live.until(lambda: (merged / "f").is_symlink(), "a symlink in its place")


def test_renamed_directories(live: Live) -> None:
    lower, merged = area(live, "renamed")
    (lower / "a/b").mkdir(parents=True)
    (lower / "a/b/f").write_text("F")
    live.until(lambda: (merged / "a/b/f").read_text() == "F", "the file")
    os.rename(lower / "a", lower / "z")
    live.until(lambda: (merged / "z/b/f").read_text() == "F", "under the new name")
    live.until(lambda: not (merged / "a/b/f").exists(), "not under the old one")
    (lower / "z/b/f").write_text("G")
    live.until(lambda: (merged / "z/b/f").read_text() == "G", "changed below the new name")


def test_what_upper_has_stays(live: Live) -> None:
    lower, merged = area(live, "kept")
    for name in ("changed", "removed", "other"):
        (lower / name).write_text("lower")
    live.until(lambda: len(os.listdir(merged)) == 3, "three files")
    (merged / "changed").write_text("mine")
    (merged / "removed").unlink()
    (merged / "added").write_text("mine")
    for name in ("changed", "removed", "added", "other"):
        (lower / name).write_text("lower again")
    live.until(lambda: (merged / "other").read_text() == "lower again", "what upper hasn't")
    assert (merged / "changed").read_text() == "mine"
    assert (merged / "added").read_text() == "mine"
    assert not (merged / "removed").exists()
    assert sorted(os.listdir(merged)) == ["added", "changed", "other"]


def test_names_never_swap_their_data(live: Live) -> None:
    lower, merged = area(live, "swapped")
    for number in range(20):
        (lower / f"f{number}").write_text(f"content of inode {number}")
    live.until(lambda: len(os.listdir(merged)) == 20, "the files")
    for _ in range(10):
        for number in range(0, 20, 2):
            os.rename(lower / f"f{number}", lower / "t")
            os.rename(lower / f"f{number + 1}", lower / f"f{number}")
            os.rename(lower / "t", lower / f"f{number + 1}")
        for number in range(20):
            try:
                text = (merged / f"f{number}").read_text()
            except FileNotFoundError:
                continue
            pair = {number, number ^ 1}
            assert text in {f"content of inode {n}" for n in pair}
    for number in range(20):
        live.until(
            lambda number=number: (
                (merged / f"f{number}").read_text() == (lower / f"f{number}").read_text()
            ),
            "names and data agree",
        )


def test_hammered(live: Live) -> None:
    """Lower changes all the time while merged is read and written: no error but ENOENT."""
    lower, merged = area(live, "hammered")
    for round_ in range(40):
        for number in range(8):
            path = lower / f"f{number}"
            if (round_ + number) % 3:
                path.write_text("x" * number)
            else:
                path.unlink(missing_ok=True)
        for name in os.listdir(merged):
            try:
                (merged / name).read_bytes()
                if round_ % 10 == 9 and name == "f1":
                    (merged / name).write_text("mine")
            except FileNotFoundError:
                continue
        live.mounted.alive()
    live.until(lambda: (merged / "f1").read_text() == "mine", "what was written")
