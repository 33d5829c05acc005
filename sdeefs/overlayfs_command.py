"""`sdeefs-overlayfs`: called as fuse-overlayfs is, by podman's `mount_program` and others."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace

OK, FAILURE, USAGE = 0, 1, 2

HELP = """\
usage: sdeefs-overlayfs [-f] [-d] -o lowerdir=A[:B...][,upperdir=U,workdir=W][,OPTION...] MERGED

A drop-in for fuse-overlayfs: mounts sdeefs at MERGED and returns when it is usable. Without
upperdir the mount is read-only. uidmap= and gidmap= map the ids of all layers; options of
fuse-overlayfs that have no meaning here are accepted and ignored.

  -f, --foreground   serve in this process
  -d, --debug        serve in this process and log what happens
  -V, --version      print the version
  -h, --help         print this
"""


class _Wrong(Exception):
    """One line on what is wrong with the invocation."""


def read(words: Sequence[str]) -> tuple[list[str], list[str], set[str]]:
    """(option strings, places, flags), as libfuse's programs read their arguments."""
    options: list[str] = []
    places: list[str] = []
    flags: set[str] = set()
    names = {"--foreground": "f", "--debug": "d", "--version": "V", "--help": "h"}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            places += rest
            break
        if word in names:
            flags.add(names[word])
        elif word.startswith("--"):
            raise _Wrong(f"unknown option {word}")
        elif word.startswith("-o"):
            value = word[2:] or (rest.pop(0) if rest else "")
            if not value:
                raise _Wrong("-o needs a value")
            options.append(value)
        elif word.startswith("-") and word != "-":
            for letter in word[1:]:
                if letter not in "fdVhs":
                    raise _Wrong(f"unknown option -{letter}")
                flags.add(letter)
        else:
            places.append(word)
    return options, places, flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    try:
        options, places, flags = read(sys.argv[1:] if arguments is None else arguments)
    except _Wrong as error:
        print(f"sdeefs-overlayfs: {error}", file=sys.stderr)
        return USAGE
    if "h" in flags:
        print(HELP, end="")
        return OK
    if "V" in flags:
        import sdeefs

        # podman reads the first line's second half as fuse-overlayfs's version.
        print(f"fuse-overlayfs: version 1.14 (sdeefs {sdeefs.__version__})")
        return OK
    from sdeefs.background import Background, complaint, foreground
    from sdeefs.options import UsageError, parse
    from sdeefs.refusals import Refused, check_layers, check_merged, with_work

    try:
        if len(places) != 1:
            raise UsageError("one MERGED is expected")
        # As fuse-overlayfs does: everybody in the namespace may enter.
        # podman stores the deletions of image layers as `.wh.NAME`, which fuse-overlayfs reads.
        asked = parse(["read_prefixes", *options], drop_in=True)
        if asked.allow_other is None and os.geteuid() == 0:
            asked = replace(asked, allow_other=True)
        if asked.source == "sdeefs":
            asked = replace(asked, source="fuse-overlayfs")
        merged = check_merged(os.fsencode(places[0]))
        asked = with_work(asked)
        check_layers(asked)
        if "d" in flags:
            return foreground(asked, merged, "debug", None)
        if "f" in flags:
            return foreground(asked, merged, "warning", None)
        Background().serve(asked, merged, "warning", None)
    except (UsageError, Refused, OSError, KeyboardInterrupt) as error:
        status, line = complaint(error)
        print(f"sdeefs-overlayfs: {line}", file=sys.stderr)
        return status
    return OK


if __name__ == "__main__":
    sys.exit(main())
