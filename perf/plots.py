"""A section as a plot: a bar for each contender and line."""

from __future__ import annotations

import io

from perf.figures import ratio
from perf.report import Section
from perf.tables import absentees, columns


def plot(section: Section) -> str:
    """SVG: multiples of the base's time (logarithmic), with their intervals; empty without any.

    Needs matplotlib; raises ImportError without it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_key = {(f.line, f.contender): f for f in section.figures}
    _, contenders = columns(section.figures)
    absent = absentees(section.figures)
    shown = [c for c in contenders if c != section.base and c not in absent]
    bars = {
        (line, contender): times
        for (line, contender), figure in by_key.items()
        if contender in shown and (times := ratio(figure, by_key.get((line, section.base))))
    }
    lines = list(dict.fromkeys(line for line, _ in bars))
    if not lines:
        return ""
    matplotlib.rcParams["svg.hashsalt"] = section.name  # the same figures, the same file
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.14 * len(lines) * (len(shown) + 1)))
    height = 0.8 / len(shown)
    for index, contender in enumerate(shown):
        own = [
            (row, bars[line, contender])
            for row, line in enumerate(lines)
            if (line, contender) in bars
        ]
        # From 1 to the left is faster, to the right slower.
        axes.barh(
            [row + index * height for row, _ in own],
            [times.value - 1 for _, times in own],
            left=1,
            height=height,
            label=contender,
            xerr=[
                [times.value - times.low for _, times in own],
                [times.high - times.value for _, times in own],
            ],
            error_kw={"elinewidth": 0.6},
        )
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(lines))], lines)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    left, right = axes.get_xlim()
    axes.xaxis.set_minor_formatter("{x:g}" if right / left < 20 else "")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"multiple of the time of {section.base}")
    axes.legend(fontsize="small")
    figure.tight_layout()
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return text.getvalue()
