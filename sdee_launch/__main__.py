"""The command `sdee`. The way to `run` and `shell` is short: it imports next to nothing."""

from __future__ import annotations

import sys


def main() -> int:
    """Entry point; the exit status."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in ("run", "shell"):
        from sdee_launch import session

        return int(session.main(arguments))
    from sdee_launch import cli

    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
