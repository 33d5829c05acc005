"""`sdee deploy` and `sdee cache`: what would travel, what is published, what a node keeps."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sdee_launch import config, environments, protocol
from sdee_launch.accounts import Account, my_account
from sdee_launch.config import Settings
from sdee_launch.deploy import api, cache, places, retired
from sdee_launch.deploy.ended import release_ended
from sdee_launch.deploy.errors import DeployProblem
from sdee_launch.deploy.exclude import change
from sdee_launch.deploy.generations import State
from sdee_launch.deploy.inside import run_inside
from sdee_launch.protocol import INSIDE

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Add the commands `deploy` and `cache`."""
    deploy = subparsers.add_parser(
        "deploy",
        help="the way of an environment to other nodes",
        description="Environments travel with jobs by themselves; this shows what travels.",
    ).add_subparsers(required=True, metavar="plan|push|status|exclude")
    plan = deploy.add_parser("plan", help="what the next job would take along, and what not")
    push = deploy.add_parser("push", help="make a generation now, so that the next job needn't")
    status = deploy.add_parser("status", help="the generations that there are")
    exclude = deploy.add_parser("exclude", help="what of an environment stays behind")
    for parser, run in ((plan, _plan), (push, _push), (status, _status)):
        parser.set_defaults(run=_guarded(_from_outside(run)))
    exclude.set_defaults(run=_guarded(_exclude))
    for parser in (plan, push, status, exclude):
        parser.add_argument(
            "--env", metavar="NAME", help="default: this one, or the site's default"
        )
        parser.add_argument("--json", action="store_true")
    for parser in (plan, push):
        parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN")
    push.add_argument("--checksum", action="store_true", help="read every file, trust no time")
    exclude.add_argument("--add", action="append", default=[], metavar="PATTERN")
    exclude.add_argument("--remove", action="append", default=[], metavar="PATTERN")
    caches = subparsers.add_parser(
        "cache", help="the generations that this node keeps"
    ).add_subparsers(required=True, metavar="list|prune|verify")
    listing = caches.add_parser("list", help="generations, sizes, who uses them")
    prune = caches.add_parser("prune", help="remove what nobody uses, the longest unused first")
    prune.add_argument("--limit", default="0", metavar="SIZE", help="keep so much (default: 0)")
    verify = caches.add_parser("verify", help="hold the cache against its manifests")
    verify.add_argument("--checksum", action="store_true", help="read every file")
    verify.add_argument("--repair", action="store_true", help="remove what is wrong and unused")
    for parser, run in ((listing, _cache_list), (prune, _cache_prune), (verify, _cache_verify)):
        parser.add_argument("--json", action="store_true")
        parser.set_defaults(run=_guarded(_from_outside(run)))


