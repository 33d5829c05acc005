"""fanotify(7) marks on directories that tell names, as any user may set them (Linux >= 5.13)."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from mount_helpers import syscalls
from mount_helpers.syscalls import (
    FAN_ATTRIB,
    FAN_CLASS_NOTIF,
    FAN_CLOEXEC,
    FAN_CREATE,
    FAN_DELETE,
    FAN_EVENT_ON_CHILD,
    FAN_MARK_ADD,
    FAN_MARK_ONLYDIR,
    FAN_MARK_REMOVE,
    FAN_MODIFY,
    FAN_MOVED_FROM,
    FAN_MOVED_TO,
    FAN_NONBLOCK,
    FAN_ONDIR,
    FAN_Q_OVERFLOW,
    FAN_REPORT_DFID_NAME,
    FAN_REPORT_FID,
    FAN_UNLIMITED_MARKS,
    FAN_UNLIMITED_QUEUE,
)

#: Every change of a directory's names, and of the files and directories in it.
CHANGES = FAN_CREATE | FAN_DELETE | FAN_MOVED_FROM | FAN_MOVED_TO | FAN_MODIFY | FAN_ATTRIB
#: What of a directory is told: its own names and attributes, and those of what is in it.
_HERE = FAN_EVENT_ON_CHILD | FAN_ONDIR
#: A mark's whole mask.
WATCHED = CHANGES | _HERE
#: Those after which a name means something else.
NAMES = FAN_CREATE | FAN_DELETE | FAN_MOVED_FROM | FAN_MOVED_TO

_METADATA = struct.Struct("=IBBHQii")  # struct fanotify_event_metadata
_INFO = struct.Struct("=BBH")  # struct fanotify_event_info_header
_FID = struct.Struct("=8sIi")  # fsid, then struct file_handle: bytes, type
_WITH_NAME = (
    syscalls.FAN_EVENT_INFO_TYPE_DFID_NAME,
    syscalls.FAN_EVENT_INFO_TYPE_DFID,
)


class Event(NamedTuple):
    """One change. `directory` is its handle as `name_to_handle_at` gives it; `name` is "." for the
    directory itself, and empty where the kernel tells none."""

    mask: int
    directory: bytes
    name: bytes

    @property
    def overflow(self) -> bool:
        """Events were lost: anything may have changed."""
        return bool(self.mask & FAN_Q_OVERFLOW)


class Group:
    """A queue of events and the marks that fill it."""

    def __init__(self) -> None:
        flags = FAN_CLASS_NOTIF | FAN_REPORT_FID | FAN_REPORT_DFID_NAME
        flags |= FAN_CLOEXEC | FAN_NONBLOCK
        unlimited = FAN_UNLIMITED_QUEUE | FAN_UNLIMITED_MARKS
        try:
            self.fd = syscalls.fanotify_init(flags | unlimited)
        except PermissionError:
            self.fd = syscalls.fanotify_init(flags)

    def mark(self, directory: int, events: int = CHANGES) -> None:
        """Watch a directory, by its descriptor. Raises OSError: ENOSPC where marks run out,
        EXDEV, ENODEV or EOPNOTSUPP where its filesystem can't name its objects."""
        mask = events | _HERE
        # Through /proc: the descriptor may be O_PATH, which fanotify_mark(2) takes as a dirfd only.
        path = b"/proc/self/fd/%d" % directory
        flags = FAN_MARK_ADD | FAN_MARK_ONLYDIR
        syscalls.fanotify_mark(self.fd, flags, mask, syscalls.AT_FDCWD, path)

    def unmark(self, directory: int) -> None:
        """Watch a directory no more."""
        path = b"/proc/self/fd/%d" % directory
        try:
            syscalls.fanotify_mark(self.fd, FAN_MARK_REMOVE, WATCHED, syscalls.AT_FDCWD, path)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise

    def read(self) -> list[Event]:
        """What has happened since; empty where nothing has."""
        try:
            data = os.read(self.fd, 1 << 16)
        except BlockingIOError:
            return []
        return list(parse(data))

    def close(self) -> None:
        """Drop the queue and all its marks."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def parse(data: bytes) -> Iterator[Event]:
    """The events of one read."""
    at = 0
    while at + _METADATA.size <= len(data):
        length, _, _, head, mask, fd, _ = _METADATA.unpack_from(data, at)
        if length < _METADATA.size:
            return
        if fd >= 0:
            os.close(fd)
        directory, name = _directory(data[at + head : at + length])
        yield Event(mask, directory, name)
        at += length


def _directory(infos: bytes) -> tuple[bytes, bytes]:
    """The directory's handle and the name, from the records after an event."""
    at = 0
    while at + _INFO.size <= len(infos):
        kind, _, length = _INFO.unpack_from(infos, at)
        if length < _INFO.size:
            break
        if kind in _WITH_NAME:
            _, count, handle_type = _FID.unpack_from(infos, at + _INFO.size)
            start = at + _INFO.size + _FID.size
            handle = struct.pack("=i", handle_type) + infos[start : start + count]
            name = infos[start + count : at + length].split(b"\0", 1)[0]
            return handle, name
        at += length
    return b"", b""
