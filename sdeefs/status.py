"""`sdeefs status`: the mounts of this user, and what their servers are doing.

Nothing here touches a mount: a server that hangs is listed as stuck, within two seconds.
"""

from __future__ import annotations

import json
import os
import time

from mount_helpers.mountinfo import read_mounts
from sdeefs import OUR_TYPE
from sdeefs.control import ask, forget, records

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

OK, FAILURE = 0, 1


def collect() -> list[dict[str, Any]]:
    """One object for each mount. `state` is live, stuck, dead, detached (mounted in
    other namespaces alone), or unknown (another user's)."""
    mounts = read_mounts()
    points: dict[int, list[str]] = {}
    for mount in mounts:
        if mount.fstype == OUR_TYPE:
            points.setdefault(mount.device[1], []).append(os.fsdecode(mount.point))
    found = []
    answered = []
    killed = []
    for record in records():
        try:
            answered.append((record, ask(record)))
        except OSError:
            killed.append(record)
    # The living first: a dead one's number may be in use again.
    for record, answer in [*answered, *((record, None) for record in killed)]:
        dead = record in killed
        minor = record.get("minor")
        here = points.get(minor, []) if isinstance(minor, int) else []
        if dead and record.get("merged") not in here:
            forget(record)
            continue
        points.pop(minor, None)  # type: ignore[arg-type]
        state = "stuck" if answer is None else "live" if here else "detached"
        state = "dead" if dead else state
        entry = {**record, **(answer or {}), "state": state, "mounted_at": here}
        entry["memory"] = None if state == "dead" else _memory(entry.get("pid"))
        log = os.path.splitext(record["file"])[0] + ".log"
        entry["log"] = log if os.path.exists(log) and os.stat(log).st_size else None
        del entry["file"]
        found.append(entry)
    for minor, here in points.items():
        found.append(
            {"engine": "fuse", "minor": minor, "merged": here[0], "mounted_at": here,
             "state": "unknown", "pid": None}
        )  # fmt: skip
    for mount in mounts:
        if mount.fstype == "overlay" and mount.source == b"sdeefs":
            from sdeefs.refusals import layer_option, lower_options

            merged = os.fsdecode(mount.point)
            found.append(
                {"engine": "kernel", "merged": merged, "mounted_at": [merged], "state": "live",
                 "pid": None, "upper": layer_option(mount, "upperdir"),
                 "work": layer_option(mount, "workdir"), "lowers": lower_options(mount)}
            )  # fmt: skip
    return found


def _memory(pid: object) -> int | None:
    """Resident bytes of a server."""
    try:
        with open(f"/proc/{int(str(pid))}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, ValueError, IndexError):
        return None


def run(arguments: argparse.Namespace) -> int:
    """The command."""
    found = collect()
    if arguments.merged is not None:
        from sdeefs.refusals import absolute

        wanted = os.fsdecode(absolute(os.fsencode(arguments.merged)))
        if not any(os.fsencode(wanted) == m.point for m in read_mounts()) and os.path.islink(
            wanted
        ):
            wanted = os.path.realpath(wanted)
        found = [e for e in found if wanted == e["merged"] or wanted in e["mounted_at"]]
        if not found:
            from sdeefs.refusals import Refused, text

            raise Refused(f"{text(os.fsencode(wanted))}: no sdeefs mount")
    if arguments.json:
        print(json.dumps(found, indent=1))
        return OK
    if not found:
        print("no mounts")
    for entry in found:
        _show(entry)
    return OK


def _show(entry: dict[str, Any]) -> None:
    where = ", ".join(entry["mounted_at"]) or entry.get("merged") or "(detached)"
    print(f"{where}: engine {entry['engine']}, {entry['state']}")
    layers = [("upper", entry.get("upper"))]
    layers += [("lower", p) for p in entry.get("lowers") or []]
    for name, path in layers:
        if path:
            print(f"  {name:12} {path}")
    if entry.get("transport"):
        print(f"  {'transport':12} {entry['transport']}, data path {entry.get('data_path')}")
    if entry.get("pid"):
        age = time.time() - float(entry.get("started") or 0)
        memory = entry.get("memory")
        size = f", {memory / 2**20:.0f} MiB" if memory else ""
        held = entry.get("open_descriptors")
        descriptors = f", {held} descriptors" if held else ""
        print(f"  {'server':12} process {entry['pid']}, {age:.0f} s{size}{descriptors}")
    core = entry.get("core") or {}
    if core:
        print(f"  {'core':12} " + ", ".join(f"{name} {value}" for name, value in core.items()))
    if entry.get("watched") is not None:
        print(f"  {'watch':12} {entry['watched']} directories of lower")
    requests = entry.get("requests") or {}
    if requests:
        total = sum(requests.values())
        most = sorted(requests.items(), key=lambda item: -item[1])
        print(f"  {'requests':12} {total}: " + ", ".join(f"{n} {c}" for n, c in most if c))
    if entry.get("log"):
        print(f"  {'log':12} {entry['log']}")
