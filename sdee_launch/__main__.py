"""The command `sdee`. The way to `run` and `shell` is short: it imports next to nothing."""

import sys


def main() -> int:
    """Entry point; the exit status. Ends the process itself after `run` and `shell`."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in ("run", "shell"):
        from sdee_launch import session

        status = int(session.main(arguments))
        if sys.stdout is not None:  # None: it was closed
            try:
                sys.stdout.flush()
            except OSError:
                from mount_helpers.standard_output import finish

                status = finish("sdee", status)
        import posix  # `os` takes a millisecond, and so does taking the interpreter down

        posix._exit(status)
    from mount_helpers.standard_output import finish

    try:
        return finish("sdee", _others(arguments))
    except SystemExit as ended:  # argparse's, after its help or a usage error
        if not isinstance(ended.code, int):
            raise
        return finish("sdee", ended.code)


def _others(arguments: "list[str]") -> int:
    """All but `run` and `shell`."""
    if arguments == ["--version"]:
        import sdeefs

        print(f"sdee {sdeefs.__version__}")
        return 0
    from sdee_launch import cli

    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
