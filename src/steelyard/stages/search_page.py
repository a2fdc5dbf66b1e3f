"""A search's result, and the page that shows it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from steelyard.compress import search
from steelyard.compress.search import Ladder, Point
from steelyard.report import Report


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a search."""

    chosen: str | None
    """Of those that meet the target the one that loses least; None: none meets it."""
    path: str | None
    """Its checkpoint; its recipe stands beside it."""
    points: list[Point]
    front: list[str]
    """Names of those that no other is better than in size, speed and loss."""
    explained: list[str]
    nearest: str | None
    """Of those that miss the target the one that misses it least."""
    missed: float
    """By how much that misses it, as a share of a bound."""
    seconds: float
    report: str


def page(title: str, target: str, found: Found, ladder: Ladder | None) -> Report:
    """What was measured, what is to be expected between, and which is for what.

    Args:
        title: of the page.
        target: as it was asked for; empty: none.
        found: the search's result.
        ladder: of the forms between int4 and int8; None: the usual ones were enough.
    """
    report = Report(title)
    if found.chosen is not None:
        report.text(f"Chosen for {target}: {found.chosen}.")
    elif target:
        report.text(
            f"None of these meets {target}. {found.nearest} misses it least, by {found.missed:.1%} of a bound; "
            "the line shows what is to be expected between the forms that were measured."
        )
    for sentence in found.explained:
        report.text(sentence)
    rungs = range(0, len(ladder.parts) + 1, max(1, len(ladder.parts) // 32)) if ladder else range(0)
    expected = [ladder.expected(count) for count in rungs] if ladder else []
    for measure, label, scale in (("size", "MB", 1e-6), ("tokens_per_second", "tokens/s of one stream", 1.0)):
        line = [e[measure] * scale for e in expected], [100 * e["loss"] for e in expected]
        series: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
        if expected:
            series["expected between int4 and int8"] = line
        for point in found.points[1:]:
            series[point.name] = [point.measures[measure] * scale], [100 * point.measures["loss"]]
        report.lines(f"What is lost by {measure.replace('_', ' ')}", series, label, "rise of bits per byte, %")
    names = [name for name in search.MEASURES if name in found.points[0].measures]
    rows = [
        [point.name, *(point.measures[name] for name in names), "yes" if point.name in found.front else ""]
        for point in found.points
    ]
    report.table(["form", *(name.replace("_", " ") for name in names), "none is better"], rows, "Measured")
    told = [[name, what] for name, what in search.MEASURES.items() if name in names]
    report.table(["measure", "what it is"], told)
    return report
