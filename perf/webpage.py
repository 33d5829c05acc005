"""All that was measured as one HTML file with its plots inside."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from perf import comparisons
from perf.plots import plot
from perf.report import Section, about
from perf.tables import Table, absentees, table

_STYLE = (
    "body{font:15px sans-serif;margin:2em}td,th{padding:2px 8px;text-align:left}"
    "table{border-collapse:collapse}tr:nth-child(even){background:#f3f3f3}svg{max-width:100%;height:auto}"
)


def _code(text: str) -> str:
    """A paragraph: escaped, `code` marked up."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


def _row(head: str, cells: Sequence[str], tag: str = "td") -> str:
    inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    return f"<tr><th>{html.escape(head)}</th>{inner}</tr>"


def _table(shown: Table) -> str:
    rows = "".join(_row(line, cells) for line, cells in shown.rows)
    return f"<table>{_row('', shown.contenders, 'th')}{rows}</table>"


def _plot(section: Section) -> str:
    try:
        text = plot(section)
    except ImportError:
        return "<p>No plot: matplotlib isn't installed (pip install 'sdee[perf]').</p>"
    return text[text.index("<svg") :] if text else ""


def _section(section: Section) -> str:
    absent = absentees(section.figures)
    shown = table([f for f in section.figures if f.contender not in absent], section.base)
    further = "".join(
        f"<h3>{html.escape(title)}</h3>{_table(one)}"
        for title, one in comparisons.tables(section.figures, section.base)
    )
    missing = "".join(
        f"<li>{html.escape(name)}: missing, {html.escape(why)}</li>" for name, why in absent.items()
    )
    told = "".join(f"<p>{_code(part)}</p>" for part in about(section))
    return (
        f"<h2>{html.escape(section.title)}</h2><pre>{html.escape(section.command)}</pre>{told}"
        f"{_table(shown)}{f'<ul>{missing}</ul>' if missing else ''}{_plot(section)}{further}"
    )


def page(sections: Sequence[Section], facts: dict[str, str]) -> str:
    """The whole file."""
    header = "".join(_row(name, [value]) for name, value in facts.items())
    return (
        "<!doctype html><meta charset=utf-8><title>Measured</title>"
        f"<style>{_STYLE}</style><h1>Measured</h1><table>{header}</table>"
        f"{''.join(_section(section) for section in sections)}\n"
    )
