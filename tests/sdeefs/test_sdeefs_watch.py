"""Changes of lower under a live mount are seen in merged, told by fanotify or by time-outs."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sdeefs.conftest import Lab, wait_until


def seen(condition: Callable[[], object], what: str) -> None:
    """Wait for a change to be seen. A second is promised; a crowded machine gets more."""
    wait_until(condition, what, seconds=20)


def text(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


@pytest.mark.parametrize("watch", ["on", "off"])
@pytest.mark.parametrize(
    ("transport", "path"),
    [
        ("device", "passthrough=on"),
        ("device", "writeback=on"),
        ("ring", "passthrough=on"),
        ("ring", "writeback=on"),
        ("pyfuse3", "writeback=on"),
        ("pyfuse3", "writeback=off"),
    ],
)
def test_changes_of_lower_are_seen(lab: Lab, transport: str, watch: str, path: str) -> None:
    lower, merged = lab.lower, lab.merged
    (lower / "dir" / "deep").mkdir()
    # The second that a lower is believed by default is waited for once.
    default = watch == "on" or (transport, path) == ("device", "passthrough=on")
    timeout = "" if default else ",lower_timeout=0.2"
    lab.mount("--transport", transport, "-o", f"watch={watch},{path}{timeout}")
    told = lab.status()["watched"]
    assert (told is not None and int(str(told)) >= 1) == (watch == "on")
    # Everything that changes below has been asked for before, and is cached.
    assert text(merged / "file") == "of lower\n"
    assert not (merged / "created").exists()
    assert not (merged / "dir" / "deep" / "created").exists()
    assert os.listdir(merged / "dir") != []
    assert (merged / "dir" / "inner").stat().st_mode & 0o777 != 0o600

    (lower / "created").write_text("1")
    seen(lambda: text(merged / "created") == "1", "a created file")
    (lower / "dir" / "deep" / "created").write_text("2")
    seen(lambda: text(merged / "dir" / "deep" / "created") == "2", "one deep down")
    seen(lambda: os.listdir(merged / "dir" / "deep") == ["created"], "it in the listing")
    (lower / "file").write_text("longer than it was\n")
    seen(lambda: text(merged / "file") == "longer than it was\n", "changed contents")
    (lower / "dir" / "inner").chmod(0o600)
    seen(lambda: (merged / "dir" / "inner").stat().st_mode & 0o777 == 0o600, "a changed mode")
    (lower / "dir").chmod(0o711)
    seen(lambda: (merged / "dir").stat().st_mode & 0o777 == 0o711, "a directory's changed mode")
    (lower / "created").unlink()
    seen(lambda: text(merged / "created") is None, "a removed file")
    replacement = lower / "replacement"
    replacement.write_text("another\n")
    replacement.rename(lower / "file")
    seen(lambda: text(merged / "file") == "another\n", "a replaced file")
    shutil.rmtree(lower / "dir")
    seen(lambda: not (merged / "dir").exists(), "a removed directory")
    (lower / "dir").write_text("a file now")
    seen(lambda: text(merged / "dir") == "a file now", "another type")
    lab.umount()


def test_an_open_file_of_lower_keeps_working(lab: Lab) -> None:
    lab.mount()
    with open(lab.merged / "file") as held:
        (lab.lower / "file").unlink()
        (lab.lower / "file").write_text("another\n")
        assert held.read() == "of lower\n"
        seen(lambda: text(lab.merged / "file") == "another\n", "the new file")
    lab.umount()


def test_what_upper_has_is_not_changed_by_lower(lab: Lab) -> None:
    lab.mount()
    (lab.merged / "file").write_text("ours\n")
    (lab.merged / "dir" / "inner").unlink()
    (lab.lower / "file").write_text("theirs\n")
    (lab.lower / "dir" / "inner").write_text("again")
    (lab.lower / "dir" / "other").write_text("other")
    seen(lambda: text(lab.merged / "dir" / "other") == "other", "a file beside a whiteout")
    assert text(lab.merged / "file") == "ours\n"
    assert text(lab.merged / "dir" / "inner") is None
    lab.umount()


def test_a_watched_lower_is_believed_for_long(lab: Lab) -> None:
    """With the watch on, looking again asks the server nothing, even after the short time-out."""
    lab.mount("-o", "watch=on,lower_timeout=0.01", "--transport", "device")
    (lab.merged / "file").stat()
    time.sleep(0.1)
    before = dict(lab.status()["requests"])  # type: ignore[call-overload]
    for _ in range(20):
        (lab.merged / "file").stat()
    after = dict(lab.status()["requests"])  # type: ignore[call-overload]
    assert after.get("lookup", 0) == before.get("lookup", 0)
    assert after.get("getattr", 0) == before.get("getattr", 0)
    lab.umount()


@pytest.mark.parametrize("transport", ["device", "ring"])
@pytest.mark.parametrize("watch", ["on", "off"])
def test_a_watched_directory_is_opened_without_asking(lab: Lab, watch: str, transport: str) -> None:
    """And listed from the kernel's memory until something changes, here or below."""
    merged, deep = lab.merged, lab.lower / "dir" / "deep"
    deep.mkdir()
    lab.mount("-o", f"watch={watch}", "--transport", transport)

    def asked() -> tuple[int, int]:
        requests = dict(lab.status()["requests"])  # type: ignore[call-overload]
        pages = requests.get("readdir", 0) + requests.get("readdirplus", 0)
        return requests.get("opendir", 0), pages

    for path in (merged, merged / "dir", merged / "dir" / "deep"):
        os.listdir(path)
    first = asked()
    for _ in range(5):
        os.listdir(merged / "dir")
    again = asked()
    if watch == "on":
        assert first[0] == 1
        assert again == first
    else:
        assert again[0] >= first[0] + 5
    (merged / "dir" / "deep" / "ours").touch()
    assert os.listdir(merged / "dir" / "deep") == ["ours"]
    (deep / "theirs").touch()
    seen(lambda: sorted(os.listdir(merged / "dir" / "deep")) == ["ours", "theirs"], "both")
    lab.umount()


