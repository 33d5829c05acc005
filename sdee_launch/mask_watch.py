"""Where secrets are made is watched: what changes there is looked at again within a second.

Marks of fanotify(7) lie on the directories of /etc and on those that hold secrets already, where
only root may write: some hundreds, in which little happens. (A mark on the whole filesystem
would bring an event for each file that anybody makes.) The scan of all of lower goes on beside.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator

from mount_helpers import fanotify
from mount_helpers import syscalls as sc

#: Events are gathered for so many seconds.
SETTLE = 0.3
#: More marks than this aren't set, and more names at once are a matter for a whole scan.
MOST_MARKS = 8192
MOST_NAMES = 200
_EVENTS = sc.FAN_CREATE | sc.FAN_MOVED_TO | sc.FAN_ATTRIB
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Watch:
    """The marks, and the paths (relative to /) of the directories that they are on.

    Raises OSError where the kernel has none.
    """

    def __init__(self, root: bytes = b"/") -> None:
        self._root = root
        self._group = fanotify.Group()
        self._paths: dict[bytes, bytes] = {}

    def fileno(self) -> int:
        """What becomes readable."""
        return self._group.fd

    def close(self) -> None:
        """Drop all marks."""
        self._group.close()

    def cover(self, secrets: Iterable[bytes]) -> None:
        """Mark the directories of these secrets, and /etc with all below."""
        wanted = {os.path.dirname(path) for path in secrets}
        wanted.update(below(self._root, b"etc"))
        self._paths.clear()
        for path in wanted:
            if len(self._paths) >= MOST_MARKS:
                return
            self.mark(path)

    def mark(self, path: bytes) -> None:
        """Watch one directory, if it is there and only root's to write."""
        with contextlib.suppress(OSError):
            fd = os.open(os.path.join(self._root, path), _OPEN)
            try:
                status = os.fstat(fd)
                if status.st_uid != 0 or status.st_mode & 0o022:
                    return
                handle = sc.name_to_handle_at(fd, b"", sc.AT_EMPTY_PATH)[0]
                self._group.mark(fd, _EVENTS)
                self._paths[handle] = path
            finally:
                os.close(fd)

    def mark_below(self, path: bytes) -> None:
        """Watch a directory that is new, and those in it."""
        if len(self._paths) < MOST_MARKS:
            for directory in below(self._root, path):
                self.mark(directory)

    def changed(self) -> set[bytes] | None:
        """The paths at which something was made or given other permissions; None: too many."""
        found: set[bytes] = set()
        many = False
        while events := self._group.read():
            for event in events:
                many = many or event.overflow
                path = self._paths.get(event.directory)
                if path is not None and event.name not in (b"", b"."):
                    found.add(os.path.join(path, event.name))
            many = many or len(found) > MOST_NAMES
        return None if many else found


def below(root: bytes, top: bytes) -> Iterator[bytes]:
    """A directory and those in it that everybody may enter: what is closed is hidden whole."""
    stack = [top]
    while stack:
        path = stack.pop()
        try:
            with os.scandir(os.path.join(root, path)) as entries:
                inner = [e for e in entries if e.is_dir(follow_symlinks=False)]
                stack += [
                    os.path.join(path, e.name)
                    for e in inner
                    if stat.S_IMODE(e.stat(follow_symlinks=False).st_mode) & 0o005 == 0o005
                ]
        except OSError:
            continue
        yield path
