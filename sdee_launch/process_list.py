"""One process as `sdee ps` shows it, from /proc."""

from __future__ import annotations

import os


def describe_process(pid: int) -> dict[str, object] | None:
    """Its numbers, state, memory and command; None if it is gone."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read(4096).rstrip(b"\0").replace(b"\0", b" ")
        with open(f"/proc/{pid}/stat", "rb") as file:
            name, _, rest = file.read().partition(b"(")[2].rpartition(b")")
    except OSError:
        return None
    fields = rest.split()
    return {
        "pid": pid,
        "parent": int(fields[1]),
        "session": int(fields[3]),
        "state": fields[0].decode(),
        "rss": int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
        "command": (command or b"[" + name + b"]").decode("utf-8", "replace"),
    }
