"""Small files of lower come to the kernel with their first opening: nobody asks for their data."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import pytest

from tests.sdeefs.conftest import Lab, wait_until

PAGE = mmap.PAGESIZE
LIMIT = 32768
SIZES = (1, PAGE - 1, PAGE, PAGE + 1, LIMIT)


def reads(lab: Lab) -> int:
    """READ requests so far."""
    requests = lab.status()["requests"]
    assert isinstance(requests, dict)
    return int(requests.get("read", 0))


def in_memory(path: Path) -> bool:
    """Whether all of a file can be read without a disk: only then it is given away at once."""
    size = path.stat().st_size
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(fd, [bytearray(size + 1)], 0, os.RWF_NOWAIT) == size
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "options", ["passthrough=on", "writeback=on", "passthrough=off,writeback=off"]
)
@pytest.mark.parametrize("transport", ["ring", "device"])
def test_data_without_reads(lab: Lab, transport: str, options: str) -> None:
    data = {f"f{size}": os.urandom(size) for size in SIZES}
    for name, text in data.items():
        (lab.lower / name).write_bytes(text)
    (lab.lower / "empty").touch()
    (lab.lower / "large").write_bytes(bytes(LIMIT + 1))
    lab.mount("--transport", transport, "-o", options)
    for name, text in data.items():
        assert in_memory(lab.lower / name)
        fd = os.open(lab.merged / name, os.O_RDONLY)
        assert os.read(fd, LIMIT + PAGE) == text
        assert os.read(fd, 1) == b""
        assert os.fstat(fd).st_size == len(text)
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == text
        os.close(fd)
    assert (lab.merged / "empty").read_bytes() == b""
    assert reads(lab) == 0
    assert (lab.merged / "large").read_bytes() == bytes(LIMIT + 1)
    assert reads(lab) > 0
    lab.umount()


@pytest.mark.parametrize("transport", ["ring", "device"])
def test_writers_and_readers_of_the_same(lab: Lab, transport: str) -> None:
    (lab.lower / "f").write_bytes(b"below" * 100)
    lab.mount("--transport", transport)
    with open(lab.merged / "f", "rb") as reader:
        assert reader.read() == b"below" * 100
        with open(lab.merged / "f", "r+b", buffering=0) as writer:
            writer.write(b"ABOVE")
            assert os.pread(reader.fileno(), 5, 0) == b"ABOVE"
            writer.truncate(7)
            assert os.pread(reader.fileno(), 500, 0) == b"ABOVEbe"
    assert (lab.merged / "f").read_bytes() == b"ABOVEbe"
    assert (lab.upper / "f").read_bytes() == b"ABOVEbe"
    assert (lab.lower / "f").read_bytes() == b"below" * 100
    lab.umount()


@pytest.mark.parametrize("watch", ["on", "off"])
@pytest.mark.parametrize("size", [5, 20, PAGE + 5, 0])
def test_a_file_that_changes_between_its_look_up_and_its_opening(
    lab: Lab, watch: str, size: int
) -> None:
    (lab.lower / "f").write_bytes(b"0123456789")
    lab.mount("-o", f"watch={watch}")
    assert (lab.merged / "f").stat().st_size == 10
    fresh = os.urandom(size)
    with open(lab.lower / "f", "wb") as file:
        file.write(fresh)
    (lab.merged / "f").read_bytes()  # the old size, or the new one
    wait_until(lambda: (lab.merged / "f").read_bytes() == fresh, "the new data", seconds=20)
    for _ in range(3):
        time.sleep(0.1)
        assert (lab.merged / "f").read_bytes() == fresh
    lab.umount()
