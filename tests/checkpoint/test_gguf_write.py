from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from steelyard.checkpoint.gguf import GGUF, Value
from steelyard.checkpoint.gguf_encode import encode
from steelyard.checkpoint.gguf_write import Tensor, write

VALUES = np.arange(6 * 64, dtype=np.float32).reshape(6, 64) - 150
METADATA: dict[str, Value] = {
    "general.architecture": "llama",
    "flag": True,
    "other flag": False,
    "count": 70_000,
    "real": 0.5,
    "words": ["a", "", "é"],
    "none": [],
    "numbers": np.array([-1, 2], dtype="<i4"),
    "reals": np.array([0.25, -3], dtype="<f4"),
}


def tensors() -> list[Tensor]:
    return [
        Tensor("vector", "F32", (5,), lambda: [np.arange(5, dtype="<f4")]),
        Tensor("pieces", "Q8_0", (6, 64), lambda: (encode(VALUES[at : at + 2], "Q8_0") for at in range(0, 6, 2))),
        Tensor("small", "Q4_0", (6, 64), lambda: [encode(VALUES, "Q4_0")]),
        Tensor("cube", "BF16", (2, 3, 64), lambda: [encode(VALUES, "BF16")]),
    ]


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", METADATA, tensors())
    found = GGUF(tmp_path / "x.gguf")
    assert list(found.metadata) == list(METADATA)
    for key, value in METADATA.items():
        np.testing.assert_array_equal(found.metadata[key], value)
        assert isinstance(found.metadata[key], bool) == isinstance(value, bool)
    assert list(found.tensors) == ["vector", "pieces", "small", "cube"]
    np.testing.assert_array_equal(found.tensors["vector"].read(), np.arange(5))
    assert np.abs(found.tensors["pieces"].read() - VALUES).max() < 2
    np.testing.assert_array_equal(found.tensors["cube"].read().reshape(6, 64), VALUES)
    assert all(tensor.begin % 32 == 0 for tensor in found.tensors.values())
    assert (tmp_path / "x.gguf").stat().st_size % 32 == 0


def test_the_gguf_package_reads_it(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", METADATA, tensors())
    reader = GGUFReader(tmp_path / "x.gguf")
    for key, value in METADATA.items():
        np.testing.assert_array_equal(reader.fields[key].contents(), value)
    assert [(one.name, one.tensor_type.name, list(one.shape)) for one in reader.tensors] == [
        ("vector", "F32", [5]),
        ("pieces", "Q8_0", [64, 6]),
        ("small", "Q4_0", [64, 6]),
        ("cube", "BF16", [64, 3, 2]),
    ]


@pytest.mark.parametrize("rows", [5, 7])
def test_other_sizes_than_said_are_a_bug_that_leaves_nothing(tmp_path: Path, rows: int) -> None:
    wrong = Tensor("x", "F32", (6,), lambda: [np.zeros(rows, "<f4")])
    with pytest.raises(ValueError, match="'x' has"):
        write(tmp_path / "x.gguf", {}, [wrong])
    assert list(tmp_path.iterdir()) == []
