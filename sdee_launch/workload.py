"""The small interface behind which a workload manager stands; Slurm's is the only one built.

Another one is one more module with these functions, and one more line in `_MODULES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

#: Tried in this order.
_MODULES = ("sdee_launch.slurm.manager",)


@dataclass(frozen=True, slots=True)
class Bind:
    """A path of the host shown in an instance; one whose source or target is gone is left out."""

    source: str
    target: str
    readonly: bool = False


class Workload(Protocol):
    """What the rest of SDEE asks of a workload manager."""

    #: Its name in messages.
    name: str

    def present(self) -> bool:
        """Whether this machine belongs to it."""

    def binds(self) -> list[Bind]:
        """What of the host its commands and jobs need inside an instance."""

    def environment(self) -> Mapping[str, str]:
        """Variables that its commands and jobs need inside."""

    def states(self, uid: int) -> Mapping[int, str]:
        """The state of each of a user's jobs that it still knows, by job number."""


def workload() -> Workload | None:
    """The workload manager of this machine, if there is one."""
    for name in _MODULES:
        manager = cast(Workload, importlib.import_module(name).manager)
        if manager.present():
            return manager
    return None
