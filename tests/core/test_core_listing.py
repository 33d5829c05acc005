"""Reading directories: complete, stable under changes, and with st_ino's numbers."""

from __future__ import annotations

import os
import stat

from sdeefs.core.api import ROOT_NODE
from tests.core.core_lab import ROOT, Core


def names(core: Core, handle: int, offset: int = 0, limit: int = 1 << 30) -> list[bytes]:
    found = []
    for entry in core.fs.readdir(handle, offset):
        found.append(entry.name)
        if len(found) == limit:
            break
    return found


def test_a_hundred_thousand_entries(core: Core) -> None:
    count = 100_000 if "shm" in str(core.base) else 5_000
    for number in range(count):
        os.close(os.open(core.lower / f"file{number}", os.O_CREAT | os.O_WRONLY))
    core.unlink("file7")
    core.write("new", b"")
    handle = core.fs.opendir(ROOT_NODE, ROOT)
    seen: list[bytes] = []
    offset = 0
    while True:
        page = []
        for entry in core.fs.readdir(handle, offset):
            page.append(entry)
            if len(page) == 4000:
                break
        if not page:
            break
        seen += [entry.name for entry in page]
        offset = page[-1].next_offset
    assert len(seen) == len(set(seen)) == count + 2
    assert b"file7" not in seen and b"new" in seen
    core.fs.releasedir(handle)


def test_a_listing_survives_changes(core: Core) -> None:
    for letter in "abcdefgh":
        (core.lower / letter).write_text("")
    handle = core.fs.opendir(ROOT_NODE, ROOT)
    first = names(core, handle, limit=6)
    core.unlink("a")
    core.write("new", b"")
    core.write("b", b"copied up")
    rest = names(core, handle, 6)
    assert len(first + rest) == 10 and len(set(first + rest)) == 10
    again = names(core, handle)
    assert sorted(again[2:]) == [b"b", b"c", b"d", b"e", b"f", b"g", b"h", b"new"]


def test_entries_with_attributes_count_as_lookups(core: Core) -> None:
    (core.lower / "d").mkdir()
    (core.lower / "f").write_text("text")
    os.mkfifo(core.lower / "p")
    core.write("u", b"upper")
    handle = core.fs.opendir(ROOT_NODE, ROOT)
    found = {e.name: (e, entry) for e, entry in core.fs.readdirplus(handle, 0)}
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
    handle = core.fs.opendir(ROOT_NODE, ROOT)
    iterator = core.fs.readdirplus(handle, 0)
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
