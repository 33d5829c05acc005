"""What a server imports on its way, for a process that is made before it is needed.

One list for all who make such processes. The C extensions, and the ring that can't do without
one, may be missing: a server takes another transport then.
"""

from __future__ import annotations

import importlib

_SERVER = (
    "encodings.ascii", "mount_helpers.fuse", "sdeefs.background", "sdeefs.core.filesystem",
    "sdeefs.session", "sdeefs.transports.choose", "sdeefs.transports.device",
    "sdeefs.transports.mount_device", "sdeefs.watch",
)  # fmt: skip
_OPTIONAL = ("sdeefs.transports.ring_transport", "sdeefs.transports._shortcuts")


def preload(with_trio: bool = True) -> None:
    """Import all that a server needs, so that it serves at once. Raises ImportError.

    Without trio, which takes longest, where a server waits with it until it serves requests.
    """
    for name in _SERVER:
        importlib.import_module(name)
    for name in _OPTIONAL:
        try:
            importlib.import_module(name)
        except ImportError:
            pass
    if with_trio:
        importlib.import_module("trio")
