"""`sdeefs fsck`: check an upper, and mend it with --repair."""

from __future__ import annotations

import argparse
import json
import os
import sys

from sdeefs.fsck import check
from sdeefs.options import Options
from sdeefs.refusals import check_layers, default_work, unused

OK, FAILURE = 0, 1


def run(arguments: argparse.Namespace) -> int:
    """The command: status 0 where nothing is wrong any more. Raises Refused or OSError."""
    upper = os.fsencode(arguments.upper)
    lowers = tuple(os.fsencode(p) for p in arguments.lower)
    work: bytes | None = default_work(upper)
    if arguments.workdir is not None:
        work = os.fsencode(arguments.workdir)
    elif work is not None and not os.path.isdir(work):
        work = None
    # With the checks of a mount, and as its only user while it lasts. A directory stands in for a
    # lower that wasn't given.
    options = Options(
        lowers=lowers or (b"/",), upper=upper, work=work, read_only=not arguments.repair
    )
    check_layers(options)
    with unused(options):
        found = list(check(upper, lowers, work, repair=arguments.repair))
    left = [f for f in found if not f.repaired]
    if arguments.json:
        print(
            json.dumps(
                {"upper": arguments.upper, "findings": [f.as_json() for f in found]}, indent=1
            )
        )
    else:
        for finding in found:
            done = " (mended)" if finding.repaired else ""
            sys.stdout.buffer.write(finding.path + b": " + finding.problem.encode() + done.encode())
            sys.stdout.buffer.write(b"\n")
        sys.stdout.buffer.flush()
        if any(f.repair for f in left) and not arguments.repair:
            print("sdeefs fsck: --repair mends what can be mended", file=sys.stderr)
    return FAILURE if left else OK
