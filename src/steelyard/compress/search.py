"""What a search for the best compressed form is about: goals, measured points, who is best, what to measure next.

Knows figures by name; nothing of models or files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from steelyard.errors import ConfigError

MEASURES = {
    "loss": "rise of bits per byte on held-out rows, relative",
    "size": "bytes on disk",
    "memory": "bytes of the weights in an engine",
    "tokens_per_second": "of one stream",
    "throughput": "tokens a second of 16 streams",
    "latency": "seconds to the first token after 128",
    "energy": "joules a token",
}
HIGH = ("tokens_per_second", "throughput")
"""Measures that are to be high; all others are to be low."""
UNITS = {"": 1.0, "%": 0.01, "kb": 1e3, "mb": 1e6, "gb": 1e9, "ms": 1e-3, "s": 1.0, "j": 1.0}
GOAL = re.compile(r"\s*(max_)?([a-z_]+)\s*(<=|>=|=)\s*([0-9.]+)\s*(x|%|[kmg]b|ms|s|j|)\s*", re.IGNORECASE)


def shown(measure: str, value: float) -> str:
    """A value of a measure, for people."""
    if measure in ("size", "memory"):
        return f"{value / 1e6:.1f} MB"
    if measure == "latency":
        return f"{value * 1e3:.1f} ms"
    return f"{value:+.2%}" if measure == "loss" else f"{value:.4g}"


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of one measure."""

    measure: str
    value: float
    relative: bool
    """Times what the model has as it is."""
    text: str

    def bound(self, base: Mapping[str, float]) -> float:
        """In the measure's own unit."""
        return self.value * base[self.measure] if self.relative else self.value

    def excess(self, measures: Mapping[str, float], base: Mapping[str, float]) -> float:
        """By how much it is missed, as a share of the bound; 0 or less: it is met. Not a number never is."""
        bound, found = self.bound(base), measures[self.measure]
        if math.isnan(found):
            return math.inf
        scale = max(abs(bound), 1e-9)
        return (bound - found) / scale if self.measure in HIGH else (found - bound) / scale


def goals(text: str) -> tuple[Goal, ...]:
    """`tokens_per_second>=2x,size<=100MB,max_loss=1%`.

    Raises:
        ConfigError: what is none, with what is.
    """
    found = []
    for part in filter(str.strip, text.split(",")):
        match = GOAL.fullmatch(part)
        name = match[2].lower() if match else ""
        if match is None or name not in MEASURES:
            known = ", ".join(MEASURES)
            raise ConfigError(f"target '{part.strip()}': write measure<=value or measure>=value; measures: {known}")
        sign = ">=" if name in HIGH else "<="
        if match[3] not in (sign, "="):
            raise ConfigError(
                f"target '{part.strip()}': {name} is to be {'high' if name in HIGH else 'low'}: write {sign}"
            )
        unit = match[5].lower()
        try:
            value = float(match[4])
        except ValueError:
            raise ConfigError(f"target '{part.strip()}': '{match[4]}' is no number") from None
        if unit == "x" and name == "loss":
            raise ConfigError(f"target '{part.strip()}': loss is relative already: write max_loss=1%")
        relative = unit == "x" or (unit == "%" and name != "loss")
        scale = 1.0 if unit == "x" else UNITS[unit]
        found.append(Goal(measure=name, value=value * scale, relative=relative, text=part.strip()))
    return tuple(found)


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One form of the model, measured."""

    name: str
    steps: list[dict[str, Any]]
    """Of a recipe that makes it; none: as it is."""
    measures: dict[str, float]
    loss_interval: tuple[float, float] = (0.0, 0.0)
    """Of 95%, by drawing the held-out rows anew."""
    seconds: float = 0.0
    """That it took to make and measure."""
    fixed: bool = True
    """One of those that are always tried, and not chosen by the search."""
    path: str | None = None


def worst(goals: Sequence[Goal], measures: Mapping[str, float], base: Mapping[str, float]) -> float:
    """By how much the goal that is missed most is missed; 0 or less: all are met."""
    return max((goal.excess(measures, base) for goal in goals), default=0.0)


def front(points: Iterable[Point], measures: Sequence[str]) -> list[Point]:
    """Points that no other is at least as good as in all of some measures, and better in one."""
    known = list(points)

    def better(one: Point, other: Point) -> bool:
        pairs = [(_low(one, name), _low(other, name)) for name in measures]
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    return [point for point in known if not any(better(other, point) for other in known)]


def _low(point: Point, measure: str) -> float:
    value = point.measures.get(measure, math.nan)
    return math.inf if math.isnan(value) else -value if measure in HIGH else value


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Layers that may have 4 bits or 8, all of them together."""

    paths: tuple[str, ...]
    loss: float
    """With 4 bits alone, in any unit that adds up."""
    size: float
    """Bytes that 8 bits take more than 4."""


