"""Figures as tables: a line for each measurement, a column for each contender."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from perf.figures import MANY, Figure, ratio


@dataclass(frozen=True)
class Table:
    """Text in cells: `rows` are (line, a cell for each contender)."""

    contenders: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def columns(figures: Sequence[Figure]) -> tuple[list[str], list[str]]:
    """The lines and contenders, each in the order of first appearance."""
    lines = list(dict.fromkeys(f.line for f in figures))
    contenders = list(dict.fromkeys(f.contender for f in figures))
    return lines, contenders


def number(value: float) -> str:
    """Three significant digits, without exponents."""
    if not value:
        return "0"
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.3g}" if value >= 0.01 else f"{value:.4f}"


def percent(share: float) -> str:
    """A share as percents, with a decimal where there is less than ten of them."""
    return f"{share:.0%}" if share >= 0.0995 or not share else f"{share:.1%}"


def _cell(figure: Figure | None, base: Figure | None) -> str:
    if figure is None:
        return ""
    if not figure.values:
        return f"missing: {figure.missing}" if figure.missing else "not run"
    if figure.missing:  # it ran, and then failed: both are worth knowing
        return f"{_measured(figure, base)}; in round {len(figure.values) + 1}: {figure.missing}"
    return _measured(figure, base)


def _measured(figure: Figure, base: Figure | None) -> str:
    text = f"{number(figure.median)} ±{figure.spread:.0%}"
    times = ratio(figure, base)
    if times is None or figure is base:
        return text
    if len(figure.values) < MANY:
        return f"{text} ({times.value:.2f}×)"
    digits = 3 if times.uncertainty < 0.02 else 2
    return f"{text} ({times.value:.{digits}f}× ±{percent(times.uncertainty)})"


def table(figures: Sequence[Figure], base: str) -> Table:
    """Median ± spread, and in brackets the multiple of `base`'s time."""
    lines, contenders = columns(figures)
    by_key = {(f.line, f.contender): f for f in figures}
    unit = {f.line: f.unit for f in figures}
    rows = tuple(
        (
            f"{line} [{unit[line]}]",
            tuple(_cell(by_key.get((line, c)), by_key.get((line, base))) for c in contenders),
        )
        for line in lines
    )
    return Table(tuple(contenders), rows)


def markdown(figures: Sequence[Figure], base: str) -> str:
    """The table in Markdown. A contender that is missing everywhere is named below it, once."""
    absent = absentees(figures)
    text = rendered(table([f for f in figures if f.contender not in absent], base))
    names = "".join(f"- {name}: missing, {why}\n" for name, why in absent.items())
    return text + ("\n" + names if names else "")


def rendered(shown: Table) -> str:
    """A table in Markdown."""
    rows = [("", shown.contenders), ("---", ("---",) * len(shown.contenders)), *shown.rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in (line, *cells)) + " |\n"
        for line, cells in rows
    )


def absentees(figures: Sequence[Figure]) -> dict[str, str]:
    """Contenders without a single figure, and why."""
    _, contenders = columns(figures)
    found = {}
    for contender in contenders:
        own = [f for f in figures if f.contender == contender]
        if all(f.missing and not f.values for f in own):
            found[contender] = own[0].missing
    return found


def resolution(figures: Sequence[Figure], base: str) -> str:
    """A sentence about how small a difference the ratios show; empty with few rounds."""
    by_key = {(f.line, f.contender): f for f in figures}
    found = []
    for figure in figures:
        if figure.contender != base and len(figure.values) >= MANY:
            times = ratio(figure, by_key.get((figure.line, base)))
            if times:
                found.append((times.uncertainty, figure))
    if not found:
        return ""
    middle = statistics.median(share for share, _ in found)
    worst, figure = max(found, key=lambda pair: pair[0])
    return (
        f"Resolution: the 95 % interval of a ratio is ±{percent(middle)} in the median of the"
        f" table's cells, and ±{percent(worst)} at worst ({figure.line}, {figure.contender})."
    )
