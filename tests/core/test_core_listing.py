"""Reading directories: complete, stable under changes, and with st_ino's numbers."""

from __future__ import annotations

import os
import stat
from itertools import islice

from sdeefs.core.api import ROOT_NODE, DirectoryEntry
from sdeefs.core.listing import cookie
from tests.core.core_lab import Core


def page(core: Core, offset: int = 0, limit: int = 1 << 30) -> list[DirectoryEntry]:
    """So many entries of the root behind an offset."""
    return list(islice(core.fs.readdir(ROOT_NODE, offset), limit))


def names(entries: list[DirectoryEntry]) -> list[bytes]:
    return [entry.name for entry in entries]


def test_a_hundred_thousand_entries(core: Core) -> None:
    count = 100_000 if "shm" in str(core.base) else 5_000
    for number in range(count):
        os.close(os.open(core.lower / f"file{number}", os.O_CREAT | os.O_WRONLY))
    core.unlink("file7")
    core.write("new", b"")
    seen: list[bytes] = []
    offset = 0
    while entries := page(core, offset, 4000):
        seen += names(entries)
        offset = entries[-1].next_offset
    assert len(seen) == len(set(seen)) == count + 2
    assert b"file7" not in seen and b"new" in seen


def test_a_listing_survives_changes(core: Core) -> None:
    for letter in "abcdefgh":
        (core.lower / letter).write_text("")
    first = page(core, limit=6)
    core.unlink("a")
    core.write("new", b"")
    core.write("b", b"copied up")
    rest = page(core, first[-1].next_offset)
    assert len(set(names(first + rest))) == len(first + rest) == 10
    again = page(core)
    assert sorted(names(again[2:])) == [b"b", b"c", b"d", b"e", b"f", b"g", b"h", b"new"]


def test_offsets_outlive_the_list_that_they_are_of(core: Core) -> None:
    """Nobody says when a directory is closed, so a list may be another's, or gone."""
    for number in range(40):
        (core.lower / f"f{number}").write_text("")
    whole = page(core)
    for place in range(1, len(whole)):
        behind = whole[place - 1].next_offset
        assert page(core) == whole  # another reader begins
        assert page(core, behind) == whole[place:]
        assert page(core, whole[-1].next_offset) == []  # and one is done
        assert page(core, behind) == whole[place:]
    half = whole[20].next_offset
    gone, kept = names(whole[19:23]), set(names(whole[23:]))
    for name in gone:  # also the one that the offset is of
        core.unlink(os.fsdecode(name))
    assert page(core)[:1] == whole[:1]
    assert set(names(page(core, half))) == kept
    core.open()
    assert set(names(page(core, half))) == kept


def test_every_mount_lists_in_the_same_order() -> None:
    """Programs that take files as they come do the same on each node, and tomorrow."""
    # Test vectors of draft-eastlake-fnv.
    assert cookie(b"a") == 0xAF63DC4C8601EC8C & (1 << 63) - 1
    assert cookie(b"foobar") == 0x85944171F73967E8 & (1 << 63) - 1


def test_lists_of_readers_that_stay_away_are_dropped(core: Core) -> None:
    for number in range(100):
        (core.lower / f"d{number}" / "deep").mkdir(parents=True)
    nodes = [core.node(f"d{number}") for number in range(100)]
    begun = [next(iter(core.fs.readdir(node, 0))).next_offset for node in nodes]
    for node, offset in zip(nodes, begun, strict=True):
        assert names(list(core.fs.readdir(node, offset))) == [b"..", b"deep"]


def test_entries_with_attributes_count_as_lookups(core: Core) -> None:
    (core.lower / "d").mkdir()
    (core.lower / "f").write_text("text")
    os.mkfifo(core.lower / "p")
    core.write("u", b"upper")
    found = {e.name: (e, entry) for e, entry in core.fs.readdirplus(ROOT_NODE, 0)}
    assert found[b"."][1].node == found[b".."][1].node == 0
    for name, size in ((b"f", 4), (b"u", 5)):
        entry, plus = found[name]
        assert plus.attributes is not None and plus.attributes.size == size
        assert entry.ino == plus.attributes.ino and entry.kind == stat.S_IFREG
    assert found[b"p"][0].kind == stat.S_IFIFO
    assert core.fs.counts()["nodes"] == 5
    for name in (b"d", b"f", b"p", b"u"):
        core.fs.forget(found[name][1].node, 2 if name == b"u" else 1)  # u: also by its creation
    assert core.fs.counts()["nodes"] == 1


def test_a_removed_name_is_left_out_of_pages_with_attributes(core: Core) -> None:
    for letter in "abc":
        (core.lower / letter).write_text("")
    iterator = core.fs.readdirplus(ROOT_NODE, 0)
    next(iterator)
    for letter in "abc":
        core.unlink(letter)
    assert [e.name for e, _ in iterator] == [b".."]


def test_numbers_of_what_was_copied_up_and_moved(core: Core) -> None:
    (core.lower / "d").mkdir()
    for name in ("f", "d/g"):
        (core.lower / name).write_text("")
    core.write("f", b"1")
    core.rename("d/g", "g")
    core.rename("d", "e")
    core.mkdir("pure")
    core.rename("g", "pure/g")
    for _ in range(2):
        assert core.list() == ["e", "f", "pure"]  # compares d_ino with st_ino
        assert core.list("pure") == ["g"]
        core.open()


def test_several_lowers(three: Core) -> None:
    for number, lower in enumerate(three.lowers):
        (lower / "d").mkdir()
        (lower / "d/same").write_text(str(number))
        (lower / f"d/only{number}").write_text("")
    os.mknod(three.lowers[1] / "d/only2", stat.S_IFCHR, 0)
    assert three.list("d") == ["only0", "only1", "same"]
    assert three.read("d/same") == b"0"
