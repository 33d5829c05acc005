"""Where and how urgently a server's threads run: each inherits from its maker, and who answers callers
(a ring's thread, a reader of the device) is bound to their CPU and more urgent than they are."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

#: By how much. A caller that has had more of its CPU than who answers it stays on that CPU while it
#: waits; else Linux (from 6.12 on) sends it to an idle one with the answer, which has to be woken.
#: With 10, the answering thread's time counts for a ninth.
_MORE_URGENT = 10


@dataclass(frozen=True)
class Scheduling:
    """What a process has been given: the CPUs that it may use, and its nice value."""

    cpus: frozenset[int]
    nice: int

    @classmethod
    def here(cls) -> Scheduling:
        """That of this thread."""
        return cls(frozenset(os.sched_getaffinity(0)), os.getpriority(os.PRIO_PROCESS, 0))

    def take(self) -> None:
        """This thread runs as the process does, whoever made it."""
        try:
            os.sched_setaffinity(0, self.cpus)
        except OSError:
            pass  # they have gone meanwhile: any will do
        self._set_nice(self.nice)

    def answer_callers(self) -> None:
        """This thread answers those who wait on its CPU. Takes CAP_SYS_NICE, and is left without."""
        self._set_nice(self.nice - _MORE_URGENT)

    @staticmethod
    def _set_nice(nice: int) -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
        except OSError:
            pass


def favour_own_group() -> None:
    """Give the scheduling group of a server that leads a session (sched(7), autogroup) more of a busy CPU.

    Its share would be that of one program otherwise, for all that it does for those who wait for it.
    Takes CAP_SYS_NICE, and is left without.
    """
    if os.getsid(0) != os.getpid():
        return  # the group is that of others, too
    try:
        with open("/proc/self/autogroup", "w") as file:
            file.write(str(-_MORE_URGENT))
    except OSError:
        pass
