from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from steelyard.checkpoint import bfloat16, safetensors
from steelyard.errors import ArtifactError


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), span: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.arange(3, dtype=np.float16),
        "byte": np.array(7, dtype=np.uint8),
        "empty": np.zeros((0, 4), dtype=np.int64),
        "flag": np.array([True, False]),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "np"})
    found = safetensors.read(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)
    assert safetensors.read_metadata(tmp_path / "x.safetensors") == {"format": "np"}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    path = tmp_path / "x.safetensors"
    tensors: list[Any] = [
        ("byte", "U8", (3,), b"abc"),
        ("pieces", "BF16", (3, 4), lambda: (bfloat16.to_bits(row) for row in values)),
        ("whole", "F32", (4, 3), values.T),
        ("later", "I64", (2,), lambda: np.array([1, -1])),
    ]
    safetensors.write(path, tensors, {"format": "pt"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("pieces").float().numpy().tolist() == values.tolist()
        assert file.get_tensor("whole").numpy().tolist() == values.T.tolist()
        assert file.get_tensor("later").tolist() == [1, -1]
        assert bytes(file.get_tensor("byte").tolist()) == b"abc"
    for info in safetensors.read_header(path).values():
        assert info.begin % safetensors.DTYPES[info.dtype].itemsize == 0


def test_writing_holds_one_piece_at_a_time(tmp_path: Path) -> None:
    piece = np.zeros(1 << 18, dtype=np.uint16)
    tracemalloc.start()
    safetensors.write(
        tmp_path / "x.safetensors",
        [(f"t{i}", "BF16", (1 << 20,), lambda: (piece.copy() for _ in range(4))) for i in range(8)],
        {},
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "x.safetensors").stat().st_size > 16 << 20
    assert peak < 3 << 20


@pytest.mark.parametrize("content", [b"abc", b"abcde", [b"ab", b"cde"]])
def test_wrong_length_leaves_no_file(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ValueError, match="'x' has"):
        safetensors.write(tmp_path / "x.safetensors", [("x", "U8", (4,), lambda: content)], {})
    assert list(tmp_path.iterdir()) == []


def test_twice_the_same_name_is_our_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="twice"):
        safetensors.write(tmp_path / "x", [("x", "U8", (1,), b"a"), ("x", "U8", (1,), b"a")], {})


BAD_HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "not json": (b"{", b"", "not valid JSON"),
    "not an object": (b"[]", b"", "not a JSON object"),
    "deep": (b"[" * 200_000, b"", "not valid JSON"),
    "many": (b"[" + b"0," * 4_000_001 + b"0]", b"", "values"),
    "duplicate": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},' * 1 + b'"a":{}}', b"", "twice"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "fields": ({"x": {"dtype": "F32"}}, b"", "tensor 'x' must have"),
    "extra field": ({"x": entry() | {"code": 1}}, b"\0" * 8, "tensor 'x' must have"),
    "dtype": ({"x": entry("OBJECT")}, b"\0" * 8, "tensor 'x' has a dtype"),
    "dtype list": ({"x": entry() | {"dtype": []}}, b"\0" * 8, "tensor 'x' has a dtype"),
    "shape": ({"x": entry(shape=(-1, -2))}, b"\0" * 8, "tensor 'x' has a shape"),
    "float shape": ({"x": entry(shape=(2.0,))}, b"\0" * 8, "tensor 'x' has a shape"),
    "bool shape": ({"x": entry(shape=(True, 2))}, b"\0" * 8, "tensor 'x' has a shape"),
    "many dimensions": ({"x": entry(shape=[1] * 40 + [2])}, b"\0" * 8, "tensor 'x' has a shape"),
    "overflow": ({"x": entry(shape=(1 << 62, 1 << 62))}, b"\0" * 8, "tensor 'x' spans"),
    "span": ({"x": entry(span=(0, 4))}, b"\0" * 4, "tensor 'x' spans 4 bytes"),
    "three": ({"x": entry(span=(0, 8, 8))}, b"\0" * 8, "data_offsets"),
    "backwards": ({"x": entry(span=(8, 0))}, b"\0" * 8, "outside"),
    "outside": ({"x": entry(span=(8, 16))}, b"\0" * 8, "tensor 'x' lies outside"),
    "overlap": ({"x": entry(), "y": entry(span=(4, 12))}, b"\0" * 12, "tensor 'y' overlaps"),
    "hole": ({"x": entry(), "y": entry(span=(12, 20))}, b"\0" * 20, "tensor 'y' leaves a hole"),
    "hole first": ({"x": entry(span=(4, 12))}, b"\0" * 12, "tensor 'x' leaves a hole"),
    "tail": ({"x": entry()}, b"\0" * 9, "1 bytes after"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_lies_are_refused_by_name(tmp_path: Path, case: str) -> None:
    header, data, message = BAD_HEADERS[case]
    with pytest.raises(ArtifactError, match=message) as caught:
        safetensors.read_header(raw_file(tmp_path / "x.safetensors", header, data))
    assert "x.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("claim", [1 << 30, 1 << 63, (1 << 64) - 1])
def test_a_claimed_length_costs_nothing(tmp_path: Path, claim: int) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", claim) + b"{}")
        file.truncate(2 << 30)  # sparse: the claim of 1 GB is even inside the file
    tracemalloc.start()
    with pytest.raises(ArtifactError):
        safetensors.read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ArtifactError, match="cannot be read"):
            safetensors.read_header(path)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "x.safetensors"
    safetensors.write(
        path, [("a", "F32", (2, 2), b"\1" * 16), ("b", "BF16", (3,), b"\2" * 6), ("c", "U8", (0,), b"")], {"k": "v"}
    )
    return path.read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_an_artifact_error_or_harmless(tmp_path: Path, valid: bytes, data: st.DataObject) -> None:
    raw = bytearray(valid)
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    tracemalloc.start()
    with contextlib.suppress(ArtifactError):
        for values in safetensors.read(path).values():
            values.sum()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_every_truncation_is_refused(tmp_path: Path, valid: bytes) -> None:
    path = tmp_path / "x.safetensors"
    for length in range(len(valid)):
        path.write_bytes(valid[:length])
        with pytest.raises(ArtifactError):
            safetensors.read_header(path)


def test_library_agrees_on_bfloat16(tmp_path: Path) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    values = bfloat16.from_bits(bits)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(bfloat16.to_bits(values)[number], bits[number])
    assert np.isnan(bfloat16.from_bits(bfloat16.to_bits(values[~number]))).all()


@given(st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=50))
def test_rounding_is_torchs(values: list[float]) -> None:
    import torch

    ours = bfloat16.from_bits(bfloat16.to_bits(np.array(values, dtype=np.float32)))
    np.testing.assert_array_equal(ours, torch.tensor(values, dtype=torch.float32).bfloat16().float().numpy())


def test_load_file_reads_a_written_file(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "x.safetensors", [("a", "F32", (), np.array(2.5, dtype=np.float32))], {})
    assert load_file(tmp_path / "x.safetensors")["a"] == 2.5