def order(parts: Iterable[Part]) -> list[Part]:
    """Those first whose 8 bits save most for a byte: a prefix of them is the best of its size, if losses add up."""
    return sorted(parts, key=lambda part: -part.loss / part.size)


class Ladder:
    """What forms between all of 4 bits and all of 8 will have, by those that were measured.

    Args:
        parts: in `order`; the first so many have 8 bits in a form.
        four: measures of all of 4 bits.
        eight: measures of all of 8 bits.
    """

    def __init__(self, parts: Sequence[Part], four: Mapping[str, float], eight: Mapping[str, float]) -> None:
        self.parts = list(parts)
        whole, size = sum(part.loss for part in parts), sum(part.size for part in parts)
        self.left, self.grown = [1.0], [0.0]
        """By how many have 8 bits: the share of the loss that is left, and of the bytes that are there."""
        for part in parts:
            self.left.append(self.left[-1] - part.loss / whole if whole else 0.0)
            self.grown.append(self.grown[-1] + part.size / size)
        self._ends = {0: dict(four), len(parts): dict(eight)}
        self._known = dict(self._ends)

    def learn(self, count: int, measures: Mapping[str, float]) -> None:
        """One more was measured."""
        self._known[count] = dict(measures)

    def expected(self, count: int) -> dict[str, float]:
        """Measures of the form whose first `count` parts have 8 bits: losses between the nearest two that are known, by
        what is left of them; all else between the ends, by bytes, times by bytes, too.
        """
        found = {}
        for name in self._ends[0]:
            if name == "loss":
                low = max(known for known in self._known if known <= count)
                high = min(known for known in self._known if known >= count)
                span = self.left[low] - self.left[high]
                share = (self.left[low] - self.left[count]) / span if span else 0.0
                found[name] = _between(self._known[low][name], self._known[high][name], share)
            else:
                four, eight = self._ends[0][name], self._ends[len(self.parts)][name]
                share = self.grown[count]
                found[name] = 1 / _between(1 / four, 1 / eight, share) if name in HIGH else _between(four, eight, share)
        return found

    def next(self, goals: Sequence[Goal], base: Mapping[str, float], steps: int = 64) -> tuple[int, float] | None:
        """The form that is expected to miss its goals least and was not measured, and by how much it is expected to; of
        those that are expected to miss none, the one that loses least. None: all were measured.
        """
        counts = {round(step * len(self.parts) / steps) for step in range(steps + 1)} - self._known.keys()
        judged = [
            (max(0.0, worst(goals, self.expected(count), base)), self.expected(count)["loss"], count)
            for count in counts
        ]
        if not judged:
            return None
        missed, _, count = min(judged)
        return count, missed


def _between(one: float, other: float, share: float) -> float:
    return one + (other - one) * share


def explain(points: Sequence[Point], base: Mapping[str, float]) -> list[str]:
    """Which form for size, for speed, for accuracy: sentences with these points' own numbers."""
    made = [point for point in points if point.steps]
    if not made:
        return []
    told = []
    for what, measure in (
        ("size", "size"),
        ("speed of one stream", "tokens_per_second"),
        ("many streams", "throughput"),
    ):
        best = min(made, key=lambda point: _low(point, measure))
        ratio = best.measures[measure] / base[measure]
        told.append(f"For {what}: {best.name}, {ratio:.2f} times the {measure} as it is; it loses {_loss(best)}.")
    best = min(made, key=lambda point: _low(point, "loss"))
    ratio = best.measures["size"] / base["size"]
    told.append(f"For accuracy: {best.name} loses {_loss(best)} at {ratio:.2f} times the size.")
    return told


def _loss(point: Point) -> str:
    low, high = point.loss_interval
    return f"{point.measures['loss']:+.2%} ({low:+.2%} to {high:+.2%})"
