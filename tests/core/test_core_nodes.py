"""What is held: nodes, descriptors, memory; and several threads at once."""

from __future__ import annotations

import os
import threading
import tracemalloc

from tests.core.core_lab import ROOT, Core, finish


def test_descriptors_of_directories_are_bounded(core: Core) -> None:
    for number in range(200):
        (core.lower / f"d{number}/e").mkdir(parents=True)
        (core.lower / f"d{number}/e/f").write_text(str(number))
    core.open(max_directories=16)
    for _ in range(2):
        for number in range(200):
            assert core.read(f"d{number}/e/f") == b"%d" % number
            core.write(f"d{number}/e/g", b"", 0)
            assert core.fs.counts()["directories"] <= 24
    core.fs.lookup(1, b"x", ROOT)
    assert core.fs.counts()["directories"] <= 16
    assert core.list("d7/e") == ["f", "g"]


def test_everything_is_given_back(core: Core) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        (core.lower / f"d{number}").mkdir()
        (core.lower / f"d{number}/f").write_text("")
    core.open()
    for number in range(20):
        core.write(f"d{number}/f", b"1")
        core.node(f"d{number}/f")
        core.unlink(f"d{number}/f")
    core.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_forgotten_nodes_leave_nothing(core: Core) -> None:
    for number in range(100):
        (core.lower / f"d{number}").mkdir()
        (core.lower / f"d{number}/f").write_text("")
    fs = core.fs
    held = []
    for number in range(100):
        directory = fs.lookup(1, b"d%d" % number, ROOT).node
        held += [directory, fs.lookup(directory, b"f", ROOT).node]
    assert fs.counts()["nodes"] == 201
    for node in held:  # parents first: they stay for their children
        fs.forget(node, 1)
    assert fs.counts()["nodes"] == 1
    fs.lookup(1, b"nothing", ROOT)
    assert fs.counts()["directories"] == 0
    fs.forget(4711, 1)


def test_a_node_is_small(core: Core) -> None:
    count = 5_000
    (core.lower / "d").mkdir()
    for number in range(count):
        os.close(os.open(core.lower / f"d/{number:08}.txt", os.O_CREAT | os.O_WRONLY))
    directory = core.node("d")
    tracemalloc.start()
    try:
        for number in range(count):
            core.fs.lookup(directory, b"%08d.txt" % number, ROOT)
        size = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert size / count < 340


def test_threads_at_once(core: Core) -> None:
    for number in range(8):
        (core.lower / f"d{number}").mkdir()
        (core.lower / f"d{number}/f").write_bytes(b"x" * 10_000)
    (core.lower / "shared").write_bytes(b"s" * 300_000)
    core.open(max_directories=16)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(30):
                core.write(f"d{number}/f", b"%d" % turn, 0)
                core.write("shared", b"t", 0)
                core.write(f"d{number}/new{turn}", b"new")
                core.rename(f"d{number}/new{turn}", f"d{number}/{turn}")
                if turn % 2:
                    core.unlink(f"d{number}/{turn}")
                core.list(f"d{number}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    for number in range(8):
        assert len(core.list(f"d{number}")) == 16
    assert core.read("shared") == b"t" + b"s" * 299_999
    assert os.listdir(core.work / "work") == []


def test_modified_files_are_not_kept_in_the_page_cache(core: Core) -> None:
    (core.lower / "f").write_text("one")
    fs, node = core.fs, core.node("f")
    first = finish(fs.open(node, os.O_RDONLY, ROOT))
    assert not first.keep_cache
    fs.release(first.handle)
    again = finish(fs.open(node, os.O_RDONLY, ROOT))
    assert again.keep_cache
    fs.release(again.handle)
    (core.lower / "f").write_text("three")
    assert not finish(fs.open(node, os.O_RDONLY, ROOT)).keep_cache
