"""A package: the content of the files that are new in one generation, as tar under zstd.

Each member is a file of upper under its path; what is a hole is left out, and a pax record
`SDEE.map` tells where the pieces belong. The last member, `.sdee/sums`, is empty: it says that
nothing is cut off. All else (types, modes, links, whiteouts, digests) is the manifest's matter.

The archive is cut into frames of zstd, so that several threads can compress and that what doesn't
compress costs no time: it travels as it is, in frames of raw blocks. Memory is bounded by a few
frames, whatever the sizes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import IO, Any

import zstandard

from mount_helpers import syscalls
from sdee_launch.deploy import archive
from sdee_launch.deploy.errors import Damaged
from sdee_launch.deploy.workers import Workers

BLOCK = 1 << 20
SUMS = b".sdee/sums"
#: A package may not make us hold more than this (bytes).
MAX_WINDOW = 1 << 25
#: More pieces than this in one file: its holes travel as zeroes.
MAX_PIECES = 4096
#: Files up to this size whose blocks are all there aren't asked for holes.
SMALL = 1 << 16
#: A frame has about so many bytes of the archive: larger ones compress hardly better.
FRAME = 1 << 21
#: More threads than this would be felt by the others on a login node.
MAX_THREADS = 4
#: Blocks of at least this are looked at whether they compress, and are hashed by a second thread.
LARGE = 1 << 17
SAMPLE = 1 << 14
#: After so many bytes the disk is set to work, while the rest is hashed and compressed.
EARLY = 1 << 22
#: So many blocks may wait for being hashed: neither thread waits for the other at each.
BEHIND = 2
# RFC 8878: magic number; no content size, no checksum; a window of 1 MiB.
_RAW_FRAME = b"\x28\xb5\x2f\xfd\x00\x50"
_RAW_BLOCK = 1 << 17
_Parts = list[bytes | memoryview]


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


def raw_frame(data: bytes) -> _Parts:
    """A frame of zstd that has the bytes as they are, in parts."""
    view = memoryview(data)
    parts: _Parts = [_RAW_FRAME]
    for offset in range(0, len(data), _RAW_BLOCK):
        part = view[offset : offset + _RAW_BLOCK]
        last = offset + _RAW_BLOCK >= len(data)
        parts += ((len(part) << 3 | last).to_bytes(3, "little"), part)
    return parts


def _write(fd: int, parts: _Parts) -> None:
    """Write all of it. Raises OSError."""
    left = sum(map(len, parts)) - os.writev(fd, parts)
    if left:  # cut short: by a signal, or because there is no more room, which the next call tells
        rest = memoryview(b"".join(parts))[-left:]
        while rest:
            rest = rest[os.write(fd, rest) :]


def _write_at(fd: int, data: bytes, offset: int) -> None:
    """The same at an offset. Raises OSError."""
    written = os.pwrite(fd, data, offset)
    while written < len(data):
        written += os.pwrite(fd, data[written:], offset + written)


class _Frames:
    """Writes an archive into a file, frame by frame, each compressed and written by a thread."""

    def __init__(self, fd: int, level: int) -> None:
        self._fd, self._level = fd, level
        self._parts: list[bytes] = []
        self._size = 0
        self._most = min(MAX_THREADS, len(os.sched_getaffinity(0)))
        self._dirty = 0
        self._workers = Workers[_Parts](self._most, self._put)
        self._idle: list[zstandard.ZstdCompressor] = []

    def write(self, data: bytes) -> None:
        """Append a small part. Raises OSError, of an earlier frame too."""
        self._parts.append(data)
        self._size += len(data)
        if self._size >= FRAME:
            self._start(self._frame, self._cut())

    def block(self, data: bytes) -> None:
        """Append a large part, as it is if a sample of it doesn't compress. Raises OSError."""
        middle = len(data) // 2
        sample = data[middle : middle + SAMPLE]
        if len(self._compress(sample)) < len(sample) - len(sample) // 32:
            self.write(data)
            return
        if self._parts:
            self._start(self._frame, self._cut())
        self._start(raw_frame, data)

    def close(self) -> None:
        """Write what is left. Raises OSError."""
        self._workers.wait()
        if self._parts:
            _write(self._fd, [self._compress(self._cut())])

    def stop(self) -> None:
        """End the threads, whatever is left to do."""
        self._workers.stop()

    def _put(self, parts: _Parts) -> None:
        _write(self._fd, parts)
        self._dirty += sum(map(len, parts))
        if self._dirty >= EARLY:
            self._dirty = 0
            with contextlib.suppress(OSError):  # a hint: fsync(2) has less to wait for
                syscalls.start_writing_out(self._fd)

    def _cut(self) -> bytes:
        data = b"".join(self._parts)
        self._parts, self._size = [], 0
        return data

    def _compress(self, data: bytes) -> bytes:
        # A compressor is one thread's at a time; making one costs more than a small frame.
        try:
            compressor = self._idle.pop()
        except IndexError:
            compressor = zstandard.ZstdCompressor(level=self._level, write_checksum=True)
        frame = compressor.compress(data)
        self._idle.append(compressor)
        return frame

    def _frame(self, data: bytes) -> _Parts:
        return [self._compress(data)]

    def _start(self, make: Callable[[bytes], _Parts], data: bytes) -> None:
        self._workers.start(make, data)
        self._workers.wait(self._most + 1)


