"""The watch without a mount: what it does when marks run out, and when events are lost."""

from __future__ import annotations

import errno
import os
import select
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from mount_helpers import fanotify, syscalls
from sdeefs.core.api import ROOT_NODE, Caller
from sdeefs.core.filesystem import Filesystem
from sdeefs.core.settings import Settings
from sdeefs.watch import Watch

CALLER = Caller(0, 0, 1)


class Kernel:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def invalidate_inode(self, node: int, attributes_only: bool = False) -> None:
        self.told.append((node, attributes_only))

    def invalidate_entry(self, parent: int, name: bytes) -> None:
        self.told.append((parent, name))


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Filesystem]:
    for number in range(6):
        (tmp_path / "lower" / f"d{number}").mkdir(parents=True)
    filesystem = Filesystem(Settings((os.fsencode(tmp_path / "lower"),), read_only=True))
    yield filesystem
    filesystem.close()


@pytest.fixture
def watch(core: Filesystem) -> Iterator[Watch]:
    made = Watch.open(core)
    made.kernel = Kernel()
    yield made
    made.close()


def told(watch: Watch) -> list[tuple[object, ...]]:
    assert isinstance(watch.kernel, Kernel)
    return watch.kernel.told


def test_a_change_becomes_invalidations_now_and_once_more(
    core: Filesystem, watch: Watch, tmp_path: Path
) -> None:
    entry = core.lookup(ROOT_NODE, b"d1", CALLER)
    assert entry.entry_timeout == core.settings.upper_timeout
    (tmp_path / "lower" / "d1" / "new").touch()
    assert select.select([watch.fd], [], [], 20)[0]
    watch.read()
    first = list(told(watch))
    assert (entry.node, b"new") in first
    assert (entry.node, False) in first
    while (rest := watch.repeat()) is not None:
        select.select([], [], [], rest)
    assert told(watch) == first * 2
    core.forget(entry.node, 1)
    told(watch).clear()
    (tmp_path / "lower" / "d1" / "unseen").touch()
    select.select([watch.fd], [], [], 0.1)
    watch.read()
    assert (entry.node, b"unseen") not in told(watch)


def test_marks_that_run_out_bring_short_timeouts_back(
    core: Filesystem, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: fanotify.Group, directory: int) -> None:
        raise OSError(errno.ENOSPC, "no more marks")

    assert core.lookup(ROOT_NODE, b"d0", CALLER).entry_timeout > 1000
    monkeypatch.setattr(fanotify.Group, "mark", refuse)
    assert core.lookup(ROOT_NODE, b"d1", CALLER).entry_timeout == core.settings.lower_timeout
    assert core.lookup(ROOT_NODE, b"absent", CALLER).entry_timeout == core.settings.lower_timeout


def test_listings_are_not_kept_once_marks_run_out(
    core: Filesystem, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel opens directories by itself then, so it keeps all entries until it is told."""

    def refuse(self: fanotify.Group, directory: int) -> None:
        raise OSError(errno.ENOSPC, "no more marks")

    core.kernel = kernel = Kernel()
    assert core.spares_opendir()
    assert len(list(core.readdir(ROOT_NODE, 0))) == 8
    assert kernel.told == []
    monkeypatch.setattr(fanotify.Group, "mark", refuse)
    node = core.lookup(ROOT_NODE, b"d1", CALLER).node
    assert len(list(core.readdir(node, 0))) == 2
    assert kernel.told == [(node, False)]
    assert core.spares_opendir()  # asked at the same time as the first one


def test_a_lower_that_cannot_be_marked_is_not_watched(
    core: Filesystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: fanotify.Group, directory: int) -> None:
        raise OSError(errno.EXDEV, "no handles here")

    monkeypatch.setattr(fanotify.Group, "mark", refuse)
    with pytest.raises(OSError, match="no handles"):
        Watch.open(core)
    assert core.lookup(ROOT_NODE, b"d1", CALLER).entry_timeout == core.settings.lower_timeout


def test_lost_events_make_everything_looked_up_again(
    core: Filesystem, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = {name: core.lookup(ROOT_NODE, name, CALLER).node for name in (b"d0", b"d1")}
    lost = struct.pack("=IBBHQii", 24, 3, 0, 24, syscalls.FAN_Q_OVERFLOW, -1, 0)
    answers = [list(fanotify.parse(lost)), []]
    monkeypatch.setattr(watch._group, "read", lambda: answers.pop(0))
    watch.read()
    for name, node in nodes.items():
        assert (ROOT_NODE, name) in told(watch)
        assert (node, False) in told(watch)
    assert core.lookup(ROOT_NODE, b"d2", CALLER).entry_timeout == core.settings.lower_timeout
