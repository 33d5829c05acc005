"""The words between `sdee` and `sdeed`: one bounded JSON request, one reply, and descriptors beside.

On the wire (a stream on a unix socket) either side's message is four bytes of length, big-endian,
and that many bytes of JSON, an object. Descriptors (SCM_RIGHTS) travel with the four bytes.

A request is `{"op": NAME, …}`. A reply is `{"ok": true, …}` or `{"ok": false, "error": TEXT,
"kind": WORD}`; kinds are those of `Refused.kind`.

`join` takes `env`, `engine`, `binds` and gives what `sdee_launch.site.Instance` says of the live
instance, with the descriptors in the order that its reply's `fds` names them.

This module is on the path of `sdee run`, so before the request is out it imports only what is built
into the interpreter: `_socket` in place of `socket`, which costs ten milliseconds more, `posix` in
place of `os`, a millisecond more; and no `__future__`, so some annotations are strings.
"""

import _socket
import posix
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SOCKET_PATH = "/run/sdee/sdeed.sock"
#: Made in every instance, with the name of its environment.
INSIDE = "/run/sdee/inside"
#: No request is longer; a reply (a listing) may be.
MAX_REQUEST = 64 * 1024
MAX_REPLY = 8 * 1024 * 1024
#: The most descriptors that either side sends with one message.
MAX_DESCRIPTORS = 64
#: Seconds that a client waits for the whole answer: a first mask scan on a cold disk takes long.
REPLY_TIMEOUT = 120.0

_LENGTH_BYTES = 4
_CMSG_SPACE = _socket.CMSG_SPACE(MAX_DESCRIPTORS * 4)


class Unavailable(Exception):
    """No daemon answers on the socket."""


class Refused(Exception):
    """The daemon said no. `kind`: bad-request, denied, busy, missing, gone, failed, unknown-op.

    `gone`: the instance ended just now; asking again makes a new one. `rootless`: root can't make
    it, the user may.
    """

    def __init__(self, message: str, kind: str = "failed") -> None:
        super().__init__(message)
        self.kind = kind


class _Decoding:
    """What the scanner of `_json` wants to know."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    memo: dict[str, str] = {}

    @staticmethod
    def parse_constant(word: str) -> float:
        """NaN and its kin are not JSON."""
        raise ValueError(f"{word} in a message")


def variable(name: str) -> str:
    """A variable of the environment that this process was started with; "" if it isn't set."""
    value = posix.environ.get(name.encode(), b"")
    return value.decode(sys.getfilesystemencoding(), "surrogateescape")


def variables() -> dict[str, str]:
    """All variables, with what was changed by `os`, if that is there."""
    os = sys.modules.get("os")
    if os is not None:
        return dict(os.environ)
    encoding = sys.getfilesystemencoding()
    return {
        name.decode(encoding, "surrogateescape"): value.decode(encoding, "surrogateescape")
        for name, value in posix.environ.items()
    }


def _quote(text: str) -> str:
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return f'"{text}"'
    import _json  # a library to load, and seldom needed for a request

    return _json.encode_basestring_ascii(text)


def encode(value: object) -> str:
    """JSON of None, bools, ints, floats, strings, lists, tuples and dicts with string keys."""
    if value is None:
        return "null"
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, list | tuple):
        return "[" + ",".join([encode(x) for x in value]) + "]"
    if isinstance(value, dict):
        return "{" + ",".join([f"{_quote(k)}:{encode(v)}" for k, v in value.items()]) + "}"
    raise TypeError(f"{type(value).__name__} has no place in a message")


def decode(data: bytes) -> dict[str, object]:
    """The object that a message holds. Raises ValueError for anything else."""
    import _json

    scan = _json.make_scanner(_Decoding)  # type: ignore[arg-type]
    text = data.decode("utf-8").strip(" \t\r\n")
    try:
        value, end = scan(text, 0)
    except StopIteration:
        raise ValueError("not JSON") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if end != len(text):
        raise ValueError("more after the object")
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def frame(message: dict[str, object], limit: int) -> bytes:
    """A message as it goes on the wire. Raises ValueError if it is longer than `limit`."""
    data = encode(message).encode()
    if len(data) > limit:
        raise ValueError(f"a message of {len(data)} bytes; {limit} is the most")
    return len(data).to_bytes(_LENGTH_BYTES, "big") + data


