"""The device's loop in C, on descriptors that aren't /dev/fuse."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from tests.transports.server_lab import DEADLINE

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
