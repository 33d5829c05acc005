"""One object of an upper as a manifest has it, and a manifest as a compressed file of them.

A manifest is a stream of JSON lines under zstd, one per object, in the order of `sort_key`: a
directory stands before what is in it. Ids are those inside the environment. Names are bytes; in
JSON they stand as `os.fsdecode` gives them.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

import zstandard

from sdee_launch.deploy.errors import Damaged

FORMAT = 1
#: A line longer than this is no manifest of ours (names, link target and xattrs are bounded).
MAX_LINE = 1 << 20
#: Names of xattrs that travel. Others are root's matter, or mean nothing on another machine.
XATTRS = (b"user.", b"security.capability", b"system.posix_acl_")


class Entry(NamedTuple):
    """One object. `kind` is one of d f l c (whiteout: character device 0/0) and p (pipe)."""

    path: bytes  # relative to upper; empty: upper itself
    kind: str
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int = 0  # of files
    target: bytes = b""  # of symbolic links
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    group: int = 0  # files with several names: the same number for all of them; 0: one name
    generation: int = 0  # files: in whose package the content is
    digest: str = ""  # files: sha256 of the content, in hex
    ctime_ns: int = 0  # at the source: spares reading what can't have changed
    inode: int = 0


def sort_key(path: bytes) -> list[bytes]:
    """The order of a manifest: by components, so that a directory's objects follow it."""
    return path.split(b"/") if path else []


def same_content(a: Entry, b: Entry) -> bool:
    """The paper's rule: size and modification time decide; here also the package's number."""
    return (a.size, a.mtime_ns, a.generation) == (b.size, b.mtime_ns, b.generation)


def same_object(a: Entry, b: Entry) -> bool:
    """Whether nothing that a node would see differs."""
    return a._replace(ctime_ns=0, inode=0, digest="") == b._replace(ctime_ns=0, inode=0, digest="")


def encode(entry: Entry) -> bytes:
    """One line."""
    record: dict[str, Any] = {
        "p": os.fsdecode(entry.path),
        "k": entry.kind,
        "m": entry.mode,
        "u": entry.uid,
        "g": entry.gid,
        "t": entry.mtime_ns,
    }
    if entry.kind == "f":
        record |= {"s": entry.size, "n": entry.generation, "d": entry.digest}
        record |= {"c": entry.ctime_ns, "i": entry.inode}
    if entry.group:
        record["h"] = entry.group
    if entry.target:
        record["l"] = os.fsdecode(entry.target)
    if entry.xattrs:
        record["x"] = {
            os.fsdecode(name): base64.b64encode(value).decode() for name, value in entry.xattrs
        }
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Entry:
    """The entry of a line. Raises Damaged on anything that `encode` wouldn't write."""
    try:
        record = json.loads(line)
        path = os.fsencode(record["p"])
        entry = Entry(
            path,
            record["k"],
            int(record["m"]),
            int(record["u"]),
            int(record["g"]),
            int(record["t"]),
            int(record.get("s", 0)),
            os.fsencode(record.get("l", "")),
            tuple(
                (os.fsencode(name), base64.b64decode(value, validate=True))
                for name, value in record.get("x", {}).items()
            ),
            int(record.get("h", 0)),
            int(record.get("n", 0)),
            str(record.get("d", "")),
            int(record.get("c", 0)),
            int(record.get("i", 0)),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"a manifest has a line that can't be read ({error})") from None
    if not proper(entry):
        raise Damaged(f"a manifest names what no upper can have: {entry.path[:80]!r}")
    return entry


def proper(entry: Entry) -> bool:
    """Whether an entry could be an object of an upper: a relative path without tricks, a known kind."""
    parts = entry.path.split(b"/") if entry.path else []
    return (
        entry.kind in ("d", "f", "l", "c", "p")
        and all(part not in (b"", b".", b"..") and len(part) <= 255 for part in parts)
        and b"\0" not in entry.path
        and b"\0" not in entry.target
        and (bool(parts) or entry.kind == "d")
        and 0 <= entry.mode <= 0o7777
        and 0 <= entry.uid < 2**32
        and 0 <= entry.gid < 2**32
        and 0 <= entry.size < 2**63
        and -(2**63) < entry.mtime_ns < 2**63
        and entry.generation >= 0
        and all(name.startswith(XATTRS) for name, _ in entry.xattrs)
    )


class Writer:
    """Writes a manifest. A context manager; `entries` counts."""

    def __init__(self, file: IO[bytes]) -> None:
        self.entries = 0
        self._stream = zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False)
        self._stream.write(json.dumps({"sdee-manifest": FORMAT}).encode() + b"\n")

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._stream.write(json.dumps({"end": self.entries}).encode() + b"\n")
            self._stream.close()  # type: ignore[no-untyped-call]

    def add(self, entry: Entry) -> None:
        """Append an entry; the caller keeps the order."""
        self._stream.write(encode(entry))
        self.entries += 1


def _lines(file: Any) -> Iterator[bytes]:
    reader = zstandard.ZstdDecompressor(max_window_size=1 << 25).stream_reader(
        file, read_across_frames=False
    )
    buffer = b""
    try:
        while True:
            part = reader.read(1 << 16)
            if not part:
                break
            lines = (buffer + part).split(b"\n")
            buffer = lines.pop()
            if len(buffer) > MAX_LINE:
                raise Damaged("a manifest has a line without end")
            yield from lines
    except zstandard.ZstdError as error:
        raise Damaged(f"a manifest can't be read ({error})") from None


def read(file: Any) -> Iterator[Entry]:
    """The entries of a manifest, in order. Raises Damaged where it is cut off or isn't one."""
    lines = _lines(file)
    last: list[bytes] | None = None
    count = 0
    try:
        if json.loads(next(lines, b"")).get("sdee-manifest") != FORMAT:
            raise Damaged("a manifest has another format than this version's")
    except (ValueError, AttributeError):
        raise Damaged("this is no manifest") from None
    for line in lines:
        if line.startswith(b'{"end":'):
            try:
                right = json.loads(line)["end"] == count
            except ValueError:
                right = False
            if not right:
                raise Damaged("a manifest doesn't have as many entries as it says")
            return
        entry = decode(line)
        key = sort_key(entry.path)
        if last is not None and key <= last:
            raise Damaged(f"a manifest is out of order at {entry.path[:80]!r}")
        last = key
        count += 1  # noqa: SIM113
        yield entry
    raise Damaged("a manifest is cut off")


def merge(
    old: Iterable[Entry], new: Iterable[Entry]
) -> Iterator[tuple[Entry | None, Entry | None]]:
    """Both streams side by side: (old, new) of each path, None where it has none."""
    nothing = None
    olds, news = iter(old), iter(new)
    a, b = next(olds, nothing), next(news, nothing)
    while a is not None or b is not None:
        if b is None or (a is not None and sort_key(a.path) < sort_key(b.path)):
            yield a, None
            a = next(olds, nothing)
        elif a is None or sort_key(b.path) < sort_key(a.path):
            yield None, b
            b = next(news, nothing)
        else:
            yield a, b
            a, b = next(olds, nothing), next(news, nothing)
