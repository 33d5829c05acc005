"""A package: the content of the files that are new in one generation, as tar under zstd.

Each member is a file of upper under its path; what is a hole is left out, and a pax record
`SDEE.map` tells where the pieces belong. The last member, `.sdee/sums`, has the sha256 of every
file's content as a JSON line. All else (types, modes, links, whiteouts) is the manifest's matter.
Memory is bounded by one block, whatever the sizes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from typing import Any

import zstandard

from sdee_launch.deploy.errors import Damaged

BLOCK = 1 << 20
SUMS = ".sdee/sums"
#: A package may not make us hold more than this (bytes).
MAX_WINDOW = 1 << 25
#: More pieces than this in one file: its holes travel as zeroes.
MAX_PIECES = 4096


def pieces(fd: int, size: int) -> list[tuple[int, int]]:
    """(offset, length) of what a file has between its holes."""
    found: list[tuple[int, int]] = []
    offset = 0
    while offset < size and len(found) <= MAX_PIECES:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
            end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        except OSError:  # ENXIO: only a hole is left
            break
        if start >= end:
            break
        found.append((start, end - start))
        offset = end
    return found if len(found) <= MAX_PIECES else [(0, size)]


class _Pieces(io.RawIOBase):
    """The pieces of a file one after the other, hashed as the whole file with its holes."""

    def __init__(self, fd: int, parts: list[tuple[int, int]], size: int) -> None:
        self._fd, self._parts, self._size = fd, list(parts), size
        self._at = 0
        self.digest = hashlib.sha256()
        self.sent = 0

    def read(self, size: int = -1) -> bytes:
        if not self._parts:
            return b""
        offset, length = self._parts[0]
        zeroes(self.digest, offset - self._at)
        self._at = offset
        data = os.pread(self._fd, min(size if size > 0 else BLOCK, length, BLOCK), offset)
        if not data:  # it got shorter: the archive must stay whole, the caller tries again
            data = bytes(min(size if size > 0 else BLOCK, length, BLOCK))
        self.digest.update(data)
        self._at += len(data)
        self.sent += len(data)
        if len(data) == length:
            self._parts.pop(0)
        else:
            self._parts[0] = (offset + len(data), length - len(data))
        return data

    def finish(self) -> str:
        """The digest of the whole file."""
        zeroes(self.digest, self._size - self._at)
        return self.digest.hexdigest()


def zeroes(digest: Any, count: int) -> None:
    """Hash a hole."""
    block = bytes(min(max(count, 0), BLOCK))
    while count > 0:
        digest.update(block[:count] if count < len(block) else block)
        count -= len(block)


def digest_of(fd: int) -> str:
    """The sha256 of a file's content, in hex."""
    digest = hashlib.sha256()
    offset = 0
    while data := os.pread(fd, BLOCK, offset):
        digest.update(data)
        offset += len(data)
    return digest.hexdigest()


class Packer:
    """Writes a package into a file. A context manager; `files` and `content` count what is in it."""

    def __init__(self, file: Any, level: int = 3) -> None:
        self.files = 0
        self.content = 0
        self._stream = zstandard.ZstdCompressor(level=level, write_checksum=True).stream_writer(
            file, closefd=False
        )
        self._tar = tarfile.open(  # noqa: SIM115
            fileobj=self._stream,
            mode="w|",
            format=tarfile.PAX_FORMAT,
            bufsize=BLOCK,
        )
        self._sums = tempfile.TemporaryFile()  # noqa: SIM115

    def __enter__(self) -> Packer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                info = tarfile.TarInfo(SUMS)
                info.size = self._sums.tell()
                self._sums.seek(0)
                self._tar.addfile(info, self._sums)
                self._tar.close()
                self._stream.close()  # type: ignore[no-untyped-call]
        finally:
            self._sums.close()

    def add(self, path: bytes, fd: int) -> tuple[os.stat_result, str, bool]:
        """Append the content of an open file: its status before, the digest of what is in the
        package now, and whether the file held still meanwhile."""
        before = os.fstat(fd)
        parts = pieces(fd, before.st_size)
        info = tarfile.TarInfo(os.fsdecode(path))
        info.size = sum(length for _, length in parts)
        info.mtime = before.st_mtime_ns // 10**9
        if parts != [(0, before.st_size)] and before.st_size:
            text = ",".join(f"{offset}:{length}" for offset, length in parts)
            info.pax_headers = {"SDEE.map": text, "SDEE.size": str(before.st_size)}
        source = _Pieces(fd, parts, before.st_size)
        self._tar.addfile(info, source)
        self._tar.members.clear()  # type: ignore[attr-defined]  # it would keep all
        digest = source.finish()
        after = os.fstat(fd)
        steady = (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        self._sums.write(json.dumps([os.fsdecode(path), digest]).encode() + b"\n")
        self.files += 1
        self.content += source.sent
        return before, digest, steady


class Member:
    """A file of a package that is being read."""

    def __init__(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        self.path = os.fsencode(info.name)
        self._info = info
        self._file = tar.extractfile(info)

    @property
    def size(self) -> int:
        """The size of the whole file."""
        try:
            size = int(self._info.pax_headers.get("SDEE.size", self._info.size))
        except ValueError:
            size = -1
        if size < self._info.size:
            raise Damaged(f"a package has a wrong size for {self.path[:80]!r}")
        return size

    def pieces(self) -> list[tuple[int, int]]:
        """Where the content belongs. Raises Damaged."""
        text = self._info.pax_headers.get("SDEE.map")
        if text is None:
            return [(0, self._info.size)] if self._info.size else []
        found, last = [], 0
        for word in text.split(",") if text else []:
            try:
                offset, length = (int(x) for x in word.split(":"))
            except ValueError:
                offset = length = -1
            if offset < last or length <= 0 or offset + length > self.size:
                raise Damaged(f"a package has a wrong map for {self.path[:80]!r}")
            found.append((offset, length))
            last = offset + length
        if sum(length for _, length in found) != self._info.size:
            raise Damaged(f"a package has a wrong map for {self.path[:80]!r}")
        return found

    def extract(self, fd: int) -> str:
        """Write the content into an empty file; returns its digest. Raises Damaged, OSError."""
        digest = hashlib.sha256()
        at = 0
        assert self._file is not None
        for offset, length in self.pieces():
            zeroes(digest, offset - at)
            at = offset
            while length:
                data = self._file.read(min(length, BLOCK))
                if not data:
                    raise Damaged(f"a package is cut off in {self.path[:80]!r}")
                digest.update(data)
                view = memoryview(data)
                while view:
                    written = os.pwrite(fd, view, at)
                    view = view[written:]
                    at += written
                length -= len(data)
        zeroes(digest, self.size - at)
        os.ftruncate(fd, self.size)
        return digest.hexdigest()


def read(file: Any) -> Iterator[Member]:
    """The files of a package, in order. Raises Damaged where it is cut off or isn't one."""
    ended = False
    try:
        stream = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).stream_reader(
            file, read_across_frames=False
        )
        # tarfile copies what is left of its buffer at each read: a small one.
        with tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 15) as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep all
                if info.name == SUMS:
                    ended = True
                    continue
                if not info.isreg():
                    raise Damaged(f"a package has something else than a file: {info.name[:80]!r}")
                yield Member(tar, info)
    except (tarfile.TarError, zstandard.ZstdError, EOFError) as error:
        raise Damaged(f"a package can't be read ({error})") from None
    if not ended:
        raise Damaged("a package is cut off")
