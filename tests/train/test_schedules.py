"""The learning rate over a run, against values worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steelyard.errors import ConfigError
from steelyard.train import schedules
from steelyard.train.schedules import ScheduleConfig


def factors(steps: int, **fields: object) -> list[float]:
    config = ScheduleConfig(**fields)  # type: ignore[arg-type]
    return [schedules.factor(config, step, steps) for step in range(steps)]


def test_by_hand() -> None:
    assert factors(4, name="constant", warmup=0) == [1, 1, 1, 1]
    assert factors(4, name="linear", warmup=0) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert factors(4, name="cosine", warmup=0) == pytest.approx(
        [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    )
    assert factors(5, name="linear", warmup=1) == pytest.approx([0.5, 1, 0.75, 0.5, 0.25])
    assert factors(5, name="constant", warmup=3) == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert factors(4, name="linear", warmup=0, floor=0.2) == pytest.approx([1, 0.8, 0.6, 0.4])
    assert factors(10, name="constant", warmup=0.2) == pytest.approx([1 / 3, 2 / 3] + [1] * 8)


@given(
    name=st.sampled_from(sorted(schedules.SHAPES)),
    warmup=st.floats(0, 0.99) | st.integers(1, 50).map(float),
    floor=st.floats(0, 1),
    steps=st.integers(1, 200),
)
def test_it_rises_then_never_rises_again(name: str, warmup: float, floor: float, steps: int) -> None:
    found = factors(steps, name=name, warmup=warmup, floor=floor)
    assert all(0 <= value <= 1 for value in found)
    assert found[0] > 0, "the first step moves"
    peak = found.index(max(found))
    assert found[:peak] == sorted(found[:peak])
    rest = found[math.ceil(warmup if warmup >= 1 else warmup * steps) :]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rest))


@pytest.mark.parametrize(
    "fields", [{"name": "step"}, {"warmup": -1}, {"warmup": math.nan}, {"floor": 1.5}, {"floor": math.nan}]
)
def test_what_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="schedule"):
        schedules.check(ScheduleConfig(**fields))  # type: ignore[arg-type]
