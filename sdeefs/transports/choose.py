"""Which transport serves a mount, and making it."""

from __future__ import annotations

from dataclasses import dataclass

from sdeefs.core.api import Operations
from sdeefs.transports.transport import Transport, TransportOptions

#: The words that `--transport` takes; the first three from the fastest on.
NAMES = ("ring", "device", "pyfuse3", "auto")


@dataclass(frozen=True)
class Choice:
    """A transport's name, and why it was taken, in words that go into a line of the log."""

    name: str
    reason: str


def pick(transport: str = "auto") -> Choice:
    """The transport to use. A forced one that can't work here is an OSError that says why."""
    from sdeefs.transports import ring

    if transport == "auto":
        why_not = ring.why_not()
        if why_not is None:
            return Choice("ring", "FUSE over io_uring works here")
        return Choice("device", f"no io_uring: {why_not}")
    if transport not in NAMES:
        raise ValueError(f"transport {transport!r}: known are {', '.join(NAMES)}")
    if transport == "ring":
        why_not = ring.why_not()
        if why_not is not None:
            raise OSError(f"transport ring: {why_not}")
    if transport == "pyfuse3":
        try:
            import pyfuse3  # noqa: F401
        except ImportError as error:
            raise OSError(f"transport pyfuse3: {error}") from None
    return Choice(transport, "as asked for")


def make(
    name: str, operations: Operations, fuse_fd: int, options: TransportOptions | None = None
) -> Transport:
    """A transport over a mounted /dev/fuse, whose descriptor it owns from now on."""
    if name == "ring":
        from sdeefs.transports.ring_transport import RingTransport

        ring: Transport = RingTransport(operations, fuse_fd, options)
        return ring
    if name == "pyfuse3":
        from sdeefs.transports.pyfuse3_transport import Pyfuse3Transport

        return Pyfuse3Transport(operations, fuse_fd, options)
    from sdeefs.transports.device import DeviceTransport

    return DeviceTransport(operations, fuse_fd, options)
