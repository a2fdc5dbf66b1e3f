"""Goals, fronts and what to measure next: figures alone."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steelyard.compress import search
from steelyard.compress.search import Goal, Ladder, Part, Point
from steelyard.errors import ConfigError

BASE = {"loss": 0.0, "size": 200e6, "memory": 200e6, "tokens_per_second": 100.0, "throughput": 500.0, "latency": 0.1}


@pytest.mark.parametrize(
    ("text", "measure", "bound"),
    [
        ("tokens_per_second>=2x", "tokens_per_second", 200.0),
        ("throughput >= 900", "throughput", 900.0),
        ("size<=100MB", "size", 100e6),
        ("size<=40%", "size", 80e6),
        ("memory<=0.5x", "memory", 100e6),
        ("max_loss=1%", "loss", 0.01),
        ("loss<=0.02", "loss", 0.02),
        ("latency<=50ms", "latency", 0.05),
    ],
)
def test_goals(text: str, measure: str, bound: float) -> None:
    (goal,) = search.goals(text)
    assert (goal.measure, goal.bound(BASE)) == (measure, pytest.approx(bound))
    good = {**BASE, measure: bound * (1.1 if measure in search.HIGH else 0.9)}
    bad = {**BASE, measure: bound * (0.9 if measure in search.HIGH else 1.1)}
    assert goal.excess(good, BASE) == pytest.approx(-0.1)
    assert goal.excess(bad, BASE) == pytest.approx(0.1)
    assert goal.excess({**BASE, measure: math.nan}, BASE) == math.inf


@pytest.mark.parametrize(
    "text", ["speed>=2x", "size>=2MB", "throughput<=3", "size", "max_loss=1x", "size<=1.2.3MB", "size<=-3", "loss<=1%;"]
)
def test_what_is_no_goal(text: str) -> None:
    with pytest.raises(ConfigError, match=f"target '{text}'"):
        search.goals(f"max_loss=1%,{text}")


def point(name: str, **measures: float) -> Point:
    return Point(name=name, steps=[{"kind": name}], measures={**BASE, **measures})


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 6)), max_size=9))
def test_the_front_has_exactly_what_nothing_beats(values: list[tuple[int, int, int]]) -> None:
    points = [
        point(str(place), loss=float(loss), size=float(size), tokens_per_second=float(rate))
        for place, (loss, size, rate) in enumerate(values)
    ]
    found = search.front(points, ("loss", "size", "tokens_per_second"))
    for each, (loss, size, rate) in zip(points, values, strict=True):
        beaten = any(a <= loss and b <= size and c >= rate and (a, b, c) != (loss, size, rate) for a, b, c in values)
        assert (each in found) != beaten


PARTS = search.order(
    [Part(paths=(str(number),), loss=1.0 + number, size=1e6 * (1 + number % 3)) for number in range(12)]
)
FOUR = {**BASE, "loss": 0.04, "size": 90e6, "tokens_per_second": 400.0}
EIGHT = {**BASE, "loss": 0.001, "size": 140e6, "tokens_per_second": 250.0}


def test_layers_are_in_the_order_of_what_a_byte_saves() -> None:
    assert all(a.loss / a.size >= b.loss / b.size for a, b in pairwise(PARTS))


def test_a_ladder_goes_from_end_to_end() -> None:
    ladder = Ladder(PARTS, FOUR, EIGHT)
    steps = [ladder.expected(count) for count in range(len(PARTS) + 1)]
    for name in ("loss", "size", "tokens_per_second"):
        assert steps[0][name] == pytest.approx(FOUR[name])
        assert steps[-1][name] == pytest.approx(EIGHT[name])
        assert all((a[name] < b[name]) == (name == "size") for a, b in pairwise(steps))
    grown = sum(part.size for part in PARTS[:5]) / sum(part.size for part in PARTS)
    assert steps[5]["size"] == pytest.approx(90e6 + 50e6 * grown)
    assert 1 / steps[5]["tokens_per_second"] == pytest.approx((1 - grown) / 400 + grown / 250)
    ladder.learn(5, {**steps[5], "loss": 0.03})
    assert ladder.expected(5)["loss"] == pytest.approx(0.03)
    assert 0.03 < ladder.expected(3)["loss"] < 0.04


@given(st.floats(0.002, 0.039), st.floats(0.3, 1.0))
def test_what_is_next_is_the_best_that_is_expected(bound: float, bend: float) -> None:
    """Losses that bend away from the straight line are found all the same, in a few measurements."""
    ladder = Ladder(PARTS, FOUR, EIGHT)

    def truth(count: int) -> float:
        return 0.001 + 0.039 * max(0.0, ladder.left[count]) ** bend

    goals = (Goal(measure="loss", value=bound, relative=False, text=""),)
    smallest = min(count for count in range(len(PARTS) + 1) if truth(count) <= bound)
    size = Goal(measure="size", value=ladder.expected(smallest)["size"] * 1.0001, relative=False, text="")
    for _ in range(len(PARTS)):
        following = ladder.next((*goals, size), BASE)
        if following is None:
            break
        count = following[0]
        ladder.learn(count, {**ladder.expected(count), "loss": truth(count)})
        if truth(count) <= bound and size.excess(ladder.expected(count), BASE) <= 0:
            break
    assert smallest in (0, len(PARTS)) or smallest == count


def test_it_is_explained() -> None:
    points = [
        Point(name="as it is", steps=[], measures=BASE),
        point("small", size=50e6, loss=0.1),
        point("true", loss=0.001),
    ]
    told = search.explain(points, BASE)
    assert told[0].startswith("For size: small, 0.25 times the size as it is; it loses +10.00%")
    assert told[-1].startswith("For accuracy: true loses +0.10%")
    assert search.explain(points[:1], BASE) == []
