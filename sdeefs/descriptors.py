"""How many descriptors a mount needs, and getting them: one that runs out of them is no use."""

from __future__ import annotations

import fcntl
import os
import resource

from sdeefs.options import Options
from sdeefs.refusals import Refused

#: Fewest directories that the core keeps open.
FEWEST_DIRECTORIES = 16
#: Upper and workdir with their locks, device, fanotify, control socket, trio.
_SERVER = 20
#: Files that callers have open, and what one request opens for itself.
_FILES = 16
#: Descriptors that the kernel's table holds without growing: 16 KiB.
_ROOM = 2048
#: Each lower is opened twice: its root as a layer's, and as the merged root's.
_LOWER = 2
#: libfuse's clone of the device, its pipe, a trio of its own.
_PYFUSE3 = 10


def raise_limit() -> None:
    """As many descriptors as this process may have; root may have more than it was given."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 1 << 20
    if os.geteuid() == 0 and hard < 1 << 19:
        wanted = 1 << 19
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, hard)))
    except (OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def make_room() -> None:
    """Have the kernel's table of this process's descriptors grow now, while there is one thread.

    Later each doubling waits until no thread reads the old one (synchronize_rcu() in Linux's
    expand_fdtable()), some 10 ms here. Where the limit is lower there is as much room as it allows.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    last = _ROOM - 1 if soft == resource.RLIM_INFINITY else min(_ROOM, soft) - 1
    first = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.close(fcntl.fcntl(first, fcntl.F_DUPFD_CLOEXEC, last))
    except OSError:
        pass  # that one is taken, and so the table is large enough
    finally:
        os.close(first)


def directories_to_keep() -> int:
    """How many directory descriptors leave room for as many open files as may be expected."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 1024
    return min(1024, max(FEWEST_DIRECTORIES, soft // 4))


def needed(options: Options, transport: str) -> int:
    """How many a mount opens with the transport "ring", "device" or "pyfuse3", callers' included."""
    count = _SERVER + _LOWER * len(options.lowers) + FEWEST_DIRECTORIES + _FILES
    if transport == "ring":  # a ring and its eventfd for each CPU
        return count + 2 * (os.cpu_count() or 1)
    if transport == "pyfuse3":
        return count + _PYFUSE3
    return count + (options.threads or 2)


def transport_for(options: Options) -> str:
    """The transport that was asked for, or "device" where "auto" has too few for the ring.

    Raises Refused where there are too few for any, with the limit that would do.
    """
    asked = options.transport or "auto"
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return asked
    for name in ("ring", "device") if asked == "auto" else (asked,):
        least = needed(options, name)
        least += _taken(max(limit, least))
        if least <= limit:
            return name if name == "device" else asked
    raise Refused(
        f"open files: the limit of {limit} is too low for a mount: at least {least} (ulimit -n)"
    )


def _taken(below: int) -> int:
    """How many are open below a number: those above leave as many free."""
    try:
        # The directory's own is gone when the list is there.
        return sum(int(name) < below for name in os.listdir("/proc/self/fd")) - 1
    except OSError:
        return below
