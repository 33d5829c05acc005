"""`sdeefs diff`: what an upper changes, for people or as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys

from sdeefs.diff import Change, Difference, differences

OK = 0


def line(difference: Difference) -> bytes:
    """One line for people: the letter, the path, and what else there is to say."""
    text = difference.change.value.encode() + b" " + difference.path
    if difference.kind == "directory":
        text += b"/"
    if difference.change is Change.TYPE:
        text += f"  ({difference.was} -> {difference.kind})".encode()
    if difference.change is Change.MOVED:
        text += b"  (from " + difference.origin + b"/)"
    return text


def run(arguments: argparse.Namespace) -> int:
    """The command. Raises OSError."""
    found = differences(
        os.fsencode(arguments.upper),
        [os.fsencode(p) for p in arguments.lower],
        prefix=arguments.prefix_whiteouts,
        owners=not arguments.no_owners,
    )
    if arguments.json:
        changes = [d.as_json() for d in found]
        print(
            json.dumps(
                {"upper": arguments.upper, "lowers": arguments.lower, "changes": changes}, indent=1
            )
        )
        return OK
    for difference in found:
        sys.stdout.buffer.write(line(difference) + b"\n")
    sys.stdout.buffer.flush()
    return OK
