"""What every transport is to the session that runs it, and how it is told to behave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

#: The names of the data paths, as `status` shows them.
PASSTHROUGH, WRITEBACK, PLAIN = "passthrough", "writeback", "plain"


@dataclass(frozen=True)
class TransportOptions:
    """What a transport may use; what the kernel doesn't offer is left out silently.

    `passthrough` excludes `writeback`: the latter is taken where the former can't be had. Forcing a
    data path is forbidding the others.
    """

    passthrough: bool = True  # Linux >= 6.9 and CAP_SYS_ADMIN on the host
    writeback: bool = True  # the kernel collects writes, and owns size and times meanwhile
    threads: int = 2  # that read requests, each with its own clone of the device
    workers: int = 8  # at most, for what takes long
    max_write: int = 1 << 20  # bytes of one WRITE or READ request
    max_background: int = 64  # requests that the kernel has on their way without a caller waiting
    max_stack_depth: int = 1  # 2 where a layer is itself stacked (overlayfs, fuse)
    readdirplus: bool = True  # directories are read with their entries' attributes
    cache_symlinks: bool = True
    acl: bool = True  # POSIX ACLs, checked by the kernel
    shortcuts: bool = True  # the commonest requests are answered in C, where that is built
    flush: bool = False  # ask the core at each close(2); else the kernel is told once not to
    ring_depth: int = 8  # requests of one CPU that are with the server at the same time
    ring_max_write: int = 1 << 18


class Transport(Protocol):
    """Brings the kernel's requests to the core. Made from an open, mounted /dev/fuse descriptor,
    which it owns from then on."""

    name: str

    @property
    def data_path(self) -> str:
        """ "passthrough", "writeback" or "plain"; known once `negotiate()` is done."""
        ...

    def negotiate(self) -> None:
        """Answer the kernel's INIT: after this the mount is live as soon as `run()` runs."""
        ...

    def run(self) -> None:
        """Serve until the mount is gone or `stop()` is called; negotiates first if need be."""
        ...

    def stop(self) -> None:
        """Give the connection up, from any thread: callers get ENOTCONN. Doesn't wait."""
        ...

    def connected(self) -> bool:
        """True from `negotiate()` to the end of `run()`."""
        ...

    def counters(self) -> dict[str, int]:
        """Requests served, by the opcode's name in lower case."""
        ...

    def invalidate_inode(self, node: int, attributes_only: bool = False) -> None:
        """See `sdeefs.core.api.Kernel`. Takes effect soon, without waiting."""
        ...

    def invalidate_entry(self, parent: int, name: bytes) -> None:
        """See `sdeefs.core.api.Kernel`. Takes effect soon, without waiting."""
        ...
