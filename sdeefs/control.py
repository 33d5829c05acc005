"""The control socket of a server and the record beside it: how other commands find it.

Each server has `ID.json` (what is mounted where; fixed, readable while the server hangs) and
`ID.sock` (a connection is answered with one JSON object: what it is doing) in a directory that
belongs to its user alone: /run/sdeefs for root, $XDG_RUNTIME_DIR/sdeefs, or /tmp/sdeefs-UID.
"""

from __future__ import annotations

import errno
import json
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any


def _candidates() -> Iterator[str]:
    if os.geteuid() == 0:
        yield "/run/sdeefs"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        yield os.path.join(runtime, "sdeefs")
    yield f"/tmp/sdeefs-{os.geteuid()}"


def _ours(directory: str) -> bool:
    """A directory (no link) that only we can write to: others must not plant records."""
    try:
        found = os.lstat(directory)
    except OSError:
        return False
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.geteuid()
        and not found.st_mode & 0o022
        and os.access(directory, os.W_OK | os.X_OK)
    )


def runtime_directory() -> Path | None:
    """The directory for a new server, made if need be; None where none can be had."""
    from pathlib import Path

    for directory in _candidates():
        try:
            os.mkdir(directory, 0o700)
        except OSError:
            pass
        if _ours(directory):
            return Path(directory)
    return None


def records() -> list[dict[str, Any]]:
    """What every server of this user wrote at its start; `file` is the record's own path."""
    found = []
    for directory in _candidates():
        if not _ours(directory):
            continue
        for name in sorted(os.listdir(directory)):
            if not name.endswith(".json"):
                continue
            path = os.path.join(directory, name)
            try:
                with open(path, encoding="utf-8") as file:
                    record = json.load(file)
            except (OSError, ValueError):
                continue
            if isinstance(record, dict):
                found.append({**record, "file": path})
    return found


def ask(record: dict[str, Any], seconds: float = 2.0) -> dict[str, Any] | None:
    """What a server says of itself; None if it doesn't within that time.

    Raises ConnectionRefusedError or FileNotFoundError where there is no server any more.
    """
    import socket

    path = os.path.splitext(record["file"])[0] + ".sock"
    answer = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(seconds)
        try:
            connection.connect(path)
            while part := connection.recv(1 << 16):
                answer += part
        except (TimeoutError, ConnectionResetError, BlockingIOError):
            return None
    try:
        found = json.loads(answer)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def forget(record: dict[str, Any]) -> None:
    """Remove the files of a server that is gone."""
    for suffix in (".sock", ".json"):
        try:
            os.unlink(os.path.splitext(record["file"])[0] + suffix)
        except OSError:
            pass


class Control:
    """The files of this server. Made before the mount is handed out, removed with `close()`."""

    def __init__(self, directory: Path, identity: str, listener: socket.socket) -> None:
        self.directory = directory
        self.identity = identity
        self.listener = listener

    @classmethod
    def open(cls) -> Control | None:
        """Listen under the number of this process; None where there is no place for a socket."""
        import socket

        directory = runtime_directory()
        if directory is None:
            return None
        for attempt in range(100):
            # Another PID namespace may have a server with our number.
            identity = f"{os.getpid()}" if not attempt else f"{os.getpid()}-{attempt}"
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            path = directory / f"{identity}.sock"
            try:
                listener.bind(str(path))
                os.chmod(path, 0o600)
                listener.listen(16)
                return cls(directory, identity, listener)
            except OSError as error:
                listener.close()
                if error.errno != errno.EADDRINUSE:
                    return None
                if not _answers(path):
                    path.unlink(missing_ok=True)
                    path.with_suffix(".json").unlink(missing_ok=True)
        return None

    def record(self, what: dict[str, Any]) -> None:
        """Write what is mounted, in one step."""
        file = self.directory / f"{self.identity}.json"
        scratch = self.directory / f".{self.identity}.new"
        scratch.write_text(json.dumps(what))
        scratch.rename(file)

    def close(self) -> None:
        """Stop listening and remove the files."""
        self.listener.close()
        forget({"file": str(self.directory / f"{self.identity}.json")})


def _answers(path: Path) -> bool:
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1)
        try:
            connection.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True
