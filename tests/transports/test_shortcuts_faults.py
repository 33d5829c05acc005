"""The shortcuts where something fails: nothing half made stays, and no request brings them down."""

from __future__ import annotations

import logging
import os
import random
import struct

import pytest

from mount_helpers.namespaces import IdRange
from sdeefs.core.nodes import Directory
from sdeefs.transports import shortcuts, wire
from sdeefs.transports.requests import Features, handlers
from sdeefs.transports.wire import Opcode
from tests.transports.test_shortcuts import SETAS, Player, Side, sides

if (_reason := shortcuts.why_not(object())) != "another core":  # type: ignore[arg-type]
    pytest.skip(f"shortcuts: {_reason}", allow_module_level=True)


class _NoMemory:
    """Backing ids of a server that has no memory left."""

    def acquire(self, node: int, handle: int, backing: int | None) -> int:
        raise MemoryError

    def release(self, handle: int) -> None:
        raise AssertionError("was never acquired")


def _look_up(side: Side, name: bytes) -> int:
    number: int = struct.unpack_from("=Q", side.ask(Opcode.LOOKUP, 1, name + b"\0")[1])[0]
    return number


def test_a_handle_that_is_refused_its_backing_id_is_none() -> None:
    """Its descriptor is closed at once, and must not be closed once more when the mount ends."""
    with sides("plain") as (_, c):
        filesystem, features, none = c.filesystem, Features(False, True, False), _NoMemory()
        filesystem.passthrough = True
        table = handlers(filesystem, features, none, lambda _: None)  # type: ignore[arg-type]
        c.table = shortcuts.shorten(filesystem, table, none, features)
        node = _look_up(c, b"only-upper")
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(MemoryError):
            c.ask(Opcode.OPEN, node, wire.OPEN_IN.pack(os.O_RDONLY, 0))
        assert len(os.listdir("/proc/self/fd")) == before
        assert filesystem.counts()["files"] == 0


def test_what_fails_in_one_of_a_batch_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """The kernel sends no FORGET twice: what is dropped here stays for good."""
    caplog.set_level(logging.DEBUG)
    with sides("plain") as both:
        for side in both:
            nodes = side.filesystem.table.nodes
            removed = []
            for name in (b"one\0", b"two\0", b"three\0"):
                made = side.ask(Opcode.MKDIR, 1, wire.MKDIR_IN.pack(0o755, 0) + name)[1]
                removed.append(struct.unpack_from("=Q", made)[0])
                assert side.ask(Opcode.RMDIR, 1, name)[0] == 0
            held = [nodes[number] for number in removed]
            fds = [node.upper_fd for node in held if isinstance(node, Directory)]
            kept = _look_up(side, b"only-upper")
            os.close(fds[0])  # to close it once more is EBADF
            ones = b"".join(wire.FORGET_ONE.pack(node, 1) for node in (*removed, kept))
            caplog.clear()
            assert side.ask(Opcode.BATCH_FORGET, 0, wire.BATCH_FORGET_IN.pack(4, 0) + ones)[0] == 0
            assert not nodes.keys() & {*removed, kept}
            for fd in fds[1:]:
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.fstat(fd)
            assert [record.getMessage() for record in caplog.records] == [
                f"forgetting node {removed[0]}: [Errno 9] Bad file descriptor"
            ]


def test_requests_that_no_kernel_sends() -> None:
    """Too short, too long, of nobody: an error each, and the union goes on."""
    chance = random.Random(1)
    with sides("plain") as (_, c):
        nodes = [0, 1, 1 << 63, *(_look_up(c, name) for name in (b"file", b"only-upper", b"dir"))]
        for _ in range(3000):
            opcode = chance.choice(list(shortcuts.SHORTCUTS))
            # The first words are small: what they count would take gigabytes else.
            body = struct.pack("=QQII", *(chance.choice([0, 1, 2, 300]) for _ in range(4)))
            if chance.random() < 0.3:
                body = struct.pack("=QQI", 1, chance.choice([1 << 62, 1 << 63, (1 << 64) - 1]), 64)
            body += chance.randbytes(chance.randrange(0, 400)) + chance.choice([b"", b"\0"])
            try:
                c.table[opcode](chance.choice(nodes), body[: chance.randrange(0, 450)], 0, 0, 1)
            except (OSError, struct.error, ValueError, OverflowError):
                pass
        assert _look_up(c, b"file") in c.filesystem.table.nodes


def test_a_map_of_all_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    every = (IdRange(0, 0, 1 << 32),)
    monkeypatch.setitem(SETAS, "all ids", {"uid_lower": every, "gid_lower": every})
    with sides("all ids") as (python, c):
        Player(python, c).ask(Opcode.LOOKUP, 1, b"file\0")
