"""In a keeper: one request to make an instance, as sdee_launch.site wants it put."""

from __future__ import annotations

from sdee_launch.protocol import Refused

Answer = tuple[dict[str, object], list[int]]


def make(message: dict[str, object], fds: list[int]) -> Answer:
    """Make an instance: its init, engine and servers. Raises OSError, Refused."""
    raise Refused("instances can't be made yet")
