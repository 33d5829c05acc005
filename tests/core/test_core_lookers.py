"""Who is told the attributes of what it lists: who looked up what it was told without."""

from __future__ import annotations

from sdeefs.core.api import Caller
from tests.core.core_lab import Core

LISTER, OTHER = Caller(0, 0, 41), Caller(0, 0, 42)


def told(core: Core, path: str, caller: Caller | None) -> dict[bytes, bool]:
    """The names of a directory, and whether each came with its attributes."""
    return {
        entry.name: found.node != 0
        for entry, found in core.fs.readdirplus(core.node(path), 0, caller)
        if entry.name not in (b".", b"..")
    }


def make(core: Core) -> None:
    for directory in ("one", "two"):
        (core.lower / directory / "deep").mkdir(parents=True)
        (core.lower / directory / "file").write_text("text")


def test_names_alone_until_one_is_looked_up(core: Core) -> None:
    make(core)
    assert told(core, "one", LISTER) == {b"deep": False, b"file": False}
    assert core.fs.counts()["nodes"] == 2  # the root and one
    core.fs.lookup(core.node("one"), b"file", LISTER)
    assert told(core, "two", LISTER) == {b"deep": False, b"file": True}
    core.fs.lookup(core.node("two"), b"deep", LISTER)
    assert told(core, "one", LISTER) == {b"deep": True, b"file": True}


def test_only_who_listed_learns(core: Core) -> None:
    make(core)
    told(core, "one", LISTER)
    core.fs.lookup(core.node("one"), b"file", OTHER)  # it found the name elsewhere
    core.fs.lookup(core.node("two"), b"file", LISTER)  # it hasn't listed this one
    core.fs.lookup(core.node("one"), b"missing", LISTER)
    assert told(core, "two", LISTER) == {b"deep": False, b"file": False}
    assert told(core, "two", OTHER) == {b"deep": False, b"file": False}


def test_without_a_caller_all_is_told(core: Core) -> None:
    make(core)
    assert told(core, "one", None) == {b"deep": True, b"file": True}


def test_what_needs_a_look_up_for_its_number_comes_whole(core: Core) -> None:
    make(core)
    core.write("one/file", b"copied up")
    core.write("one/new", b"")
    assert told(core, "one", LISTER) == {b"deep": False, b"file": True, b"new": True}
