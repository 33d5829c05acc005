"""The mount(8) helper: `mount -t fuse.sdeefs SOURCE MERGED -o …`, and lines of fstab.

mount(8) runs /sbin/mount.fuse.sdeefs SOURCE MERGED [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]
and waits: it returns when the mount is live, with the exit codes of mount(8).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

# mount(8): incorrect invocation, system error, internal bug, interrupt, mount failure
EX_USAGE, EX_SYSERR, EX_SOFTWARE, EX_USER, EX_FAIL = 1, 2, 4, 8, 32
USAGE = "usage: mount.fuse.sdeefs SOURCE MERGED [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]"


class _Usage(Exception):
    """One line on what is wrong with the invocation."""


def plan(words: Sequence[str]) -> tuple[list[str], str | None, bool]:
    """(arguments of `sdeefs`, mount namespace to enter, whether to mount at all)."""
    places: list[str] = []
    command = ["mount"]
    namespace = None
    really = True
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            places += rest
            break
        if not word.startswith("-") or word == "-":
            places.append(word)
            continue
        if word.startswith("--"):
            raise _Usage(f"unknown option {word}")
        letters = word[1:]
        while letters:
            letter, letters = letters[0], letters[1:]
            if letter in "oNt":
                if not letters and not rest:
                    raise _Usage(f"-{letter} needs a value")
                value, letters = (letters, "") if letters else (rest.pop(0), "")
                if letter == "o":
                    command += ["-o", value]
                elif letter == "N":
                    namespace = value
                elif value not in ("fuse.sdeefs", "fuse", "sdeefs"):
                    raise _Usage(f"type {value} isn't ours (fuse.sdeefs)")
            elif letter == "s":
                command.append("--sloppy")
            elif letter == "v":
                command.append("--verbose")
            elif letter == "f":
                really = False
            elif letter != "n":
                raise _Usage(f"unknown option -{letter}")
    if len(places) != 2:
        raise _Usage(f"SOURCE and MERGED are expected, not {len(places)} arguments")
    command += ["--source", places[0], "--", places[1]]
    return command, namespace, really


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the helper; returns mount(8)'s exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    if list(words) in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    try:
        command, namespace, really = plan(words)
    except _Usage as error:
        print(f"mount.fuse.sdeefs: {error}\n{USAGE}", file=sys.stderr)
        return EX_USAGE
    if not really:
        return 0
    try:
        if namespace is not None:
            _enter(namespace)
        done = subprocess.run([sys.executable, "-I", "-m", "sdeefs", *command], check=False)
    except OSError as error:
        name = error.filename or namespace or sys.executable
        print(f"mount.fuse.sdeefs: {name}: {error.strerror}", file=sys.stderr)
        return EX_SYSERR
    except KeyboardInterrupt:
        return EX_USER
    if done.returncode < 0:
        print(f"mount.fuse.sdeefs: ended by signal {-done.returncode}", file=sys.stderr)
        return EX_SOFTWARE
    return {0: 0, 1: EX_FAIL, 2: EX_USAGE, 130: EX_USER}.get(done.returncode, EX_SOFTWARE)


def _enter(namespace: str) -> None:
    """A mount namespace by the number of a process or the path of its file."""
    from mount_helpers.syscalls import CLONE_NEWNS, setns

    path = f"/proc/{namespace}/ns/mnt" if namespace.isdecimal() else namespace
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(fd, CLONE_NEWNS)
    finally:
        os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
