"""fanotify marks on directories: who changed what, by handle and name, without privileges too."""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from mount_helpers import fanotify, syscalls
from mount_helpers.trials import in_child


def events(group: fanotify.Group, change: Callable[[], object]) -> list[fanotify.Event]:
    change()
    assert select.select([group.fd], [], [], 20)[0], "no event"
    return group.read()


@pytest.fixture
def watched(tmp_path: Path) -> tuple[Path, bytes]:
    (tmp_path / "sub").mkdir()
    (tmp_path / "file").write_text("x")
    return tmp_path, syscalls.name_to_handle_at(syscalls.AT_FDCWD, str(tmp_path))[0]


def check(place: Path, handle: bytes) -> str:
    group = fanotify.Group()
    fd = os.open(place, os.O_PATH)
    group.mark(fd)
    told = events(group, lambda: (place / "file").write_text("longer"))
    assert {(e.directory, e.name) for e in told} == {(handle, b"file")}
    assert all(e.mask & syscalls.FAN_MODIFY for e in told)
    assert events(group, (place / "file").unlink)[-1].mask & syscalls.FAN_DELETE
    told = events(group, lambda: (place / "sub").rename(place / "moved"))
    assert {e.name for e in told} == {b"sub", b"moved"}
    # A directory in it is told of by its own handle.
    told = events(group, lambda: (place / "moved").chmod(0o700))
    inner = syscalls.name_to_handle_at(syscalls.AT_FDCWD, str(place / "moved"))[0]
    assert (told[0].directory, told[0].name) == (inner, b".")
    assert told[0].mask & syscalls.FAN_ATTRIB
    told = events(group, lambda: place.chmod(0o711))
    assert (told[0].directory, told[0].name) == (handle, b".")
    group.unmark(fd)
    group.unmark(fd)
    (place / "unseen").touch()
    assert group.read() == []
    group.close()
    os.close(fd)
    return "seen"


def test_changes_are_told(watched: tuple[Path, bytes]) -> None:
    assert check(*watched) == "seen"


def test_changes_are_told_to_a_user(watched: tuple[Path, bytes]) -> None:
    place, handle = watched
    os.chown(place, 65534, 65534)
    for name in ("sub", "file"):
        os.chown(place / name, 65534, 65534)
    fd = os.open(place, os.O_PATH)

    def trial() -> str:
        os.setgid(65534)
        os.setuid(65534)
        return check(Path(f"/proc/self/fd/{fd}"), handle)

    assert in_child(trial, seconds=60) == (True, "seen")
    os.close(fd)


def test_an_overflow_is_told_and_nonsense_is_survived() -> None:
    metadata = struct.pack("=IBBHQii", 24, 3, 0, 24, syscalls.FAN_Q_OVERFLOW, -1, 0)
    (event,) = fanotify.parse(metadata)
    assert event.overflow and event.directory == b""
    assert list(fanotify.parse(b"")) == []
    assert list(fanotify.parse(b"\0" * 30)) == []
