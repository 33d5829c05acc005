"""What a server may do, and what it gives up before its first thread."""

from __future__ import annotations

import ctypes
import os
import struct

from sdeefs import descriptors

CAP_SYS_ADMIN = 21
CAP_SYS_RESOURCE = 24
_LINUX_CAPABILITY_VERSION_3 = 0x20080522


def on_host(capability: int = CAP_SYS_ADMIN) -> bool:
    """Whether we hold a capability in the host's user namespace, where `trusted.*` belongs."""
    try:
        with open("/proc/self/uid_map", encoding="ascii") as file:
            if file.read().split() != ["0", "0", "4294967295"]:
                return False
        with open("/proc/thread-self/status", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("CapEff:"):
                    return bool(int(line.split()[1], 16) >> capability & 1)
    except OSError:
        pass
    return False


def give_up(capability: int) -> None:
    """Take a capability from this thread (and those it starts) for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = ctypes.create_string_buffer(struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0))
    data = ctypes.create_string_buffer(24)
    if libc.capget(header, data) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    words = list(struct.unpack("=6I", data.raw[:24]))  # effective, permitted, inheritable; twice
    word, bit = divmod(capability, 32)
    for index in range(3):
        words[3 * word + index] &= ~(1 << bit)
    data = ctypes.create_string_buffer(struct.pack("=6I", *words))
    if libc.capset(header, data) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def settle() -> None:
    """Make this process a file server: modes as callers give them, many descriptors, and no right
    to the blocks that are reserved or over quota, which our callers don't have either."""
    os.umask(0)
    descriptors.raise_limit()
    try:
        give_up(CAP_SYS_RESOURCE)
    except OSError:
        pass  # it wasn't ours
