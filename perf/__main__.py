"""python -m perf [all|fs|startup|deploy|cpu|overall]: measure, and write one page of it all.

python -m perf all --quick            everything, a short run
python -m perf fs --out DIR           one suite; run again to go on where it was stopped
python -m perf publish --out DIR FILE write the tables of DIR into a Markdown page
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from perf import report
from perf.runner import Block, Missing, run

SUITES = {
    "fs": ("File systems: fio and metadata (Fig. 10)", "overlayfs"),
    "startup": ("Start-up (Table 3)", "unshare"),
    "deploy": ("Deployment (Fig. 11)", "cp -a"),
    "cpu": ("CPU-bound work (Figs. 7 to 9)", "bare metal"),
    "overall": ("Overall (Tables 1 and 2)", "bare metal"),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m perf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("suite", choices=["all", *SUITES, "publish"], nargs="?", default="all")
    made.add_argument("page", nargs="?", help="publish: the Markdown file to write")
    made.add_argument("--quick", action="store_true", help="small trees, short runs, 3 rounds")
    made.add_argument("--rounds", type=int, metavar="N", help="interleaved rounds (3 or 5)")
    made.add_argument("--out", type=Path, default=Path("perf-out"), metavar="DIR")
    made.add_argument(
        "--scratch", type=Path, metavar="DIR", help="where layers are made (default: under TMPDIR)"
    )
    made.add_argument(
        "--only",
        metavar="WORD[,WORD...]",
        help="only contenders whose name has one of these, and the base",
    )
    made.add_argument("--user", metavar="NAME", help="who runs sdee when perf runs as root")
    return made


def _blocks(suite: str, arguments: argparse.Namespace, scratch: Path) -> list[Block]:
    place = scratch / "programs"
    if suite == "fs":
        from perf import fs

        return fs.blocks(scratch, arguments.quick)
    if suite == "startup":
        from perf import startup

        return startup.blocks(arguments.quick, arguments.user)
    if suite == "cpu":
        from perf import cpu

        return cpu.blocks(arguments.quick, arguments.user, place)
    if suite == "overall":
        from perf import overall

        return overall.blocks(arguments.quick, arguments.user, place)
    from perf import deploy

    return deploy.blocks(scratch, arguments.quick)


def _measure(suite: str, arguments: argparse.Namespace, scratch: Path, command: str) -> None:
    from perf.sandboxes import daemon

    title, base = SUITES[suite]
    blocks = _blocks(suite, arguments, scratch)
    if arguments.only:
        words = arguments.only.split(",")
        blocks = [
            b for b in blocks if b.contender == base or any(word in b.contender for word in words)
        ]
    rounds = arguments.rounds or (3 if arguments.quick else 5)
    print(f"{suite}: {len(blocks)} blocks, {rounds} rounds", file=sys.stderr)
    journal = arguments.out / f"{suite}.jsonl"
    if suite in ("startup", "cpu", "overall"):
        with daemon(arguments.user):
            figures = run(blocks, rounds, journal)
    else:
        figures = run(blocks, rounds, journal)
    report.write(report.Section(suite, title, base, tuple(figures), command), arguments.out)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = parser().parse_intermixed_args(words)
    command = "python -m perf " + " ".join(words if words is not None else sys.argv[1:])
    if arguments.suite == "publish":
        if not arguments.page:
            print("perf publish: name the page to write", file=sys.stderr)
            return 2
        return publish(arguments.out, Path(arguments.page))
    if arguments.suite in ("all", "fs", "deploy") and os.getuid():
        print("perf: mounting the peers needs root; run it with sudo", file=sys.stderr)
        return 1
    scratch = Path(tempfile.mkdtemp(prefix="sdee-perf-", dir=arguments.scratch))
    scratch.chmod(0o755)
    try:
        for suite in SUITES if arguments.suite == "all" else [arguments.suite]:
            _measure(suite, arguments, scratch, command)
    except Missing as error:
        print(f"perf: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("perf: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{arguments.out / 'index.html'} and report.md hold the tables")
    return 0


def publish(out: Path, page: Path) -> int:
    """Write the tables of `out` between the marks of a Markdown page."""
    begin, end = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
    sections, facts = report.read(out)
    if not sections:
        print(f"perf publish: {out} has no figures; run a suite with --out {out}", file=sys.stderr)
        return 1
    text = page.read_text() if page.exists() else f"# Performance\n\n{begin}{end}"
    if begin not in text or end not in text:
        print(f"perf publish: {page} has no lines {begin!r} and {end!r}", file=sys.stderr)
        return 1
    head, rest = text.split(begin, 1)
    tail = rest.split(end, 1)[1]
    page.write_text(head + begin + "\n" + report.page(sections, facts) + "\n" + end + tail)
    return 0


if __name__ == "__main__":
    sys.exit(main())