class Packer:
    """Writes a package into a file. A context manager; `files` and `content` count what is in it."""

    def __init__(self, file: IO[bytes], level: int = 3) -> None:
        self.files = 0
        self.content = 0
        file.flush()  # from here on its descriptor is written to
        self._frames = _Frames(file.fileno(), level)

    def __enter__(self) -> Packer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._frames.write(archive.header(SUMS, 0) + archive.end())
                self._frames.close()
        finally:
            self._frames.stop()

    def add(
        self, path: bytes, fd: int, status: os.stat_result | None = None
    ) -> tuple[os.stat_result, str, bool]:
        """Append the content of an open file: its status before, the digest of what is in the
        package now, and whether the file held still meanwhile. `status` is what was known of it."""
        before = status or os.fstat(fd)
        size = before.st_size
        if 0 < size <= SMALL and before.st_blocks * 512 >= size:
            digest = self._small(path, fd, size)
            self.content += size
        else:
            digest = self._large(path, fd, size)
        self.files += 1
        after = os.fstat(fd)
        steady = (
            after.st_size == size
            and after.st_mtime_ns == before.st_mtime_ns
            and after.st_ino == before.st_ino
        )
        return before, digest, steady

    def _small(self, path: bytes, fd: int, size: int) -> str:
        """Append a file that one read gives; its digest."""
        data = os.pread(fd, size, 0)
        if len(data) < size:  # it got shorter: the archive must stay whole, the caller tries again
            data += bytes(size - len(data))
        self._frames.write(archive.header(path, size) + data + archive.padding(size))
        return hashlib.sha256(data).hexdigest()

    def _large(self, path: bytes, fd: int, size: int) -> str:
        """Append the pieces of a file; the digest of the whole with its holes."""
        parts = pieces(fd, size)
        records = {}
        if size and parts != [(0, size)]:
            text = ",".join(f"{offset}:{length}" for offset, length in parts)
            records = {b"SDEE.map": text.encode(), b"SDEE.size": b"%d" % size}
        sent = sum(length for _, length in parts)
        self._frames.write(archive.header(path, sent, records))
        digest = self._content(fd, parts, size)
        self._frames.write(archive.padding(sent))
        self.content += sent
        return digest

    def _content(self, fd: int, parts: list[tuple[int, int]], size: int) -> str:
        """Append the pieces; the digest of the whole file with its holes."""
        digest = hashlib.sha256()
        at = 0
        for offset, length in parts:
            zeroes(digest, offset - at)
            at = offset
            while at < offset + length:
                wanted = min(offset + length - at, BLOCK)
                data = os.pread(fd, wanted, at)
                if not data:  # it got shorter: the archive must stay whole, the caller tries again
                    data = bytes(wanted)
                # Threads compress and write the block while it is hashed here.
                if len(data) < LARGE:
                    self._frames.write(data)
                else:
                    self._frames.block(data)
                digest.update(data)
                at += len(data)
        zeroes(digest, size - at)
        return digest.hexdigest()


