"""What is alive of the caller's: `sdee ps`, `sdee kill`, `sdee status`, with and without a daemon."""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
import time
from typing import TYPE_CHECKING

from sdee_launch import config, environments, protocol
from sdee_launch.accounts import my_account

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Add `ps`, `kill` and `status`."""
    ps = subparsers.add_parser("ps", help="live instances and their processes")
    ps.add_argument("--json", action="store_true")
    ps.set_defaults(run=show)
    kill = subparsers.add_parser("kill", help="end the instance of an environment")
    kill.add_argument("env", nargs="?", metavar="NAME", help="which one (default)")
    kill.add_argument("--signal", "-s", help="send this to one process of it instead")
    kill.add_argument("--pid", type=int, help="which process (as sdee ps shows it)")
    kill.set_defaults(run=end)
    status = subparsers.add_parser("status", help="how this node serves the caller")
    status.add_argument("--json", action="store_true")
    status.set_defaults(run=tell)


def _daemon(op: str, **fields: object) -> dict[str, object] | None:
    """The daemon's answer; None where there is none. Raises Refused."""
    if os.environ.get("SDEE_MODE") == "rootless":
        return None
    try:
        return protocol.request(op, **fields)[0]  # type: ignore[arg-type]
    except protocol.Unavailable:
        return None


def own_instances() -> list[dict[str, object]]:
    """The live instances that the caller made without a daemon, on this node."""
    from sdee_launch.instances import Process, members
    from sdee_launch.process_list import describe_process
    from sdee_launch.rootless import alive_init

    account = my_account()
    if account.uid == 0:
        return []
    settings = config.load(account.home)
    found: list[dict[str, object]] = []
    with environments.open_store(account, settings) as store:
        for name in store.names():
            with store.open(name) as environment:
                record = environment.read_record() or {}
            pid = alive_init(record)
            if not pid:
                continue
            pids = members(Process(pid, 0))
            found.append(
                {
                    "env": name,
                    "uid": account.uid,
                    "engine": record.get("engine"),
                    "since": record.get("since"),
                    "init": pid,
                    "servers": record.get("servers"),
                    "processes": [p for p in map(describe_process, pids) if p],
                }
            )
    return found


def _all_instances() -> list[dict[str, object]]:
    reply = _daemon("ps")
    listed = reply.get("instances") if reply is not None else []
    return [*(listed if isinstance(listed, list) else []), *own_instances()]


def in_use(environment: environments.Environment) -> bool:
    """Whether anything but its init lives in the caller's instance of this environment."""
    from sdee_launch.instances import Process, members
    from sdee_launch.rootless import alive_init

    init = alive_init(environment.read_record() or {})
    if init:
        return len(members(Process(init, 0))) > 1
    reply = _daemon("ps") or {}
    listed = reply.get("instances")
    for one in listed if isinstance(listed, list) else []:
        if one["env"] == environment.name and not one["job"]:
            return len(one["processes"]) > 1
    return False


def show(options: argparse.Namespace) -> int:
    """`sdee ps`."""
    found = _all_instances()
    if options.json:
        print(json.dumps(found))
        return 0
    if not found:
        print("nothing of yours is alive on this node", file=sys.stderr)
        return 0
    for one in found:
        job = f", job {one['job']}" if one.get("job") else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(str(one["since"]))))
        print(f"{one['env']}: engine {one['engine']}{job}, since {since}")
        processes = one["processes"]
        for process in processes if isinstance(processes, list) else []:
            rss = int(process["rss"]) >> 20
            print(f"  {process['pid']:>8} {process['state']} {rss:>5} MiB  {process['command']}")
    return 0


def end(options: argparse.Namespace) -> int:
    """`sdee kill`."""
    account = my_account()
    name = options.env or config.load(account.home).environment
    number = signal.SIGTERM
    if options.signal is not None:
        text = options.signal.upper().removeprefix("SIG")
        try:
            number = signal.Signals(int(text)) if text.isdigit() else signal.Signals["SIG" + text]
        except (ValueError, KeyError):
            print(f"sdee kill: {options.signal} is no signal", file=sys.stderr)
            return 2
        if options.pid is None:
            print("sdee kill: --signal wants --pid", file=sys.stderr)
            return 2
    for one in own_instances():
        if one["env"] == name:
            return _end_own(one, options.pid, number)
    fields: dict[str, object] = {"env": name}
    if options.pid is not None:
        fields.update({"pid": options.pid, "signal": int(number)})
    if _daemon("kill", **fields) is None:
        print(f"sdee kill: {name} is not alive on this node", file=sys.stderr)
        return 1
    return 0


def _end_own(one: dict[str, object], pid: int | None, number: int) -> int:
    init = int(str(one["init"]))
    if pid is not None:
        listed = one["processes"]
        if not any(p["pid"] == pid for p in (listed if isinstance(listed, list) else [])):
            print(f"sdee kill: {pid} is no process of {one['env']}", file=sys.stderr)
            return 1
        os.kill(pid, number)
        return 0
    try:
        pidfd = os.pidfd_open(init)
    except ProcessLookupError:
        return 0
    os.kill(init, signal.SIGKILL)
    select.select([pidfd], [], [], 30)
    os.close(pidfd)
    return 0


def tell(options: argparse.Namespace) -> int:
    """`sdee status`."""
    reply = _daemon("status")
    inside = os.environ.get("SDEE_ENVIRONMENT")
    own = [str(one["env"]) for one in own_instances()]
    found: dict[str, object] = {
        "mode": "rootless" if reply is None else "site",
        "inside": inside,
        "daemon": None
        if reply is None
        else {k: v for k, v in reply.items() if k not in ("ok", "instances")},
        "instances": [*_names(reply), *own],
    }
    if options.json:
        print(json.dumps(found))
        return 0
    if reply is None:
        print("no sdeed on this node: rootless mode")
    else:
        up = int(float(str(reply.get("up", 0))))
        ready = "" if reply.get("masks") else "; the host is being scanned for secrets"
        print(f"sdeed {reply.get('version')} runs since {up} s{ready}")
    if inside:
        print(f"this is the inside of {inside}")
    listed = found["instances"]
    print("alive: " + (", ".join(listed if isinstance(listed, list) else []) or "nothing"))
    return 0


def _names(reply: dict[str, object] | None) -> list[str]:
    listed = reply.get("instances") if reply is not None else None
    return [str(n) for n in listed] if isinstance(listed, list) else []
