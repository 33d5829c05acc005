"""The command `sdee`. The way to `run` and `shell` is short: it imports next to nothing."""

import sys


def main() -> int:
    """Entry point; the exit status. Ends the process itself after `run` and `shell`."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in ("run", "shell"):
        from sdee_launch import session

        status = int(session.main(arguments))
        if sys.stdout is not None:  # None: it was closed
            sys.stdout.flush()
        import posix  # `os` takes a millisecond, and so does taking the interpreter down

        posix._exit(status)
    if arguments == ["--version"]:
        import sdeefs

        print(f"sdee {sdeefs.__version__}")
        return 0
    from sdee_launch import cli

    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
