"""One page of what several runs measured: between the marks of a Markdown page, or as HTML."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from perf import report

BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"


def publish(places: Sequence[Path], page: Path) -> int:
    """Write the tables of the directories into `page`; .html has the plots too. An exit status."""
    sections, facts = report.read(places)
    if not sections:
        names = " ".join(f"--out {place}" for place in places)
        print(f"perf publish: no figures there; run a suite first ({names})", file=sys.stderr)
        return 1
    if page.suffix == ".html":
        from perf import webpage

        page.write_text(webpage.page(sections, facts))
        return 0
    text = page.read_text() if page.exists() else f"# Performance\n\n{BEGIN}{END}"
    if BEGIN not in text or END not in text:
        print(f"perf publish: {page} has no lines {BEGIN!r} and {END!r}", file=sys.stderr)
        return 1
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    page.write_text(head + BEGIN + "\n" + report.page(sections, facts) + "\n" + END + tail)
    return 0