def _guarded(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    def guarded(options: argparse.Namespace) -> int:
        try:
            return run(options)
        except DeployProblem as error:
            print(f"sdee: {error}", file=sys.stderr)
            return 1

    return guarded


def _from_outside(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    def checked(options: argparse.Namespace) -> int:
        if os.path.exists(INSIDE):
            raise DeployProblem(
                f"{environments.FROM_OUTSIDE}; of sdee deploy, only exclude works inside"
            )
        return run(options)

    return checked


class _Source:
    """An environment's upper and the state directory of its generations."""

    def __init__(self, name: str | None) -> None:
        self.account: Account = my_account()
        self.settings: Settings = config.load(home=self.account.home)
        self.name = environments.check_name(name or self.settings.environment)
        with (
            environments.open_store(self.account, self.settings) as store,
            store.open(self.name) as opened,
        ):
            self.upper = f"{opened.path}/upper"
            self.own = opened.settings.exclude
        way = places.transport(self.settings)
        self.state = places.state_directory(self.account, self.settings, self.name, way)

    def exclude(self, more: list[str]) -> list[str]:
        """All patterns but the built-in ones."""
        site = [
            *self.settings.section("deploy").get("exclude", ()),
            *self.settings.section("jobs").get("exclude", ()),
        ]
        return [*site, *self.own, *more]


class _Progress:
    """Files, bytes and rate on a terminal; silence elsewhere and for the first two seconds."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()
        self.shown = sys.stderr.isatty()

    def __call__(self, entries: int, size: int) -> None:
        now = time.monotonic()
        if not self.shown or now - self.start < 2 or now - self.last < 0.2:
            return
        self.last = now
        rate = places.size_text(size / (now - self.start))
        text = f"\r\033[K{entries} objects, {places.size_text(size)} packed, {rate}/s"
        print(text, end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the line."""
        if self.shown and time.monotonic() - self.start >= 2:
            print("\r\033[K", end="", file=sys.stderr)


def _plan(options: argparse.Namespace) -> int:
    source = _Source(options.env)
    plan = api.plan(source.account, source.upper, source.state, source.exclude(options.exclude))
    if options.json:
        print(json.dumps({"environment": source.name, **asdict(plan)}))
        return 0
    print(f"{source.name}: {plan.entries} objects, {places.size_text(plan.content)}")
    print(f"new or changed: {plan.new_files} files, {places.size_text(plan.new_bytes)}")
    print(f"removed since the last generation: {plan.removed}")
    print(f"stays behind: {plan.excluded} paths, {places.size_text(plan.excluded_bytes)}")
    for path, size in plan.biggest:
        print(f"  {places.size_text(size):>10}  {path}")
    return 0


def _push(options: argparse.Namespace) -> int:
    source = _Source(options.env)
    progress = _Progress()
    try:
        done = api.submit(
            source.account,
            source.upper,
            source.state,
            source.exclude(options.exclude),
            checksum=options.checksum,
            level=int(source.settings.section("deploy").get("level", 3)),
            progress=progress,
        )
    finally:
        progress.close()
    made = done.generation
    if options.json:
        print(json.dumps({"environment": source.name, **asdict(done)}))
    elif done.reused:
        print(f"{source.name}@{made.number}: nothing has changed")
    else:
        size = places.size_text(made.package_bytes)
        print(f"{source.name}@{made.number}: {made.new_files} new files, {size}")
    if made.moving and not done.reused:
        print(f"sdee: {made.moving} files were being written meanwhile", file=sys.stderr)
    return 0


def _status(options: argparse.Namespace) -> int:
    source = _Source(options.env)

    def work() -> list[dict[str, object]]:
        if not os.path.isdir(source.state):
            return []
        with State(source.state) as state:
            return [asdict(state.about(number)) for number in state.numbers()]

    found = run_inside(source.account, work)
    if options.json:
        print(json.dumps(found))
        return 0
    if not found:
        print(f"{source.name}: no generation yet; the first job makes one")
    for one in found:
        content, package = (places.size_text(one[k]) for k in ("content", "package_bytes"))
        print(
            f"{source.name}@{one['number']}: {one['entries']} objects, {content};"
            f" {one['new_files']} new files, {package} as they travel"
        )
    return 0


def _exclude(options: argparse.Namespace) -> int:
    if os.path.exists(INSIDE):
        patterns = _exclude_inside(options)
    else:
        source = _Source(options.env)
        with (
            environments.open_store(source.account, source.settings) as store,
            store.open(source.name) as opened,
        ):
            patterns = change(opened, options.add, options.remove)
    if options.json:
        print(json.dumps({"own": patterns, "defaults": list(api.DEFAULTS)}))
    else:
        for pattern in patterns:
            print(pattern)
    return 0


def _exclude_inside(options: argparse.Namespace) -> list[str]:
    """The daemon does it, as settings of environments aren't to be seen inside of one."""
    name = options.env or Path(INSIDE).read_text().strip()
    try:
        reply, _ = protocol.request(
            "deploy-exclude", environment=name, add=options.add, remove=options.remove
        )
    except protocol.Unavailable as error:
        raise DeployProblem(
            f"{error}; without sdeed this is done from outside, as sdee deploy exclude --env {name}"
        ) from None
    patterns = reply.get("patterns")
    return [str(p) for p in patterns] if isinstance(patterns, list) else []


def _cache_place() -> tuple[Account, str]:
    account = my_account()
    return account, places.cache_directory(config.load(home=account.home))


def _cache_list(options: argparse.Namespace) -> int:
    account, where = _cache_place()
    found = cache.listing(account, where)
    if options.json:
        print(json.dumps(found))
        return 0
    for one in found:
        users = ", ".join(one["users"]) or "nobody"
        print(
            f"{one['identity']}@{one['generation']}: {places.size_text(one['bytes'])},"
            f" {one['files']} files, used by {users}"
        )
    return 0


def _cache_prune(options: argparse.Namespace) -> int:
    account, where = _cache_place()
    release_ended(account, where)
    _clear_spool(account)
    removed = cache.prune(account, where, places.parse_size(options.limit))
    if options.json:
        print(json.dumps(removed))
    else:
        size = places.size_text(sum(one["bytes"] for one in removed))
        print(f"{len(removed)} generations removed, {size}")
    return 0


def _clear_spool(account: Account) -> None:
    """Remove what `sdee env rm` had to leave at the source."""
    settings = config.load(home=account.home)
    try:
        if account.uid == 0 or not retired.marked(account, settings):
            return
        with environments.open_store(account, settings) as store:
            gone, _ = retired.clear(account, settings, store.names())
    except (environments.EnvironmentProblem, OSError) as error:
        print(f"sdee: generations of removed environments are left: {error}", file=sys.stderr)
        return
    for path in gone:
        print(f"sdee: removed {path}, whose environment is gone", file=sys.stderr)


def _cache_verify(options: argparse.Namespace) -> int:
    account, where = _cache_place()
    wrong = {}
    for one in cache.listing(account, where):
        name, number = one["identity"], one["generation"]
        found = cache.verify(account, where, name, number, options.checksum)
        if found:
            wrong[f"{name}@{number}"] = found
        if found and options.repair and not one["users"]:
            cache.remove(account, where, name, number)  # the next job brings it anew
    if options.json:
        print(json.dumps(wrong))
    else:
        for name, paths in wrong.items():
            print(f"{name}: {len(paths)} wrong: {', '.join(paths[:5])}")
    return 1 if wrong else 0
