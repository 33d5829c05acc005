"""What was measured, as JSON in a directory and as a Markdown page; several directories as one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from perf import comparisons, machine
from perf.figures import MANY, Figure
from perf.suites import SUITES
from perf.tables import markdown, rendered, resolution


@dataclass(frozen=True)
class Section:
    """One suite's figures. Ratios are multiples of `base`'s time. `notes`: facts of this run."""

    name: str
    title: str
    base: str
    figures: tuple[Figure, ...]
    command: str
    notes: tuple[str, ...] = ()


def to_json(section: Section) -> dict[str, object]:
    """The section as JSON has it, with the machine that it was measured on."""
    return {**asdict(section), "machine": machine.facts()}


def from_json(data: dict[str, object]) -> Section:
    """The section that `to_json` wrote."""
    figures, notes = data["figures"], data.get("notes", [])
    assert isinstance(figures, list)
    assert isinstance(notes, list)
    return Section(
        str(data["name"]),
        str(data["title"]),
        str(data["base"]),
        tuple(Figure(**{**f, "values": tuple(f["values"])}) for f in figures),
        str(data["command"]),
        tuple(notes),
    )


def merged(earlier: Section, later: Section) -> Section:
    """One section of two runs of a suite. A line comes whole from one run, the later that has it.

    (Ratios are within the rounds of one run.)
    """
    again = {figure.line for figure in later.figures}
    kept = tuple(figure for figure in earlier.figures if figure.line not in again)
    if not kept:
        return later
    commands = dict.fromkeys((*earlier.command.split("\n"), *later.command.split("\n")))
    notes = tuple(dict.fromkeys((*earlier.notes, *later.notes)))
    return replace(later, figures=kept + later.figures, command="\n".join(commands), notes=notes)


def read(places: Sequence[Path]) -> tuple[list[Section], dict[str, str]]:
    """Every suite of the directories, in the page's order, and the facts of the machine."""
    found: dict[str, Section] = {}
    facts = machine.facts()
    for place in places:
        for name in SUITES:
            path = place / f"{name}.json"
            if not path.exists():
                continue
            data = json.loads(path.read_text())
            section = from_json(data)
            found[name] = merged(found[name], section) if name in found else section
            facts = data["machine"]
    return [found[name] for name in SUITES if name in found], facts


def about(section: Section) -> list[str]:
    """The paragraphs on top of a section's table, without markup but for `code`."""
    rounds = {len(f.values) for f in section.figures if f.values}
    fewest, most = (min(rounds), max(rounds)) if rounds else (0, 0)
    count = f"{most} rounds" if fewest == most else f"{fewest} to {most} rounds"
    spread = f"half the distance of the {'quartiles' if most >= MANY else 'extremes'}"
    if fewest < MANY <= most:
        spread += f" (with fewer than {MANY} rounds of the extremes)"
    told = f"Median of {count} ± {spread}" if most > 1 else "One round, so no scatter is known"
    text = (
        f"{told}; in brackets the multiple of the time of {section.base},"
        " the median of the ratios within each round"
        + (", ± half its 95 % interval." if most >= MANY else ".")
    )
    general = SUITES[section.name].about if section.name in SUITES else ""
    paragraphs = [" ".join(part for part in (general, *section.notes) if part), text]
    paragraphs.append(resolution(section.figures, section.base))
    return [part for part in paragraphs if part]


def page(sections: Sequence[Section], facts: dict[str, str]) -> str:
    """The report in Markdown."""
    parts = ["| | |\n| --- | --- |\n" + "".join(f"| {k} | {v} |\n" for k, v in facts.items())]
    for section in sections:
        commands = "".join(f"{line}\n" for line in section.command.split("\n"))
        told = "\n\n".join(about(section))
        parts.append(
            f"## {section.title}\n\n```sh\n{commands}```\n\n{told}\n\n"
            f"{markdown(section.figures, section.base)}"
        )
        parts += [
            f"### {title}\n\n{rendered(shown)}"
            for title, shown in comparisons.tables(section.figures, section.base)
        ]
    return "\n".join(parts)


def write(section: Section, out: Path) -> None:
    """Write one suite's JSON into `out`, and the whole page anew, as Markdown and HTML."""
    from perf import webpage

    out.mkdir(parents=True, exist_ok=True)
    (out / f"{section.name}.json").write_text(json.dumps(to_json(section), indent=1) + "\n")
    sections, facts = read([out])
    (out / "report.md").write_text("# Measured\n\n" + page(sections, facts))
    (out / "index.html").write_text(webpage.page(sections, facts))