def pack_descriptors(fds: list[int]) -> list[tuple[int, int, bytes]]:
    """The ancillary data that carries `fds`."""
    if not fds:
        return []
    words = b"".join([fd.to_bytes(4, "little") for fd in fds])  # ints as all our machines have them
    return [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, words)]


def unpack_descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors in ancillary data; they are the caller's now."""
    fds = []
    for level, kind, data in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            for start in range(0, len(data) - len(data) % 4, 4):
                fds.append(int.from_bytes(data[start : start + 4], "little"))
    return fds


class _Early:
    """The connection on which sdee-ask (ask.c) has asked for us, and what."""

    sock: _socket.socket | None = None
    request = b""


def take_early() -> None:
    """Take over the connection of sdee-ask, if it made one, for the first request that is the same."""
    said = posix.environ.pop(b"SDEE_ASKED", b"")
    if not said:
        return
    posix.unsetenv(b"SDEE_ASKED")
    number, _, _Early.request = said.partition(b" ")
    try:
        if int(number) > 2:
            posix.set_inheritable(int(number), False)
            _Early.sock = _socket.socket(fileno=int(number))
    except (ValueError, OverflowError, OSError):
        pass  # a variable that anybody could have set


def _asked_early(data: bytes) -> _socket.socket | None:
    """The connection on which just this was sent already. Another one is closed: nobody waits."""
    sock, _Early.sock = _Early.sock, None
    if sock is not None and data[_LENGTH_BYTES:] != _Early.request:
        sock.close()
        return None
    return sock


def _read_exactly(sock: _socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        more = sock.recv(min(count - len(data), 65536))
        if not more:
            raise Unavailable("sdeed closed the connection before its answer was whole")
        data += more
    return bytes(data)


def request(
    op: str,
    fds: list[int] | None = None,
    path: str | None = None,
    meanwhile: "Callable[[], object] | None" = None,
    **fields: object,
) -> tuple[dict[str, object], list[int]]:
    """Ask the daemon and wait for its answer: (the reply, the descriptors with it).

    `fds` go along and stay the caller's. `meanwhile` is called while the daemon is at work.
    Raises Unavailable if there is no daemon, Refused with the daemon's reason if it said no.
    """
    address = path or variable("SDEED_SOCKET") or SOCKET_PATH
    try:
        data = frame({"op": op, **fields}, MAX_REQUEST)
    except ValueError as error:
        raise Unavailable(f"{address}: {error}") from None
    early = None if fds else _asked_early(data)
    kind = _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC
    sock = early or _socket.socket(_socket.AF_UNIX, kind)
    got: list[int] = []
    try:
        sock.settimeout(REPLY_TIMEOUT)
        try:
            if early is None:
                sock.connect(address)
                # Over its limit the daemon answers without reading: the answer is still to be had.
                try:
                    sent = sock.sendmsg([data], pack_descriptors(fds or []))
                    if sent < len(data):
                        sock.sendall(data[sent:])
                except (BrokenPipeError, ConnectionResetError):
                    pass
            if meanwhile is not None:
                meanwhile()
            head, ancillary, _, _ = sock.recvmsg(
                _LENGTH_BYTES, _CMSG_SPACE, _socket.MSG_CMSG_CLOEXEC
            )
            got = unpack_descriptors(ancillary)
            if not head:
                raise Unavailable("sdeed closed the connection without an answer")
            if len(head) < _LENGTH_BYTES:
                head += _read_exactly(sock, _LENGTH_BYTES - len(head))
            length = int.from_bytes(head, "big")
            if length > MAX_REPLY:
                raise Unavailable(f"{address} answers {length} bytes: not sdeed")
            reply = decode(_read_exactly(sock, length))
        except TimeoutError:
            raise Unavailable(f"sdeed did not answer within {REPLY_TIMEOUT:.0f} s") from None
        except OSError as error:
            raise Unavailable(f"{address}: {error.strerror or error}") from None
        except ValueError as error:
            raise Unavailable(f"{address}: {error}") from None
        if not reply.get("ok"):
            raise Refused(str(reply.get("error")), str(reply.get("kind", "failed")))
    except BaseException:
        for fd in got:
            posix.close(fd)
        raise
    finally:
        sock.close()
    return reply, got
