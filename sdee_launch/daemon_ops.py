"""Where operations of the daemon are registered, and what they are given.

A module that brings operations of its own (jobs, for one) is named in EXTENSIONS; it is imported
when the daemon starts, and marks coroutines with `@operation`:

    @operation("job-join", descriptors=0)
    async def job_join(daemon: Daemon, request: Request) -> Reply: …

They run in the daemon's event loop: what may block goes through `trio.to_thread.run_sync` or, if it
makes processes or touches a user's files, through `daemon.keeper(uid)`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from sdee_launch.protocol import Refused

if TYPE_CHECKING:
    from sdee_launch.daemon import Daemon

#: Modules with operations, imported if they are there.
EXTENSIONS = ("sdee_launch.slurm.daemon_jobs",)

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """One request: its fields as the client sent them (trust none), its descriptors, who asks."""

    op: str
    fields: dict[str, object]
    uid: int
    gid: int
    pid: int
    fds: tuple[int, ...] = ()  # the daemon closes them when the operation is over

    def get(self, name: str, kind: type[T], default: T | None = None) -> T:
        """A field of this type. Raises Refused if it is missing (no default) or of another type."""
        value = self.fields.get(name)
        if value is None and default is not None:
            return default
        # A bool is an int to Python, but to nobody else.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            what = "is missing" if value is None else f"is no {kind.__name__}"
            raise Refused(f"{self.op}: {name} {what}", "bad-request")
        return value

    def strings(self, name: str, most: int = 64, length: int = 4096) -> tuple[str, ...]:
        """A list of strings, empty if it isn't there. Raises Refused."""
        value = self.fields.get(name)
        if value is None:
            return ()
        if (
            not isinstance(value, list)
            or len(value) > most
            or not all(isinstance(x, str) and len(x) <= length and "\0" not in x for x in value)
        ):
            raise Refused(f"{self.op}: {name} is no list of at most {most} strings", "bad-request")
        return tuple(value)


@dataclass
class Reply:
    """What goes back. The daemon closes `fds` after it has sent them."""

    fields: dict[str, object] = field(default_factory=dict)
    fds: list[int] = field(default_factory=list)


Handler = Callable[["Daemon", Request], Awaitable[Reply]]


@dataclass(frozen=True)
class Operation:
    """`admin`: only for root. `descriptors`: how many the client may send. `seconds`: at most."""

    name: str
    handler: Handler
    admin: bool = False
    descriptors: int = 0
    seconds: float = 90.0


OPERATIONS: dict[str, Operation] = {}
#: Called with the daemon when its loop runs, before the first request: to take over what was left.
STARTERS: list[Callable[[Daemon], Awaitable[None]]] = []


def operation(
    name: str, admin: bool = False, descriptors: int = 0, seconds: float = 90.0
) -> Callable[[Handler], Handler]:
    """Register a coroutine as the operation `name`."""

    def register(handler: Handler) -> Handler:
        OPERATIONS[name] = Operation(name, handler, admin, descriptors, seconds)
        return handler

    return register


def load_extensions() -> None:
    """Import what brings more operations."""
    for name in EXTENSIONS:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
