"""Packages: an archive that tar reads, frames that zstd reads, content that comes back."""

from __future__ import annotations

import hashlib
import io
import os
import random
import tarfile
import tempfile

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from sdee_launch.deploy import archive, package
from sdee_launch.deploy.errors import Damaged

PATH = st.one_of(
    st.binary(min_size=1, max_size=30), st.text(min_size=1, max_size=300).map(os.fsencode)
).filter(lambda path: b"\0" not in path and not path.startswith(b"/") and not path.endswith(b"/"))
MEMBERS = st.lists(st.tuples(PATH, st.binary(max_size=1500)), max_size=6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(MEMBERS)
def test_an_archive_is_read_by_tar_and_by_us(members: list[tuple[bytes, bytes]]) -> None:
    parts = []
    for path, data in members:
        records = {b"SDEE.map": b"0:1"} if len(data) % 2 else None
        parts += [archive.header(path, len(data), records), data, archive.padding(len(data))]
    text = b"".join(parts) + archive.end()
    with tarfile.open(fileobj=io.BytesIO(text), mode="r|") as tar:
        found = [(os.fsencode(one.name), _data(tar, one)) for one in tar]
    assert found == members
    reader = archive.Reader(io.BytesIO(text))
    ours = [(one.path, b"".join(iter(lambda: reader.take(700), b""))) for one in reader]
    assert ours == members


def _data(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    assert file is not None
    return file.read()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(MEMBERS)
def test_what_tarfile_writes_is_read(members: list[tuple[bytes, bytes]]) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for path, data in members:
            info = tarfile.TarInfo(os.fsdecode(path))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    file.seek(0)
    reader = archive.Reader(file)
    assert [(one.path, reader.take(9999)) for one in reader] == members


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=40), st.integers(0, 1023))
def test_no_archive_is_worse_than_damaged(noise: bytes, at: int) -> None:
    text = archive.header(b"n" * 120, 3, {b"SDEE.map": b"0:3"}) + b"abc" + archive.padding(3)
    spoilt = text[:at] + noise + text[at + len(noise) :] + archive.end()
    reader = archive.Reader(io.BytesIO(spoilt))
    try:
        for _ in reader:
            reader.take(10)
    except Damaged:
        pass


@pytest.mark.parametrize("size", [1, 1 << 17, (1 << 17) + 1, 1 << 20])
def test_a_raw_frame_is_a_frame_of_zstd(size: int) -> None:
    data = random.Random(size).randbytes(size)
    reader = zstandard.ZstdDecompressor().stream_reader(
        io.BytesIO(b"".join(package.raw_frame(data)))
    )
    assert reader.read() == data


def test_large_and_small_files_come_back_in_order() -> None:
    noise = random.Random(1).randbytes(3 << 20)
    contents = [noise, b"", b"text " * 700_000, b"small", noise[: 1 << 17], b"x" * 50, noise[7:]]
    with tempfile.TemporaryFile() as file:
        with package.Packer(file, 1) as packer:
            for number, content in enumerate(contents):
                with tempfile.TemporaryFile() as one:
                    one.write(content)
                    one.flush()
                    _, digest, steady = packer.add(b"%d" % number, one.fileno())
                assert (digest, steady) == (hashlib.sha256(content).hexdigest(), True)
        assert file.tell() < 7 << 20  # what doesn't compress is as large as it was, text isn't
        file.seek(0)
        found: list[bytes] = []
        for member in package.read(file):
            with tempfile.TemporaryFile() as one:
                assert member.extract(one.fileno()) == digest_of(contents[len(found)])
                one.seek(0)
                found.append(one.read())
    assert found == contents


def digest_of(content: bytes) -> str:
    """As the manifest has it."""
    return hashlib.sha256(content).hexdigest()


def test_a_disk_that_fails_in_a_thread_is_told() -> None:
    with tempfile.TemporaryFile() as one, open("/dev/full", "wb", buffering=0) as full:
        one.truncate(64 << 20)
        one.write(os.urandom(16 << 20))
        one.flush()
        with pytest.raises(OSError, match="No space"), package.Packer(full, 1) as packer:
            packer.add(b"file", one.fileno())
