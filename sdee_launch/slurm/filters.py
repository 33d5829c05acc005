"""What a task gives up when it joins an instance, in the form that the plugin takes.

The plugin is C and decides nothing: it gets a mask of the capabilities to keep, and the seccomp
filter as the kernel wants it, an array of `struct sock_filter` in a file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from sdee_launch.privileges import Guard, make_guard


def of(extra: Mapping[str, object]) -> Guard:
    """The guard of an instance, from what its record keeps for those who join; else the default."""
    found = extra.get("guard", extra)
    if not isinstance(found, Mapping) or "capabilities" not in found:
        return make_guard()
    return Guard(
        int(str(found["capabilities"]), 16),
        bytes.fromhex(str(found.get("seccomp", ""))),
        bool(found.get("no_new_privs")),
    )


def descriptor(guard: Guard) -> int:
    """Its filter in a file; the caller's to close. Raises OSError."""
    fd = os.memfd_create("sdee-seccomp", os.MFD_CLOEXEC)
    os.write(fd, guard.seccomp)
    return fd