def test_forgotten_directories_are_not_watched(lab: Lab) -> None:
    for number in range(50):
        (lab.lower / "dir" / f"d{number}").mkdir()
    lab.mount("-o", "watch=on")
    for entry in os.scandir(lab.merged / "dir"):
        if entry.is_dir():
            os.listdir(entry)
    held = int(str(lab.status()["watched"]))
    assert held >= 52
    shutil.rmtree(lab.merged / "dir")
    wait_until(lambda: int(str(lab.status()["watched"])) < held - 45, "fewer marks")
    lab.umount()


@pytest.mark.parametrize("watch", ["on", "off"])
def test_a_directory_that_becomes_a_secret(lab: Lab, watch: str) -> None:
    """Also what was looked up in it before is gone, and comes back when it is readable again."""
    lower, merged = lab.lower, lab.merged
    (lower / "dir" / "deep").mkdir()
    (lower / "dir" / "deep" / "file").write_text("deep")
    lab.mount("-o", f"watch={watch},secrets=2101:2101")
    assert text(merged / "dir" / "inner") is not None
    assert text(merged / "dir" / "deep" / "file") == "deep"
    assert "inner" in os.listdir(merged / "dir")
    (lower / "dir").chmod(0o700)
    seen(lambda: os.listdir(merged / "dir") == [], "an empty directory")
    seen(lambda: text(merged / "dir" / "inner") is None, "that a known file is gone")
    seen(lambda: text(merged / "dir" / "deep" / "file") is None, "that one below it is gone")
    (lower / "dir" / "new").write_text("new")
    assert text(merged / "dir" / "new") is None
    (lower / "dir").chmod(0o755)
    seen(lambda: text(merged / "dir" / "new") == "new", "it again")
