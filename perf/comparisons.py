"""The tables of file systems read in two ways: beside the aims, and beside the peers."""

from __future__ import annotations

from collections.abc import Sequence

from perf import floor
from perf.figures import Figure, ratio
from perf.tables import Table, columns

#: In multiples of the base's time.
AIMS = {
    "find, cold": 2.5,
    "find, warm": 1.2,
    "tar c, warm": 1.25,
    "tar x": 2.5,
    "cp -a lower to upper": 2.3,
    "rm -r upper": 1.5,
    "rm -r lower": 1.5,
}
_OURS = ("sdeefs ring", "sdeefs device")
_PEERS = ("fuse-overlayfs 1.10", "fuse-overlayfs 2.0")
_AIMS_TITLE = "Beside the aims, in multiples of the time of {base}"
_PEERS_TITLE = "How many times as fast as its peers sdeefs is (below 1: slower)"


def _times(figure: Figure | None, base: Figure | None) -> str:
    found = ratio(figure, base) if figure is not None else None
    return f"{found.value:.2f}" if found else ""


def tables(figures: Sequence[Figure], base: str) -> list[tuple[str, Table]]:
    """(title, table) of what the figures have; medians of the ratios within each round."""
    by_key = {(f.line, f.contender): f for f in figures if f.values}
    lines, _ = columns(figures)
    aims = tuple(
        (
            line,
            (
                _number(by_key.get((floor.requests_line(line), floor.NAME))),
                f"{AIMS[line]:g}",
                *(
                    _times(by_key.get((line, c)), by_key.get((line, base)))
                    for c in (floor.NAME, *_OURS)
                ),
            ),
        )
        for line in lines
        if line in AIMS
    )
    pairs = [(own, peer) for own in _OURS for peer in _PEERS]
    peers = tuple(
        (line, tuple(_times(by_key.get((line, p)), by_key.get((line, o))) for o, p in pairs))
        for line in lines
        if all((line, name) in by_key for name in (*_OURS, *_PEERS)) and not _is_server(line)
    )
    found = []
    if aims:
        head = ("requests waited for", "aim", floor.NAME, *_OURS)
        found.append((_AIMS_TITLE.format(base=base), Table(head, aims)))
    if peers:
        found.append((_PEERS_TITLE, Table(tuple(f"{o} : {p}" for o, p in pairs), peers)))
    return found


def _number(figure: Figure | None) -> str:
    return f"{figure.median:,.0f}" if figure is not None else ""


def _is_server(line: str) -> bool:
    """What servers spend isn't how fast they are."""
    return line.startswith(("server's CPU", "idle:"))
