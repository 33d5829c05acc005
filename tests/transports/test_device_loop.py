"""The device's loop in C, on descriptors that aren't /dev/fuse."""

from __future__ import annotations

import errno
import os
import socket
import threading
from typing import Any

import pytest

from sdeefs.transports import wire
from sdeefs.transports.forgetting import Forgetter
from tests.transports.server_lab import DEADLINE, wait_for

_device = pytest.importorskip("sdeefs.transports._device", reason="needs the C extensions")


def test_the_loop_ends_when_the_device_was_replaced() -> None:
    """By /dev/null, at the end of a connection that nobody may abort: a reader that still comes
    back from the kernel must not spin."""
    ended = []
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    loop = _device.Device(8192, [], print, print)
    thread = threading.Thread(target=lambda: ended.append(loop.run(null)), daemon=True)
    thread.start()
    thread.join(DEADLINE)
    os.close(null)
    assert ended == [errno.ENODEV]


def test_what_is_forgotten_is_seen_to_in_order_by_a_thread_of_its_own() -> None:
    """Requests on a socket that keeps their bounds, as /dev/fuse does."""
    seen: list[tuple[int, int]] = []
    threads = set()

    def forget(node: int, body: bytes, uid: int, gid: int, pid: int) -> None:
        seen.append((node, *wire.FORGET_IN.unpack_from(body)))

    def batch_forget(node: int, body: bytes, uid: int, gid: int, pid: int) -> None:
        count = wire.BATCH_FORGET_IN.unpack_from(body)[0]
        assert len(body) == 8 + 16 * count
        assert count <= 256
        threads.add(threading.current_thread().name)
        seen.extend(wire.FORGET_ONE.iter_unpack(body[8:]))
        if (2, 3) in seen:
            raise OSError(5, "no reason to end")

    def request(opcode: wire.Opcode, node: int, body: bytes) -> None:
        kernel.send(wire.IN_HEADER.pack(40 + len(body), opcode, 2, node, 0, 0, 0, 0, 0) + body)

    handlers: list[Any] = [forget] * wire.OPCODES
    handlers[wire.Opcode.BATCH_FORGET] = batch_forget
    kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernel, ours:
        loop = _device.Device(1 << 16, handlers, print, print)
        forgetter = Forgetter(loop, batch_forget)
        forgetter.start()
        reader = threading.Thread(target=loop.run, args=(ours.fileno(),), daemon=True)
        reader.start()
        wanted = [(number, number + 1) for number in range(1000)]
        for node, lookups in wanted[:300]:
            request(wire.Opcode.FORGET, node, wire.FORGET_IN.pack(lookups))
        ones = b"".join(wire.FORGET_ONE.pack(*one) for one in wanted[300:])
        request(wire.Opcode.BATCH_FORGET, 0, wire.BATCH_FORGET_IN.pack(700, 0) + ones)
        wait_for(lambda: len(seen) >= 1000, "all of them")
        assert seen == wanted
        assert threads == {"forgetter"}
        counts = loop.counts()
        assert counts[wire.Opcode.FORGET] == 300
        assert counts[wire.Opcode.BATCH_FORGET] == 1
        forgetter.end(DEADLINE)
        assert "forgetter" not in {thread.name for thread in threading.enumerate()}
        request(wire.Opcode.FORGET, 7, wire.FORGET_IN.pack(9))  # now the reader sees to it
        wait_for(lambda: seen[-1] == (7, 9), "the last one")
        kernel.shutdown(socket.SHUT_RDWR)
        reader.join(DEADLINE)
        assert not reader.is_alive()
