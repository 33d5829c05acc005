"""The last thing a command does: what it printed is written, or it says that it can't be."""

from __future__ import annotations

import os
import sys


def finish(program: str, status: int) -> int:
    """The exit status, once what was printed is written: 1 and one line where that fails.

    Nothing is said where the reader has gone, or where the command has failed anyhow.
    """
    if sys.stdout is None:  # it was closed
        return status
    try:
        sys.stdout.flush()
    except OSError as error:
        if not status and not isinstance(error, BrokenPipeError):
            print(f"{program}: standard output: {error.strerror}", file=sys.stderr)
        # The interpreter writes at its end what is left, and would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)
        return status or 1
    return status
