"""python -m perf [all|overall|cpu|fs|startup|deploy]: measure, and write one page of it all.

python -m perf all --quick            everything, a short run
python -m perf fs --out DIR           one suite; run again to go on where it was stopped
python -m perf publish --out DIR [--out DIR ...] FILE
                                      write the tables into a Markdown page, or FILE.html with plots
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from perf import report
from perf.figures import Figure, Missing
from perf.places import default_scratch, described, place
from perf.publish import publish
from perf.runner import Block, run
from perf.suites import SUITES, Suite


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m perf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("suite", choices=["all", *SUITES, "publish"], nargs="?", default="all")
    made.add_argument("page", nargs="?", help="publish: the Markdown or HTML file to write")
    made.add_argument("--quick", action="store_true", help="small trees, short slices, few rounds")
    made.add_argument("--rounds", type=int, metavar="N", help="how many interleaved rounds")
    made.add_argument(
        "--out",
        type=Path,
        action="append",
        metavar="DIR",
        help="where the results are (default: perf-out); publish takes several, the last one wins",
    )
    made.add_argument(
        "--scratch",
        type=Path,
        metavar="DIR",
        help="where layers are made (default: the current directory, $TMPDIR or /var/tmp, on a disk)",
    )
    made.add_argument(
        "--only",
        metavar="WORD[,WORD...]",
        help="only contenders whose name has one of these, and the base",
    )
    made.add_argument(
        "--lines", metavar="WORD[,WORD...]", help="only what measures a line with one of these"
    )
    made.add_argument("--user", metavar="NAME", help="who runs sdee when perf runs as root")
    return made


def chosen(blocks: Sequence[Block], base: str, only: str | None, lines: str | None) -> list[Block]:
    """The blocks that --only and --lines leave. Raises Missing where that is none."""
    found = list(blocks)
    if only:
        words = only.split(",")
        found = [
            b for b in found if b.contender == base or any(word in b.contender for word in words)
        ]
    if lines:
        words = lines.split(",")
        found = [b for b in found if any(word in line for word in words for line in b.lines)]
    if not found:
        raise Missing("--only and --lines leave nothing to measure")
    return found


def _run(suite: Suite, blocks: Sequence[Block], arguments: argparse.Namespace) -> list[Figure]:
    found = chosen(blocks, suite.base, arguments.only, arguments.lines)
    rounds = arguments.rounds or (suite.quick if arguments.quick else suite.full)
    print(f"{suite.name}: {len(found)} blocks, {rounds} rounds", file=sys.stderr)
    return run(found, rounds, arguments.out[-1] / f"{suite.name}.jsonl")


def _in_sandboxes(suite: Suite, arguments: argparse.Namespace) -> list[Figure]:
    from perf import cpu, overall, startup
    from perf.sandboxes import as_user, forget_environments, sandboxes, with_control
    from perf.sdeed import daemon
    from perf.sessions import Sessions

    user = arguments.user
    with place(user) as there, daemon(user) as socket:
        found = sandboxes(user, there, socket)
        try:
            if suite.name == "startup":
                return _run(suite, startup.blocks(arguments.quick, found), arguments)
            module = cpu if suite.name == "cpu" else overall
            with Sessions() as sessions:
                blocks = module.blocks(arguments.quick, with_control(found), there, sessions)
                return _run(suite, blocks, arguments)
        finally:
            forget_environments(as_user(user, socket))


def _on_layers(suite: Suite, arguments: argparse.Namespace) -> tuple[list[Figure], str]:
    """The figures, and what the layers were on."""
    from perf import deploy, fs

    parent = arguments.scratch or default_scratch()
    scratch = Path(tempfile.mkdtemp(prefix="sdee-perf-", dir=parent))
    scratch.chmod(0o755)
    try:
        note = f"The layers are on {described(parent)}."
        if suite.name == "deploy":
            return _run(suite, deploy.blocks(scratch, arguments.quick), arguments), note
        if absent := fs.left_out(arguments.quick, arguments.only):
            note += (
                f" A quick run leaves out {', '.join(absent)}; `--only` with their names doesn't."
            )
        blocks = fs.blocks(scratch, arguments.quick, arguments.only)
        return _run(suite, blocks, arguments), note
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _measure(suite: Suite, arguments: argparse.Namespace, command: str) -> None:
    notes: tuple[str, ...] = ()
    if suite.name in ("fs", "deploy"):
        figures, note = _on_layers(suite, arguments)
        notes = (note,)
    else:
        figures = _in_sandboxes(suite, arguments)
    section = report.Section(suite.name, suite.title, suite.base, tuple(figures), command, notes)
    report.write(section, arguments.out[-1])


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    words = sys.argv[1:] if words is None else words
    arguments = parser().parse_intermixed_args(words)
    arguments.out = arguments.out or [Path("perf-out")]
    if arguments.suite == "publish":
        if not arguments.page:
            print("perf publish: name the page to write", file=sys.stderr)
            return 2
        return publish(arguments.out, Path(arguments.page))
    if len(arguments.out) > 1:
        print("perf: one --out; only publish takes several", file=sys.stderr)
        return 2
    if arguments.suite in ("all", "fs", "deploy") and os.getuid():
        print("perf: mounting the peers needs root; run it with sudo", file=sys.stderr)
        return 1
    try:
        for name in SUITES if arguments.suite == "all" else [arguments.suite]:
            _measure(SUITES[name], arguments, shlex.join(["python", "-m", "perf", *words]))
    except (Missing, OSError) as error:
        print(f"perf: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("perf: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{arguments.out[-1] / 'index.html'} and report.md hold the tables")
    return 0


if __name__ == "__main__":
    sys.exit(main())
