"""One object of an upper as a manifest has it, and a manifest as a compressed file of them.

A manifest is lines of fields between tabs under zstd, one per object, in the order of `sort_key`: a
directory stands before what is in it. Ids are those inside the environment. Names are bytes, in
which a tab, a newline and a backslash are escaped; xattrs are pairs in base64. It is read and
written at each submission, and so has a form that costs little.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple, Protocol, TypeVar

import zstandard

from sdee_launch.deploy.errors import Damaged

_HEADER = b"sdee-manifest\t1"
#: A line longer than this is no manifest of ours (names, link target and xattrs are bounded).
MAX_LINE = 1 << 20
_KINDS = {kind.encode(): kind for kind in "dflcp"}
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


class Line(NamedTuple):
    """An entry as its manifest has it: of most, nothing but the path is asked."""

    path: bytes
    text: bytes

    @property
    def kind(self) -> bytes:
        """As in `Entry`."""
        return self.text.split(b"\t", 2)[1]

    def entry(self) -> Entry:
        """The entry. Raises Damaged."""
        return decode(self.text)


class Named(Protocol):
    """What has its place in a manifest."""

    @property
    def path(self) -> bytes: ...


A = TypeVar("A", bound=Named)
B = TypeVar("B", bound=Named)


def sort_key(path: bytes) -> bytes:
    """The order of a manifest: by components, so that a directory's objects follow it."""
    return path.replace(b"/", b"\0")


def same_content(a: Entry, b: Entry) -> bool:
    """The paper's rule: size and modification time decide; here also the package's number."""
    return (a.size, a.mtime_ns, a.generation) == (b.size, b.mtime_ns, b.generation)


def same_object(a: Entry, b: Entry) -> bool:
    """Whether nothing that a node would see differs."""
    return a[:11] == b[:11]  # up to `generation`


def with_content(entry: Entry, old: Entry) -> Entry:
    """The entry with the content that `old` says: its package and digest."""
    return Entry._make(entry[:10] + old[10:12] + entry[12:])


_ESCAPES = {b"\\": b"\\\\", b"\t": b"\\t", b"\n": b"\\n"}
_ESCAPED = re.compile(rb"[\\\t\n]")
_UNESCAPED = re.compile(rb"\\(.)")
_CHARACTERS = {b"\\": b"\\", b"t": b"\t", b"n": b"\n"}


def _escape(text: bytes) -> bytes:
    return _ESCAPED.sub(lambda match: _ESCAPES[match[0]], text)


def _unescape(text: bytes) -> bytes:
    return _UNESCAPED.sub(lambda match: _CHARACTERS[match[1]], text)


def encode(entry: Entry) -> bytes:
    """One line."""
    xattrs = b""
    if entry.xattrs:
        xattrs = b",".join(b64encode(k) + b":" + b64encode(v) for k, v in entry.xattrs)
    return b"%b\t%b\t%d\t%d\t%d\t%d\t%d\t%b\t%b\t%d\t%d\t%b\t%d\t%d\n" % (
        _escape(entry.path),
        entry.kind.encode(),
        entry.mode,
        entry.uid,
        entry.gid,
        entry.mtime_ns,
        entry.size,
        _escape(entry.target) if entry.target else b"",
        xattrs,
        entry.group,
        entry.generation,
        entry.digest.encode(),
        entry.ctime_ns,
        entry.inode,
    )


def prefix(
    path: bytes, kind: bytes, mode: int, uid: int, gid: int, mtime_ns: int, size: int
) -> bytes:
    """How the line of such an object begins: whatever a change of the object changes there."""
    return b"%b\t%b\t%d\t%d\t%d\t%d\t%d\t" % (
        _escape(path), kind, mode, uid, gid, mtime_ns, size,
    )  # fmt: skip


def suffix(ctime_ns: int, inode: int) -> bytes:
    """How the line of such a file ends."""
    return b"\t%d\t%d" % (ctime_ns, inode)


def content_of(line: bytes) -> tuple[int, int]:
    """(group, generation) of a line that is known to be a file's."""
    fields = line.rsplit(b"\t", 5)
    return int(fields[1]), int(fields[2])


def same_but_for_change(old: Line, new: Line) -> bool:
    """Whether two lines differ in no more than what the source knows a change by. If so, `new` is as
    proper as `old`."""
    if old.text == new.text:
        return True
    head, *change = new.text.rsplit(b"\t", 2)
    return old.text.rsplit(b"\t", 2)[0] == head and all(map(bytes.isdigit, change))


