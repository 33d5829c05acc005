"""One page of all that was measured: Markdown, JSON, HTML with plots."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from perf import machine
from perf.runner import Figure
from perf.tables import columns, markdown, ratio


@dataclass(frozen=True)
class Section:
    """One suite's figures. Ratios are multiples of `base`'s time."""

    name: str
    title: str
    base: str
    figures: tuple[Figure, ...]
    command: str


def to_json(section: Section) -> dict[str, object]:
    """The section as JSON has it, with the machine that it was measured on."""
    return {**asdict(section), "machine": machine.facts()}


def from_json(data: dict[str, object]) -> Section:
    """The section that `to_json` wrote."""
    figures = data["figures"]
    assert isinstance(figures, list)
    return Section(
        str(data["name"]),
        str(data["title"]),
        str(data["base"]),
        tuple(Figure(**{**f, "values": tuple(f["values"])}) for f in figures),
        str(data["command"]),
    )


def page(sections: Sequence[Section], facts: dict[str, str]) -> str:
    """The report in Markdown."""
    parts = ["| | |\n| --- | --- |\n" + "".join(f"| {k} | {v} |\n" for k, v in facts.items())]
    for section in sections:
        parts.append(
            f"## {section.title}\n\nMedian ± half the spread; in brackets the multiple of the time"
            f" of {section.base}. `{section.command}`\n\n{markdown(section.figures, section.base)}"
        )
    return "\n".join(parts)


def plot(section: Section, path: Path) -> None:
    """A bar for each contender and line, as multiples of the base's time (logarithmic)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines, contenders = columns(section.figures)
    by_key = {(f.line, f.contender): f for f in section.figures}
    shown = [c for c in contenders if c != section.base]
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.25 * len(lines) * max(1, len(shown))))
    height = 0.8 / max(1, len(shown))
    for index, contender in enumerate(shown):
        places, values = [], []
        for row, line in enumerate(lines):
            base, own = by_key.get((line, section.base)), by_key.get((line, contender))
            times = ratio(own, base) if own else None
            if times:
                places.append(row + index * height)
                values.append(times)
        axes.barh(places, values, height=height, label=contender)
    axes.set_yticks([r + 0.4 - height / 2 for r in range(len(lines))], lines)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"multiple of the time of {section.base}")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def write(section: Section, out: Path) -> None:
    """Write one suite's JSON and plot into `out`, and the whole page anew."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{section.name}.json").write_text(json.dumps(to_json(section), indent=1) + "\n")
    plot(section, out / f"{section.name}.svg")
    write_page(out)


def read(out: Path) -> tuple[list[Section], dict[str, str]]:
    """Every suite that `out` has, and the facts of the machine."""
    sections, facts = [], machine.facts()
    for path in sorted(out.glob("*.json")):
        data = json.loads(path.read_text())
        sections.append(from_json(data))
        facts = data["machine"]
    return sections, facts


def write_page(out: Path) -> None:
    """index.html and report.md from the JSON of all suites in `out`."""
    sections, facts = read(out)
    (out / "report.md").write_text("# Measured\n\n" + page(sections, facts))
    body = []
    for section in sections:
        lines, contenders = columns(section.figures)
        by_key = {(f.line, f.contender): f for f in section.figures}
        rows = ["<tr><th></th>" + "".join(f"<th>{html.escape(c)}</th>" for c in contenders)]
        for line in lines:
            cells = []
            for contender in contenders:
                figure = by_key.get((line, contender))
                if figure is None or not figure.values:
                    cells.append(html.escape(figure.missing if figure else ""))
                    continue
                times = ratio(figure, by_key.get((line, section.base)))
                text = f"{figure.median:.4g} {figure.unit} ±{figure.spread:.0%}"
                cells.append(text + (f" ({times:.2f}×)" if times else ""))
            rows.append(
                f"<tr><th>{html.escape(line)}</th>" + "".join(f"<td>{c}</td>" for c in cells)
            )
        body.append(
            f"<h2>{html.escape(section.title)}</h2><p><code>{html.escape(section.command)}</code></p>"
            f"<table>{''.join(rows)}</table><img src='{section.name}.svg' alt=''>"
        )
    header = "".join(
        f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td>" for k, v in facts.items()
    )
    (out / "index.html").write_text(
        "<!doctype html><meta charset=utf-8><title>Measured</title>"
        "<style>body{font:15px sans-serif;margin:2em}td,th{padding:2px 8px;text-align:left}"
        "img{max-width:100%}</style>"
        f"<h1>Measured</h1><table>{header}</table>{''.join(body)}\n"
    )
