"""`sdee env …`: the environments of the caller."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import TYPE_CHECKING

from sdee_launch import config, environments
from sdee_launch.accounts import my_account
from sdee_launch.environments import Environment, EnvironmentSettings, Store, try_lock
from sdee_launch.protocol import INSIDE

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

#: Seconds in which what the last session left behind is gone with it.
_SETTLED = 0.3


def add_parser(subparsers: Subparsers) -> None:
    """Add `env` and what it can do."""
    env = subparsers.add_parser("env", help="list, make and change environments")
    each = env.add_subparsers(metavar="WHAT", required=True, dest="what")

    def command(name: str, text: str, name_too: bool = True) -> argparse.ArgumentParser:
        parser = each.add_parser(name, help=text, description=text)
        if name_too:
            parser.add_argument("--env", "-e", metavar="NAME", help="which one (default)")
        parser.set_defaults(run=run)
        return parser

    command("list", "the environments", False).add_argument("--json", action="store_true")
    create = command("create", "make an empty one", False)
    create.add_argument("name")
    create.add_argument("--engine", choices=("auto", "kernel", "fuse"), default="auto")
    create.add_argument("--bind", action="append", default=[], metavar="SRC[:DST][:ro]")
    create.add_argument("--volatile", action="store_true", help="fast, and lost with the node")
    command("info", "where it is, how big, what of it is alive").add_argument(
        "--json", action="store_true"
    )
    command("diff", "what it changes of the host").add_argument("--json", action="store_true")
    reset = command("reset", "forget all changes, or those of some paths")
    reset.add_argument("paths", nargs="*", metavar="PATH")
    snapshot = command("snapshot", "keep a copy of its changes as they are now")
    snapshot.add_argument("snapshot", nargs="?", metavar="SNAPSHOT")
    snapshot.add_argument("--drop", action="store_true", help="remove the snapshot instead")
    rollback = command("rollback", "go back to a snapshot (the last)")
    rollback.add_argument("snapshot", nargs="?", metavar="SNAPSHOT")
    export = command("export", "write its changes into an archive")
    export.add_argument("file", metavar="FILE", help=".tar, .tar.gz, .tar.zst; - is stdout")
    import_ = command("import", "make one of an archive")
    import_.add_argument("file", metavar="FILE")
    rename = command("rename", "give it another name", False)
    rename.add_argument("old")
    rename.add_argument("new")
    remove = command("rm", "remove some for good", False)
    remove.add_argument("names", nargs="+", metavar="NAME")


def run(options: argparse.Namespace) -> int:
    """Do it. Raises EnvironmentProblem, ConfigError, NotEntered, OSError."""
    if os.path.exists(INSIDE):
        raise environments.EnvironmentProblem(environments.FROM_OUTSIDE)
    account = my_account()
    if account.uid == 0:
        raise environments.EnvironmentProblem("root has no environments: they are for users")
    settings = config.load(account.home)
    with environments.open_store(account, settings) as store:
        return _run(options, store, settings)


def _run(options: argparse.Namespace, store: Store, settings: config.Settings) -> int:
    what = options.what
    if what == "list":
        return _list(store, settings, options.json)
    if what == "create":
        made = EnvironmentSettings(
            engine=options.engine,
            volatile=True if options.volatile else None,
            binds=tuple(options.bind),
        )
        from sdee_launch.plan import parse_bind

        for bind in options.bind:
            parse_bind(bind)
        store.create(options.name, made)
        return 0
    from sdee_launch import environment_changes as changes

    if what == "rename":
        with store.open(options.old) as environment:
            _refuse_if_used(environment)
        store.rename(options.old, options.new)
        _rename_spool(store, settings, options.old, options.new)
        return 0
    if what == "rm":
        for name in options.names:
            with store.open(name) as environment:
                _refuse_if_used(environment)
                changes.remove(store, environment)
        _clear_spool(store, settings, options.names)
        return 0
    name = options.env or settings.environment
    if what == "import":
        changes.import_(store, name, options.file)
        return 0
    with store.open(name) as environment:
        return _change(options, store, environment)


def _change(options: argparse.Namespace, store: Store, environment: Environment) -> int:
    from sdee_launch import environment_changes as changes

    what = options.what
    if what in ("reset", "rollback"):
        _refuse_if_used(environment)
    if what == "info":
        return _info(environment, options.json)
    if what == "diff":
        sys.stdout.write(changes.differences(environment, options.json))
        if options.json:
            sys.stdout.write("\n")
    elif what == "reset":
        done = changes.reset(store, environment, options.paths)
        for path in options.paths:
            if path not in done:
                print(f"{path}: not changed in {environment.name}", file=sys.stderr)
    elif what == "snapshot" and options.drop:
        if options.snapshot is None:
            raise environments.EnvironmentProblem("which snapshot?")
        changes.drop_snapshot(environment, options.snapshot)
    elif what == "snapshot":
        if alive(environment):
            print(
                f"sdee: {environment.name} is alive: what is written just now may be in the "
                "snapshot or not",
                file=sys.stderr,
            )
        print(changes.snapshot(environment, options.snapshot))
    elif what == "rollback":
        print(changes.rollback(store, environment, options.snapshot))
    elif what == "export":
        changes.export(environment, options.file)
    return 0


def _clear_spool(store: Store, settings: config.Settings, names: list[str]) -> None:
    """Remove the generations of environments that are gone, unless a job may want them."""
    from sdee_launch.deploy import retired
    from sdee_launch.deploy.errors import DeployProblem

    account = my_account()
    try:
        for name in names:
            retired.retire(account, settings, name)
        _, kept = retired.clear(account, settings, store.names())
    except (DeployProblem, OSError) as error:
        print(f"sdee: generations of {', '.join(names)} are left: {error}", file=sys.stderr)
        return
    for path in kept:
        if os.path.basename(path) in names:
            print(
                f"sdee: {path} stays, as jobs of yours may be in the queue; sdee cache prune"
                " removes it when there are none",
                file=sys.stderr,
            )


def _rename_spool(store: Store, settings: config.Settings, old: str, new: str) -> None:
    """Take the generations along; under the old name they go, unless a job may want them."""
    from sdee_launch.deploy import renamed, retired
    from sdee_launch.deploy.errors import DeployProblem

    account = my_account()
    try:
        # What a removed environment of the new name has left is no part of this one.
        retired.clear(account, settings, set(store.names()) - {new})
        renamed.take_over(account, settings, old, new)
    except (DeployProblem, OSError) as error:
        print(f"sdee: the next job of {new} takes all of it along: {error}", file=sys.stderr)
    _clear_spool(store, settings, [old])


def _refuse_if_used(environment: Environment) -> None:
    """Say at once what waiting won't change; an instance that just ends is waited for (`lock`).

    Raises Busy.
    """
    from sdee_launch import live

    if live.in_use(environment):
        time.sleep(_SETTLED)
        if live.in_use(environment):
            raise environments.busy(environment.name)


def alive(environment: Environment) -> bool:
    """Whether somebody holds its lock."""
    fd = try_lock(environment)
    if fd is None:
        return True
    os.close(fd)
    return False


def _list(store: Store, settings: config.Settings, as_json: bool) -> int:
    rows = []
    for name in store.names():
        with store.open(name) as environment:
            rows.append(
                {
                    "name": name,
                    "alive": alive(environment),
                    "engine": environment.settings.engine,
                    "created": environment.settings.created,
                    "path": environment.path,
                }
            )
    if as_json:
        print(json.dumps(rows))
        return 0
    if not rows:
        print("no environments yet: sdee shell makes one", file=sys.stderr)
        return 0
    row = "{:<24} {:<6} {:<7} {}"
    print(row.format("NAME", "ALIVE", "ENGINE", "CREATED"))
    for found in rows:
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(float(str(found["created"]))))
        print(
            row.format(
                str(found["name"]), "yes" if found["alive"] else "-", str(found["engine"]), created
            )
        )
    return 0


def _info(environment: Environment, as_json: bool) -> int:
    from sdee_launch import environment_changes as changes

    objects, used = changes.size_of(environment)
    settings = environment.settings
    found: dict[str, object] = {
        "name": environment.name,
        "path": environment.path,
        "alive": alive(environment),
        "engine": settings.engine,
        "binds": list(settings.binds),
        "created": settings.created,
        "objects": objects,
        "bytes": used,
        "snapshots": changes.snapshots(environment),
    }
    if as_json:
        print(json.dumps(found))
        return 0
    for key, value in found.items():
        shown = value
        if key == "created":
            shown = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(settings.created))
        elif isinstance(value, list):
            shown = ", ".join(map(str, value)) or "-"
        elif isinstance(value, bool):
            shown = "yes" if value else "no"
        print(f"{key + ':':<11} {shown}")
    return 0
