"""Every type that is written against a scalar float64 reference and against the gguf package."""

from __future__ import annotations

import math

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from steelyard.checkpoint.gguf_blocks import BLOCK_TYPES
from steelyard.checkpoint.gguf_encode import ENCODERS, NUMBERS, encode, fits, keep
from steelyard.errors import CheckpointError, ConfigError


def values(rows: int = 40, columns: int = 96) -> np.ndarray:
    random = np.random.default_rng(1)
    found = random.normal(size=(rows, columns)) * np.exp(random.normal(size=(rows, 1)) * 3)
    found[3] = 0
    found[5] = 1e-42  # below float32's normal numbers
    found[6, :32] = np.arange(32) - 16  # halves, where rounding has to choose
    return found.astype(np.float32)


def decoded(records: np.ndarray, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    return BLOCK_TYPES[NUMBERS[kind]].decode(records).reshape(shape)


def half_away(value: float) -> int:
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def scalar(kind: str, block: np.ndarray) -> list[float]:
    """What a block becomes, value by value."""
    numbers = [float(value) for value in block]
    widest = max(numbers, key=abs)
    scale = abs(widest) / 127 if kind == "Q8_0" else widest / -8
    stored = float(np.float16(scale))
    if scale == 0:
        return [0.0] * 32
    if kind == "Q8_0":
        return [stored * half_away(value / scale) for value in numbers]
    return [stored * (min(15, math.floor(value / scale + 8.5)) - 8) for value in numbers]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_integers_are_those_of_the_format(kind: str) -> None:
    given = values()
    found = decoded(encode(given, kind), kind, given.shape).reshape(-1, 32)
    steps = np.abs(given.reshape(-1, 32)).max(axis=1) / (127 if kind == "Q8_0" else 8)
    for row, (block, step) in enumerate(zip(given.reshape(-1, 32), steps, strict=True)):
        expected = np.array(scalar(kind, block))
        off = np.abs(found[row] - expected) > 1e-3 * step
        # float32 may fall on the other side where the quotient lies between two integers to its last bit.
        assert off.sum() <= 1, (row, found[row], expected)


@pytest.mark.parametrize("kind", ENCODERS)
def test_bytes_are_those_of_the_gguf_package(kind: str) -> None:
    given = values()
    given = np.delete(given, 5, axis=0)  # where the package divides by 0
    expected = quants.quantize(given, GGMLQuantizationType[kind])
    assert encode(given, kind).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16"])
def test_what_a_type_holds_comes_back(kind: str) -> None:
    given = np.array([[0, 1, -2.5, 0.15625, 3e4]], dtype=np.float32)
    given = decoded(encode(given, kind), kind, given.shape)
    np.testing.assert_array_equal(decoded(encode(given, kind), kind, given.shape), given)


@pytest.mark.parametrize(("kind", "least", "most"), [("Q8_0", -127, 127), ("Q8_0", -8, 7), ("Q4_0", -8, 7)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_integers_that_are_there_are_kept(kind: str, least: int, most: int, groups: int) -> None:
    random = np.random.default_rng(2)
    integers = random.integers(least, most + 1, (6, 128), dtype=np.int8)
    scales = random.uniform(0.001, 0.1, (6, groups)).astype(np.float32)
    found = decoded(keep(integers, scales, kind), kind, integers.shape)
    rounded = scales.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found, integers * np.repeat(rounded, 128 // groups, axis=1))


def test_where_integers_fit() -> None:
    assert fits(8, 64, "Q8_0")
    assert fits(4, 32, "Q8_0")
    assert fits(4, 96, "Q4_0")
    assert not fits(8, 64, "Q4_0")
    assert not fits(4, 16, "Q4_0")
    assert not fits(4, 48, "Q8_0")
    assert not fits(8, 64, "F16")


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_refused(kind: str, bad: float) -> None:
    given = values()
    given[7, 40] = bad
    with pytest.raises(CheckpointError, match="not finite"):
        encode(given, kind)


def test_what_float16_does_not_hold_is_refused() -> None:
    given = values()
    given[0, 0] = 1e6
    with pytest.raises(ConfigError, match=r"up to 1e\+06.*choose bf16 or f32"):
        encode(given, "F16")
    encode(given, "Q8_0")
    with pytest.raises(ConfigError, match="float16"):
        encode(given * np.float32(1e6), "Q4_0")
