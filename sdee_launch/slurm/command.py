"""The parts of the command `sdee` that are about jobs: srun sbatch salloc job jobs node."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import TYPE_CHECKING

from sdee_launch import protocol

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Add the commands; each sets `function`, which gets the options and gives the exit code."""
    for name in ("srun", "sbatch", "salloc"):
        parser = subparsers.add_parser(
            name, add_help=False, prefix_chars="\0",
            help=f"{name} in an environment, from outside of any",
        )  # fmt: skip
        parser.add_argument("words", nargs=argparse.REMAINDER)
        parser.set_defaults(function=_submit, command_name=name)
    job = subparsers.add_parser("job", help="what a job wrote").add_subparsers(required=True)
    save = job.add_parser("save", help="make a new generation of what a job has written so far")
    save.add_argument("job", nargs="?", type=int, help="default: the job that this runs in")
    save.add_argument("--json", action="store_true")
    save.set_defaults(function=_save)
    jobs = subparsers.add_parser("jobs", help="your jobs with environments")
    jobs.add_argument("--json", action="store_true")
    jobs.set_defaults(function=_jobs)
    node = subparsers.add_parser("node", help="for root: instances, jobs and caches of this node")
    node.add_argument("--json", action="store_true")
    node.add_argument("--rescan", action="store_true", help="scan for hidden files first")
    node.set_defaults(function=_node)


def _submit(options: argparse.Namespace) -> int:
    from sdee_launch.deploy.errors import DeployProblem
    from sdee_launch.environments import EnvironmentProblem
    from sdee_launch.slurm import clients

    try:
        return clients.run(options.command_name, options.words)
    except (OSError, ValueError, DeployProblem, EnvironmentProblem) as error:
        print(f"sdee {options.command_name}: {error}", file=sys.stderr)
        return 1


def _save(options: argparse.Namespace) -> int:
    try:
        reply, _ = protocol.request("job-save", **({"job": options.job} if options.job else {}))
    except (protocol.Refused, protocol.Unavailable) as error:
        print(f"sdee job save: {error}", file=sys.stderr)
        return 1
    reply.pop("ok")
    if options.json:
        print(json.dumps(reply))
    else:
        print(f"saved as {reply['reference']}")
    return 0


def _jobs(options: argparse.Namespace) -> int:
    from sdee_launch.slurm import reports
    from sdee_launch.workload import workload

    home = os.environ.get("HOME", "/")
    manager = workload()
    states = manager.states(os.getuid()) if manager is not None else {}
    listed = [reports.summary(job, states) for job in reports.read_all(home)]
    if options.json:
        print(json.dumps(listed))
        return 0
    if not listed:
        print("no jobs with environments", file=sys.stderr)
        return 0
    row = "{:>8} {:<20} {:<10} {:>5} {:>10} {:>8}  {}"
    print(row.format("JOB", "ENVIRONMENT", "STATE", "NODES", "DEPLOYED", "SECONDS", "ENGINE"))
    for job in listed:
        print(
            row.format(
                job["job"], job["reference"], job["state"], len(job["nodes"]),
                _size(job["bytes"]), f"{job['seconds']:.2f}", job["engine"],
            )
        )  # fmt: skip
    return 0


def _size(count: int) -> str:
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def _node(options: argparse.Namespace) -> int:
    try:
        reply = {
            **protocol.request("node", rescan=options.rescan)[0],
            **protocol.request("job-node")[0],
        }
    except (protocol.Refused, protocol.Unavailable) as error:
        print(f"sdee node: {error}", file=sys.stderr)
        return 1
    reply.pop("ok")
    if options.json:
        print(json.dumps(reply))
        return 0
    instances, jobs, caches, errors = (
        _dictionaries(reply.get(name)) for name in ("instances", "jobs", "caches", "errors")
    )
    print(f"sdeed {reply['version']}, up {float(str(reply['up'])):.0f} s")
    print(f"{len(instances)} instances")
    for one in instances:
        what = f"job {one['job']}" if one["job"] else one["env"]
        print(
            f"  uid {one['uid']}: {what}, engine {one['engine']}, {_count(one['processes'])} processes"
        )
    print(f"{len(jobs)} jobs with environments")
    for one in jobs:
        state = f"failed: {one['failure']}" if one["failure"] else f"{one['seconds']} s to prepare"
        print(f"  {one['job']}: uid {one['uid']}, {one['reference']}, {state}")
    print(f"{len(caches)} caches")
    for one in caches:
        print(
            f"  uid {one['uid']}: {one['generations']} generations, {_size(int(str(one['bytes'])))}"
        )
    for one in errors:
        when = time.strftime("%F %T", time.localtime(float(str(one["time"]))))
        print(f"{when}: job {one['job']} of uid {one['uid']}: {one['reason']}")
    return 0


def _dictionaries(value: object) -> list[dict[str, object]]:
    return [x for x in value if isinstance(x, dict)] if isinstance(value, list) else []


def _count(value: object) -> int:
    return len(value) if isinstance(value, list) else 0
