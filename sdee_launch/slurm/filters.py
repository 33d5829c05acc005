"""What a task gives up when it joins an instance, in the form that the plugin takes.

The plugin is C and decides nothing: it gets a mask of the capabilities to keep, and the seccomp
filter as the kernel wants it, an array of `struct sock_filter` in a file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Guard:
    """Capabilities to keep (a bit each), the compiled filter, variables of a session."""

    bounding: int
    filter: bytes = b""
    environment: Mapping[str, str] = field(default_factory=dict)

    def descriptor(self) -> int:
        """The filter in a file; the caller's to close. Raises OSError."""
        fd = os.memfd_create("sdee-seccomp", os.MFD_CLOEXEC)
        os.write(fd, self.filter)
        return fd