class _Hashing:
    """Hashes large blocks in a second thread, while the first one writes them."""

    def __init__(self) -> None:
        self._workers = Workers[None](1, lambda _: None)

    def update(self, digest: Any, data: bytes) -> None:
        """Hash a block after those before it, soon."""
        if len(data) < LARGE:
            self._workers.wait()
            digest.update(data)
        else:
            self._workers.start(digest.update, data)
            self._workers.wait(BEHIND)

    def wait(self) -> None:
        """Until all that was given is hashed."""
        self._workers.wait()

    def stop(self) -> None:
        """End the thread."""
        self._workers.stop()


class Member:
    """A file of a package that is being read."""

    def __init__(self, reader: archive.Reader, member: archive.Member, hashing: _Hashing) -> None:
        self.path = member.path
        self._reader, self._hashing = reader, hashing
        self._sent, self._records = member.size, member.records

    @property
    def size(self) -> int:
        """The size of the whole file."""
        text = self._records.get(b"SDEE.size")
        if text is None:
            return self._sent
        if not text.isdigit() or len(text) > 19 or int(text) < self._sent:
            raise Damaged(f"a package has a wrong size for {self.path[:80]!r}")
        return int(text)

    def pieces(self) -> list[tuple[int, int]]:
        """Where the content belongs. Raises Damaged."""
        text = self._records.get(b"SDEE.map")
        if text is None:
            return [(0, self._sent)] if self._sent else []
        found, last = [], 0
        for word in text.split(b",") if text else []:
            try:
                offset, length = (int(x) for x in word.split(b":"))
            except ValueError:
                offset = length = -1
            if offset < last or length <= 0 or offset + length > self.size:
                raise Damaged(f"a package has a wrong map for {self.path[:80]!r}")
            found.append((offset, length))
            last = offset + length
        if sum(length for _, length in found) != self._sent:
            raise Damaged(f"a package has a wrong map for {self.path[:80]!r}")
        return found

    def extract(self, fd: int) -> str:
        """Write the content into an empty file; returns its digest. Raises Damaged, OSError."""
        if not self._records and 0 < self._sent < LARGE:
            data = self._reader.exactly(self._sent)
            _write_at(fd, data, 0)
            return hashlib.sha256(data).hexdigest()
        digest = hashlib.sha256()
        at = 0
        for offset, length in self.pieces():
            if offset > at:
                self._hashing.wait()
                zeroes(digest, offset - at)
                at = offset
            while at < offset + length:
                data = self._reader.take(min(offset + length - at, archive.CHUNK))
                if not data:
                    raise Damaged(f"a package is cut off in {self.path[:80]!r}")
                self._hashing.update(digest, data)
                _write_at(fd, data, at)
                at += len(data)
        self._hashing.wait()
        if at < self.size:  # a hole
            zeroes(digest, self.size - at)
            os.ftruncate(fd, self.size)
        return digest.hexdigest()


def read(file: Any) -> Iterator[Member]:
    """The files of a package, in order. Raises Damaged where it is cut off or isn't one."""
    ended = False
    hashing = _Hashing()
    try:
        with zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).stream_reader(
            file, read_across_frames=True, closefd=False
        ) as stream:
            reader = archive.Reader(stream)
            for member in reader:
                if member.path == SUMS:
                    ended = True
                    continue
                yield Member(reader, member, hashing)
    except zstandard.ZstdError as error:
        raise Damaged(f"a package can't be read ({error})") from None
    finally:
        hashing.stop()
    if not ended:
        raise Damaged("a package is cut off")
