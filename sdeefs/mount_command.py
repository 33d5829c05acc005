"""`sdeefs mount`: from the command line to a mount that is usable, with the engine that was asked."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from sdeefs.background import Background
    from sdeefs.options import Options

OK, FAILURE, USAGE = 0, 1, 2
#: From this limit of open files on nothing has to be raised to come as far as the server's own look.
_ENOUGH_DESCRIPTORS = 64


def options_of(arguments: argparse.Namespace) -> tuple[Options, bytes]:
    """What the command line asks for: options, and the mount point as it was written."""
    from dataclasses import replace

    from sdeefs.options import UsageError, parse, split_lowers

    options = parse(arguments.options, sloppy=arguments.sloppy)
    places = [os.fsencode(p) for p in arguments.places]
    if len(places) == 3:
        upper, lower, merged = places
        for name, value in (("upperdir", options.upper), ("lowerdir", options.lowers)):
            if value:
                raise UsageError(f"{name}= is given beside UPPER LOWER MERGED: use one of the two")
        lowers: tuple[bytes, ...] = (lower,)
        if b":" in lower and not os.path.isdir(lower):
            lowers = split_lowers(os.fsdecode(lower))
        options = replace(options, lowers=lowers, upper=upper)
    elif len(places) == 1:
        merged = places[0]
    else:
        raise UsageError("UPPER LOWER MERGED are expected, or MERGED alone with -o lowerdir=…")
    if arguments.workdir is not None:
        options = replace(options, work=os.fsencode(arguments.workdir))
    if arguments.source is not None:
        options = replace(options, source=arguments.source)
    if arguments.transport is not None:
        options = replace(options, transport=arguments.transport)
    return options, merged


def run(arguments: argparse.Namespace) -> int:
    """The command. Raises UsageError, Refused or OSError for the one line that main() prints."""
    server = None
    if 0 <= os.sysconf("SC_OPEN_MAX") < _ENOUGH_DESCRIPTORS:
        from sdeefs import descriptors

        descriptors.raise_limit()
    if arguments.engine == "fuse" and not arguments.foreground:
        from sdeefs.background import Background

        server = Background()
    try:
        return _mount(arguments, server)
    except BaseException:
        if server is not None:
            server.discard()
        raise


def _mount(arguments: argparse.Namespace, server: Background | None) -> int:
    from sdeefs.refusals import Refused, check_layers, check_merged, with_work

    options, merged = options_of(arguments)
    say = _say if arguments.verbose else _silent
    if options.remount:
        from sdeefs.kernel_engine import remount

        remount(options, merged)
        if server is not None:
            server.discard()
        return OK
    merged = check_merged(merged)
    options = with_work(options)
    check_layers(options)
    if arguments.engine != "fuse":
        from sdeefs import kernel_engine

        reason = kernel_engine.why_not(options)
        if reason is None:
            try:
                kernel_engine.mount(options, merged)
                say(f"engine kernel: overlayfs takes these layers and options on {_text(merged)}")
                return OK
            except (OSError, Refused) as error:
                if arguments.engine == "kernel" or isinstance(error, Refused):
                    raise
                reason = error.strerror or str(error)
        if arguments.engine == "kernel":
            raise Refused(f"kernel overlayfs can't serve this: {reason} (try --engine fuse)")
        say(f"engine fuse: kernel overlayfs can't serve this: {reason}")
    from dataclasses import replace

    from sdeefs.background import Background, foreground

    if options.read_only:
        options = replace(options, work=None)  # nothing is written there
    level = arguments.log_level or "warning"
    log_file = None if arguments.log_file is None else os.path.abspath(arguments.log_file)
    if log_file is not None:
        _try_log(log_file)
    if arguments.foreground:
        say(f"engine fuse: serving {_text(merged)} in the foreground")
        return foreground(options, merged, level, log_file)
    pid = (server or Background()).serve(options, merged, level, log_file)
    say(f"engine fuse: process {pid} serves {_text(merged)}")
    return OK


def _try_log(path: str) -> None:
    """Refuse a log that can't be written, for later nobody would hear of it."""
    from sdeefs.refusals import Refused

    there = os.path.exists(path)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666))
        if not there:
            os.unlink(path)  # made with its first line
    except OSError as error:
        raise Refused(f"log file {path}: {error.strerror}") from None


def _text(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")


def _say(line: str) -> None:
    print(f"sdeefs: {line}", file=sys.stderr)


def _silent(line: str) -> None:
    pass
