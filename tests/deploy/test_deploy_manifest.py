"""Manifests: any name and mark survives, whatever the size memory stays bounded."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdee_launch.deploy import entries
from sdee_launch.deploy.entries import Entry, Line
from sdee_launch.deploy.errors import Damaged
from sdee_launch.deploy.exclude import DEFAULTS, Excluded

NAME = st.binary(min_size=1, max_size=12).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
)
PATH = st.lists(NAME, min_size=1, max_size=4).map(b"/".join)
ENTRY = st.builds(
    Entry,
    PATH,
    st.sampled_from("dflcp"),
    st.integers(0, 0o7777),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(-(2**70), 2**70),  # nanoseconds: the year 2262 has 2**63
    st.integers(0, 2**62),
    st.binary(max_size=20).map(lambda target: target.replace(b"\0", b"x")),
    st.lists(
        st.tuples(st.binary(max_size=8).map(lambda n: b"user." + n), st.binary(max_size=20)),
        max_size=2,
    ).map(tuple),
    st.integers(0, 100),
    st.integers(0, 100),
    st.sampled_from(["", "ab" * 32]),
    st.integers(0, 2**62),
    st.integers(0, 2**62),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ENTRY)
def test_a_line_is_its_entry(entry: Entry) -> None:
    line = entries.encode(entry)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert entries.decode(line[:-1]) == entry


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=80))
def test_no_line_is_worse_than_damaged(line: bytes) -> None:
    try:
        entries.decode(line)
    except Damaged:
        pass


def _file(paths: list[bytes]) -> list[Entry]:
    ordered = sorted(set(paths), key=entries.sort_key)
    return [Entry(path, "p", 0o644, 0, 0, 1) for path in ordered]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(PATH, max_size=20), st.lists(PATH, max_size=20))
def test_merge_pairs_what_is_the_same_path(a: list[bytes], b: list[bytes]) -> None:
    pairs = list(entries.merge(_file(a), _file(b)))
    assert [x for x, _ in pairs if x] == _file(a)
    assert [y for _, y in pairs if y] == _file(b)
    assert {x.path for x, y in pairs if x and y} == set(a) & set(b)


def test_a_directory_stands_before_what_is_in_it() -> None:
    paths = [b"a-b", b"a", b"a/b", b"a.b", b"a/b/c", b"a/b-", b""]
    ordered = sorted(paths, key=entries.sort_key)
    assert ordered == [b"", b"a", b"a/b", b"a/b/c", b"a/b-", b"a-b", b"a.b"]
    assert ordered == sorted(paths, key=lambda path: path.split(b"/") if path else [])


def test_what_is_told_quickly_is_never_a_trick() -> None:
    for length in range(1, 7):
        for letters in itertools.product(b"a./\0", repeat=length):
            path = bytes(letters)
            assert not (entries._plain(path) and entries._TRICK.search(path))
    assert entries._plain(b"usr/lib/.." + b"x") is False  # the slow way decides
    assert not entries._plain(b"n" * 256)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ENTRY)
def test_a_line_begins_and_ends_as_its_object_is(entry: Entry) -> None:
    line = entries.encode(entry)[:-1]
    assert line.startswith(entries.prefix(entry.path, entry.kind.encode(), *entry[2:7]))
    assert line.endswith(entries.suffix(entry.ctime_ns, entry.inode))
    assert entries.content_of(line) == (entry.group, entry.generation)
    (read,) = list(entries.lines(io.BytesIO(_written([entry]))))
    assert (read.path, read.text, read.kind) == (entry.path, line, entry.kind.encode())


def test_lines_that_differ_for_the_source_alone() -> None:
    entry = Entry(b"a", "f", 0o644, 0, 0, 1, 3, generation=1, digest="ab" * 32, ctime_ns=5, inode=6)

    def line(entry: Entry, cut: int | None = -1, more: bytes = b"") -> Line:
        return Line(entry.path, entries.encode(entry)[:cut] + more)

    old = line(entry)
    assert entries.same_but_for_change(old, old)
    assert entries.same_but_for_change(old, line(entry._replace(ctime_ns=7, inode=0)))
    for other in (
        line(entry._replace(mode=0o600)),
        line(entry._replace(generation=2)),
        line(entry._replace(digest="cd" * 32)),
        line(entry, more=b"x"),
        line(entry, -3),
        line(entry, -5),
        line(entry, more=b"\t6"),
    ):
        assert not entries.same_but_for_change(old, other)


def _written(wanted: list[Entry]) -> bytes:
    file = io.BytesIO()
    with entries.Writer(file) as writer:
        for entry in wanted:
            writer.add(entry)
    return file.getvalue()


def test_whatever_is_cut_off_is_damaged() -> None:
    whole = _written(_file([b"%d" % n for n in range(2000)]))
    assert len(list(entries.read(io.BytesIO(whole)))) == 2000
    for size in range(0, len(whole), max(1, len(whole) // 40)):
        with pytest.raises(Damaged):
            list(entries.read(io.BytesIO(whole[:size])))


def test_order_is_checked() -> None:
    with pytest.raises(Damaged, match="out of order"):
        list(entries.read(io.BytesIO(_written(list(reversed(_file([b"a", b"b"])))))))


def test_memory_doesn_t_grow_with_the_number_of_entries() -> None:
    code = """
import resource, sys, tempfile
from sdee_launch.deploy import entries
with tempfile.TemporaryFile() as file:
    with entries.Writer(file) as writer:
        for n in range(int(sys.argv[1])):
            writer.add(entries.Entry(b"dir/%09d" % n, "f", 420, 0, 0, n, n, digest="ab" * 32))
    file.seek(0)
    assert sum(1 for _ in entries.merge(entries.read(file), ())) == int(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""

    _bounded(code, 200_000)


def test_memory_doesn_t_grow_with_the_number_of_files_in_a_package() -> None:
    code = """
import os, resource, sys, tempfile
from sdee_launch.deploy import package
with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as content:
    content.write(b"content")
    content.flush()
    with package.Packer(file) as packer:
        for n in range(int(sys.argv[1])):
            packer.add(b"dir/%09d" % n, content.fileno())
    file.seek(0)
    assert sum(1 for member in package.read(file)) == int(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    _bounded(code, 20_000)


def _bounded(code: str, most: int) -> None:
    def peak(count: int) -> int:
        done = subprocess.run(
            [sys.executable, "-I", "-c", code, str(count)],
            capture_output=True, text=True, check=True, timeout=150,
        )  # fmt: skip
        return int(done.stdout)

    few, many = peak(1000), peak(most)
    assert many < few + 16 * 1024  # KiB


@pytest.mark.parametrize(
    ("path", "stays"),
    [
        (b"tmp", False),
        (b"tmp/x", True),
        (b"home/tmp/x", False),
        (b"var/cache/apt/pkgcache.bin", True),
        (b"var/cache/apt", False),
        (b"root/.cache/pip", True),
        (b"opt/tool/.nfs000123", True),
        (b"data", False),
        (b"data/big.iso", True),
        (b"a/b/scratch", True),
        (b"a/b/scratch2", False),
        ("ä/ö".encode("latin-1"), False),
    ],
)
def test_what_stays_behind(path: bytes, stays: bool) -> None:
    assert Excluded([*DEFAULTS, "/data/*.iso", "scratch"])(path) is stays