def decode(line: bytes) -> Entry:
    """The entry of a line. Raises Damaged on anything that `encode` wouldn't write."""
    try:
        (
            path,
            kind,
            mode,
            uid,
            gid,
            mtime,
            size,
            target,
            marks,
            group,
            number,
            digest,
            ctime,
            inode,
        ) = line.split(b"\t")
        if b"\\" in path:
            path = _unescape(path)
        xattrs: tuple[tuple[bytes, bytes], ...] = ()
        if marks:
            pairs = (pair.split(b":") for pair in marks.split(b","))
            xattrs = tuple((b64decode(k), b64decode(v)) for k, v in pairs)
        entry = Entry(
            path,
            _KINDS[kind],
            int(mode),
            int(uid),
            int(gid),
            int(mtime),
            int(size),
            _unescape(target) if target else b"",
            xattrs,
            int(group),
            int(number),
            digest.decode("ascii"),
            int(ctime),
            int(inode),
        )
    except ValueError as error:
        raise Damaged(f"a manifest has a line that can't be read ({error})") from None
    except KeyError:  # a kind or an escape that there isn't
        raise Damaged(f"a manifest names what no upper can have: {line[:80]!r}") from None
    if not proper(entry):
        raise Damaged(f"a manifest names what no upper can have: {entry.path[:80]!r}")
    return entry


#: An empty component, `.`, `..`, a name that is too long.
_TRICK = re.compile(rb"(?:\A|/)\.{0,2}(?:/|\Z)|[^/]{256}|\0")


def _plain(path: bytes) -> bool:
    """Whether a path can't have any of that: most are so, and told so in little time."""
    return (
        len(path) < 256
        and b"/." not in path
        and b"//" not in path
        and b"\0" not in path
        and not path.startswith((b"/", b"."))
        and not path.endswith(b"/")
    )


def proper(entry: Entry) -> bool:
    """Whether an entry could be an object of an upper: a relative path without tricks."""
    path, kind, mode, uid, gid, mtime, size, target, xattrs = entry[:9]
    return (
        (_plain(path) or not _TRICK.search(path) if path else kind == "d")
        and 0 <= mode <= 0o7777
        and 0 <= uid < 1 << 32
        and 0 <= gid < 1 << 32
        and 0 <= size < 1 << 63
        and abs(mtime) < 10**9 << 63  # nanoseconds: years after 2262 need more than 63 bits
        and entry.generation >= 0
        and b"\0" not in target
        and (not xattrs or all(name.startswith(XATTRS) for name, _ in xattrs))
    )


class Writer:
    """Writes a manifest. A context manager; `entries` counts."""

    def __init__(self, file: IO[bytes]) -> None:
        self.entries = 0
        self._stream = zstandard.ZstdCompressor(level=1).stream_writer(file, closefd=False)
        self._lines = [_HEADER + b"\n"]

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._lines.append(b"end\t%d\n" % self.entries)
            self._flush()
            self._stream.close()  # type: ignore[no-untyped-call]

    def add(self, entry: Entry) -> None:
        """Append an entry; the caller keeps the order."""
        self.copy(encode(entry))

    def copy(self, line: bytes) -> None:
        """Append a line as it stands, its newline included."""
        self._lines.append(line)
        self.entries += 1
        if len(self._lines) >= 256:
            self._flush()

    def _flush(self) -> None:
        self._stream.write(b"".join(self._lines))
        self._lines.clear()


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
    for line in lines(file):
        yield decode(line.text)


def lines(file: Any) -> Iterator[Line]:
    """The same as `read`, each as it stands: its order is checked, the rest is its reader's matter."""
    texts = _lines(file)
    last = b""
    count = 0
    header = next(texts, b"")
    if header != _HEADER:
        known = header.startswith(b"sdee-manifest")
        raise Damaged("a manifest has another format" if known else "this is no manifest")
    for text in texts:
        path = text.partition(b"\t")[0]
        if path == b"end" and text.count(b"\t") == 1:
            if text != b"end\t%d" % count:
                raise Damaged("a manifest doesn't have as many entries as it says")
            return
        if b"\\" in path:
            try:
                path = _unescape(path)
            except KeyError:
                raise Damaged("a manifest has a name that can't be read") from None
        key = sort_key(path)
        if key <= last and count:
            raise Damaged(f"a manifest is out of order at {path[:80]!r}")
        last = key
        count += 1  # noqa: SIM113
        yield Line(path, text)
    raise Damaged("a manifest is cut off")


def merge(old: Iterable[A], new: Iterable[B]) -> Iterator[tuple[A | None, B | None]]:
    """Both streams side by side: (old, new) of each path, None where it has none."""
    olds, news = iter(old), iter(new)
    a, b = next(olds, None), next(news, None)
    while a is not None and b is not None:
        if a.path == b.path:
            yield a, b
            a, b = next(olds, None), next(news, None)
        elif sort_key(a.path) < sort_key(b.path):
            yield a, None
            a = next(olds, None)
        else:
            yield None, b
            b = next(news, None)
    while a is not None:
        yield a, None
        a = next(olds, None)
    while b is not None:
        yield None, b
        b = next(news, None)
