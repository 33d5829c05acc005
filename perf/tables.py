"""Figures as tables: a line for each measurement, a column for each contender."""

from __future__ import annotations

from collections.abc import Sequence

from perf.runner import Figure


def columns(figures: Sequence[Figure]) -> tuple[list[str], list[str]]:
    """The lines and contenders, each in the order of first appearance."""
    lines = list(dict.fromkeys(f.line for f in figures))
    contenders = list(dict.fromkeys(f.contender for f in figures))
    return lines, contenders


def number(value: float) -> str:
    """Three significant digits, without exponents."""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.3g}" if value >= 0.01 else f"{value:.4f}"


def ratio(figure: Figure, base: Figure | None) -> float | None:
    """How many times the base's *time* it takes (for rates: base / figure); None without a base."""
    if base is None or not base.values or not figure.values or not base.median or not figure.median:
        return None
    if figure.higher_is_better:
        return base.median / figure.median
    return figure.median / base.median


def markdown(figures: Sequence[Figure], base: str) -> str:
    """A Markdown table: median ± spread, and in brackets the multiple of `base`'s time."""
    lines, contenders = columns(figures)
    by_key = {(f.line, f.contender): f for f in figures}
    rows = ["| | " + " | ".join(contenders) + " |", "| --- |" + " --- |" * len(contenders)]
    for line in lines:
        cells = []
        unit = next(f.unit for f in figures if f.line == line)
        for contender in contenders:
            figure = by_key.get((line, contender))
            if figure is None:
                cells.append("")
            elif figure.missing:
                cells.append(f"missing: {figure.missing}")
            elif not figure.values:
                cells.append("not run")
            else:
                text = f"{number(figure.median)} ±{figure.spread:.0%}"
                times = ratio(figure, by_key.get((line, base)))
                if times is not None and contender != base:
                    text += f" ({times:.2f}×)"
                cells.append(text)
        rows.append(f"| {line} [{unit}] | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"
