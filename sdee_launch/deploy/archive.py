"""Members of a tar archive (POSIX.1-2001, pax): their headers written, and a stream of them read.

A package has a member for each of many thousand files, and nothing but regular ones: what a header
must say is the path, the size, and records of our own. Modes, owners and times are the manifest's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

from sdee_launch.deploy.errors import Damaged

BLOCK = 512
#: The records of one member may have so many bytes: a path, and a map of pieces.
MAX_RECORDS = 1 << 20
#: So much is asked of a stream at once.
CHUNK = 1 << 18
#: Eleven octal digits.
_MAX_OCTAL = 8**11 - 1
_REGULAR, _RECORDS = b"0", b"x"
_END = bytes(2 * BLOCK)
_PADDING = tuple(bytes(count) for count in range(BLOCK))
# Mode, uid, gid; the time, the checksum and the type stand between size and magic.
_BEFORE_SIZE = b"0000600\0" + b"0000000\0" * 2
_TIME = b"00000000000\0"
_AFTER_TYPE = bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2 + bytes(167)
#: The checksum's own eight bytes count as blanks.
_SUM = sum(_BEFORE_SIZE) + sum(_TIME) + 8 * 32 + sum(_AFTER_TYPE)


class Stream(Protocol):
    """What can be read from: at most `size` bytes, none at the end."""

    def read(self, size: int, /) -> bytes: ...


class Member(NamedTuple):
    """A file's header. `size` is that of its data in the archive."""

    path: bytes
    size: int
    records: Mapping[bytes, bytes]


def _block(name: bytes, size: int, kind: bytes) -> bytes:
    digits = b"%011o\0" % size
    checksum = _SUM + sum(name) + sum(digits) + kind[0]
    return b"%b%b%b%b%06o\0 %b%b" % (
        name.ljust(100, b"\0"), _BEFORE_SIZE, digits, _TIME, checksum, kind, _AFTER_TYPE,
    )  # fmt: skip


def _record(key: bytes, value: bytes) -> bytes:
    """A pax record: its first field is its own length, that field included."""
    rest = b" %b=%b\n" % (key, value)
    length = len(rest)
    while length != len(rest) + len(b"%d" % length):
        length = len(rest) + len(b"%d" % length)
    return b"%d%b" % (length, rest)


def header(path: bytes, size: int, records: Mapping[bytes, bytes] | None = None) -> bytes:
    """What stands before a file's data: one block, and records where one block isn't enough."""
    if len(path) <= 100 and path.isascii() and not records and size <= _MAX_OCTAL:
        return _block(path, size, _REGULAR)
    wanted = dict(records or {})
    if len(path) > 100 or not path.isascii():
        try:
            path.decode()
        except UnicodeDecodeError:
            wanted[b"hdrcharset"] = b"BINARY"
        wanted[b"path"] = path
    if size > _MAX_OCTAL:
        wanted[b"size"] = b"%d" % size
    plain = _block(path[:100], min(size, _MAX_OCTAL), _REGULAR)
    text = b"".join(_record(key, value) for key, value in wanted.items())
    return _block(b"pax", len(text), _RECORDS) + text + padding(len(text)) + plain


def padding(size: int) -> bytes:
    """What follows `size` bytes of data up to a whole block."""
    return _PADDING[-size % BLOCK]


def end() -> bytes:
    """What stands at an archive's end."""
    return _END


class Reader:
    """Reads an archive from a stream. Iterating gives the members; `take` the data of the last.
    `what` it is stands in errors."""

    def __init__(self, stream: Stream, what: str = "a package") -> None:
        self._stream, self._what = stream, what
        self._buffer = b""
        self._at = 0  # in the buffer
        self._left = 0  # of the last member's data
        self._pad = 0

    def __iter__(self) -> Iterator[Member]:
        """Raises Damaged at anything but a regular file, and where the archive is cut off."""
        records: dict[bytes, bytes] = {}
        while True:
            self._skip()
            block = self._exactly(BLOCK)
            kind = block[156:157]
            name = block[:100].partition(b"\0")[0]
            if block[257:262] != b"ustar":
                if not block.strip(b"\0"):
                    return
                raise Damaged(f"{self._what} is no archive, or not whole")
            if kind == _RECORDS:
                size = _size(block[124:136])
                if size > MAX_RECORDS:
                    raise Damaged(f"{self._what} has a header without end")
                records = _records(self._exactly(size))
                self._exactly(-size % BLOCK)
                continue
            if kind not in (_REGULAR, b"\0"):
                raise Damaged(f"{self._what} has something else than a file: {name[:80]!r}")
            if prefix := block[345:500].partition(b"\0")[0]:
                name = prefix + b"/" + name
            size = _number(records[b"size"]) if b"size" in records else _size(block[124:136])
            self._left, self._pad = size, -size % BLOCK
            yield Member(records.get(b"path", name), size, records)
            records = {}

    def take(self, most: int) -> bytes:
        """Some of the last member's data, at most so many bytes; empty at its end. Raises Damaged."""
        data = self._some(min(most, self._left)) if self._left else b""
        self._left -= len(data)
        return data

    def exactly(self, size: int) -> bytes:
        """The last member's data, of which there are so many bytes. Raises Damaged."""
        self._left -= size
        return self._exactly(size)

    def _skip(self) -> None:
        """To the next member, whatever wasn't taken of the last."""
        while self._left:
            self.take(CHUNK)
        if self._pad:
            self._exactly(self._pad)
            self._pad = 0

    def _some(self, most: int) -> bytes:
        if self._at == len(self._buffer):
            self._at = 0
            self._buffer = self._stream.read(max(most, CHUNK))
            if not self._buffer:
                raise Damaged(f"{self._what} is cut off")
            if len(self._buffer) <= most:
                data, self._buffer = self._buffer, b""
                return data
        data = self._buffer[self._at : self._at + most]
        self._at += len(data)
        return data

    def _exactly(self, size: int) -> bytes:
        end = self._at + size
        if end <= len(self._buffer):
            data = self._buffer[self._at : end]
            self._at = end
            return data
        data = self._some(size) if size else b""
        while len(data) < size:
            data += self._some(size - len(data))
        return data


def _number(text: bytes) -> int:
    if not text.isdigit() or len(text) > 19:
        raise Damaged("an archive has a header that can't be read")
    return int(text)


def _size(field: bytes) -> int:
    try:
        size = int(field.rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        size = -1
    if size < 0:
        raise Damaged("an archive has a header that can't be read")
    return size


def _records(text: bytes) -> dict[bytes, bytes]:
    found = {}
    at = 0
    while at < len(text):
        blank = text.find(b" ", at, at + 20)
        end = at + _number(text[at : max(blank, at)])
        key, equals, value = text[blank + 1 : end].partition(b"=")
        if end > len(text) or not equals or not value.endswith(b"\n"):
            raise Damaged("an archive has a header that can't be read")
        found[key] = value[:-1]
        at = end
    return found
