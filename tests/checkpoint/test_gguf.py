from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf_writer import (
    ARRAY,
    BOOL,
    F32,
    F64,
    FORMS,
    I32,
    STRING,
    TYPES,
    U8,
    U32,
    U64,
    GGUFSpec,
    TensorSpec,
    array,
    f32,
    pair,
    text,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steelyard.checkpoint.gguf import GGUF, MAX_OBJECTS
from steelyard.errors import ArtifactError

VALUES = np.arange(64, dtype=np.float32).reshape(2, 32)


def small() -> GGUFSpec:
    pairs = [
        pair("general.architecture", STRING, "llama"),
        pair("flag", BOOL, True),
        pair("real", F64, 0.5),
        array("numbers", I32, [-1, 2, 3]),
        array("words", STRING, ["a", "", "é"]),
        text("nested") + struct.pack("<IIQ", ARRAY, ARRAY, 2) + struct.pack("<IQB", U8, 1, 7) * 2,
    ]
    tensors = [
        f32("plain", VALUES),
        TensorSpec("half", TYPES["F16"], (3,), np.array([1, 2, 3], "<f2").tobytes()),
        TensorSpec("quantised", TYPES["Q8_0"], (2, 32), (struct.pack("<e", 0.5) + bytes(range(32))) * 2),
    ]
    return GGUFSpec(pairs, tensors)


def test_reads_metadata_and_tensors(tmp_path: Path) -> None:
    for version in (2, 3):
        spec = small()
        spec.version = version
        gguf = GGUF(spec.write(tmp_path / "x.gguf"))
        assert gguf.metadata["general.architecture"] == "llama"
        assert gguf.metadata["flag"] is True
        assert gguf.metadata["real"] == 0.5
        assert gguf.metadata["numbers"].tolist() == [-1, 2, 3]  # type: ignore[union-attr]
        assert gguf.metadata["words"] == ["a", "", "é"]
        assert [inner.tolist() for inner in gguf.metadata["nested"]] == [[7], [7]]  # type: ignore[union-attr]
        np.testing.assert_array_equal(gguf.tensors["plain"].read(), VALUES)
        np.testing.assert_array_equal(gguf.tensors["plain"].read_rows(1, 9), VALUES[1:])
        assert gguf.tensors["half"].read().tolist() == [1, 2, 3]
        np.testing.assert_array_equal(gguf.tensors["quantised"].read()[1], np.arange(32) / 2)


def test_every_scalar_type(tmp_path: Path) -> None:
    spec = GGUFSpec([pair(f"k{kind}", kind, 1) for kind in FORMS])
    metadata = GGUF(spec.write(tmp_path / "x.gguf")).metadata
    assert all(value == 1 for value in metadata.values())
    assert len(metadata) == len(FORMS)


def test_alignment_is_honoured(tmp_path: Path) -> None:
    spec = small()
    spec.alignment = 256
    spec.pairs.append(pair("general.alignment", U32, 256))
    gguf = GGUF(spec.write(tmp_path / "x.gguf"))
    assert all(tensor.begin % 256 == 0 for tensor in gguf.tensors.values())
    np.testing.assert_array_equal(gguf.tensors["plain"].read(), VALUES)


def bad(**changes: object) -> GGUFSpec:
    spec = small()
    for name, value in changes.items():
        setattr(spec, name, value)
    return spec


def with_tensor(tensor: TensorSpec) -> GGUFSpec:
    return GGUFSpec([], [tensor])


def with_pair(raw: bytes) -> GGUFSpec:
    return GGUFSpec([raw], [f32("x", VALUES)])


HUGE = 1 << 63
LIES: dict[str, tuple[GGUFSpec, str]] = {
    "magic": (bad(magic=b"GGML"), "no GGUF file"),
    "version": (bad(version=1), "version 1"),
    "big endian": (bad(version=3 << 24), "big-endian"),
    "tensor count": (bad(tensor_count=HUGE), "claims 9223372036854775808 tensors"),
    "tensor count in reach": (bad(tensor_count=9), "cut short|lies|claims"),
    "pair count": (bad(pair_count=HUGE), "metadata keys"),
    "pair count in reach": (bad(pair_count=7), "type|claims|ends"),
    "key length": (with_pair(struct.pack("<Q", HUGE) + b"k"), "for a metadata key"),
    "string length": (with_pair(text("k") + struct.pack("<IQ", STRING, HUGE) + b"v"), "ends inside metadata 'k'"),
    "string length minus one": (with_pair(text("k") + struct.pack("<IQ", STRING, (1 << 64) - 1)), "ends inside"),
    "not utf-8": (with_pair(text("k") + struct.pack("<I", STRING) + text(b"\xff")), "not UTF-8 in metadata 'k'"),
    "key not utf-8": (with_pair(text(b"\xff") + struct.pack("<IB", U8, 1)), "not UTF-8"),
    "value type": (with_pair(text("k") + struct.pack("<I", 13)), "unknown type 13"),
    "boolean": (with_pair(text("k") + struct.pack("<IB", BOOL, 2)), "boolean"),
    "array type": (with_pair(text("k") + struct.pack("<IIQ", ARRAY, 99, 1)), "unknown type 99"),
    "array of numbers": (with_pair(text("k") + struct.pack("<IIQ", ARRAY, F32, HUGE)), "ends inside metadata 'k'"),
    "array of bytes": (with_pair(text("k") + struct.pack("<IIQ", ARRAY, U8, 1 << 32)), "ends inside metadata 'k'"),
    "array of strings": (with_pair(text("k") + struct.pack("<IIQ", ARRAY, STRING, HUGE)), "elements in metadata 'k'"),
    "array of arrays": (with_pair(text("k") + struct.pack("<IIQ", ARRAY, ARRAY, HUGE)), "elements in metadata 'k'"),
    "nesting": (with_pair(text("k") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 3000), "nests"),
    "key twice": (bad(pairs=[pair("k", U8, 1), pair("k", U8, 1)]), "'k' twice"),
    "alignment zero": (with_pair(pair("general.alignment", U32, 0)), "alignment"),
    "alignment odd": (with_pair(pair("general.alignment", U32, 48)), "alignment"),
    "alignment huge": (with_pair(pair("general.alignment", U64, HUGE)), "alignment"),
    "alignment text": (with_pair(pair("general.alignment", STRING, "32")), "alignment"),
    "no dimensions": (with_tensor(TensorSpec("x", 0, (), b"\0" * 4)), "0 dimensions"),
    "five dimensions": (with_tensor(TensorSpec("x", 0, (1,) * 5, b"\0" * 4)), "5 dimensions"),
    "zero dimension": (with_tensor(TensorSpec("x", 0, (4, 0), b"\0" * 4)), "tensor 'x' the shape"),
    "huge dimension": (with_tensor(TensorSpec("x", 0, (HUGE,), b"\0" * 4)), "tensor 'x' the shape"),
    "overflowing product": (with_tensor(TensorSpec("x", 0, (1 << 32, 1 << 32), b"\0" * 4)), "tensor 'x' the shape"),
    "lying size": (with_tensor(TensorSpec("x", 0, (2, 32), b"\0" * 252)), "ends inside tensor 'x'"),
    "lying quantised size": (with_tensor(TensorSpec("x", 3, (4, 32), b"\0" * 60)), "ends inside tensor 'x'"),
    "part of a block": (with_tensor(TensorSpec("x", 8, (2, 31), b"\0" * 68)), "multiple of Q8_0's 32"),
    "other type": (with_tensor(TensorSpec("x", 10, (256,), b"\0" * 84)), "as Q2_K; read are F32, F16, Q4_0"),
    "unknown type": (with_tensor(TensorSpec("x", 4000, (32,), b"\0" * 128)), "unknown type 4000"),
    "unaligned": (with_tensor(TensorSpec("x", 0, (4,), b"\0" * 64, offset=16)), "not aligned"),
    "offset outside": (with_tensor(TensorSpec("x", 0, (4,), b"\0" * 16, offset=1 << 40)), "ends inside tensor 'x'"),
    "offset overflow": (with_tensor(TensorSpec("x", 0, (4,), b"\0" * 16, offset=(1 << 64) - 32)), "ends inside"),
    "overlap": (
        GGUFSpec([], [f32("x", VALUES), TensorSpec("y", 0, (8,), b"\0" * 32, offset=32)]),
        "tensor 'y' overlapping",
    ),
    "same span": (GGUFSpec([], [f32("x", VALUES), TensorSpec("y", 0, (8,), b"", offset=0)]), "overlapping"),
    "tensor twice": (GGUFSpec([], [f32("x", VALUES), f32("x", VALUES)]), "tensor 'x' twice"),
    "long name": (with_tensor(f32("x" * 5000, VALUES)), "for a tensor's name"),
}


@pytest.mark.parametrize("case", LIES)
def test_lies_are_refused_by_name(tmp_path: Path, case: str) -> None:
    spec, message = LIES[case]
    path = spec.write(tmp_path / "bad.gguf")
    tracemalloc.start()
    with pytest.raises(ArtifactError, match=message) as caught:
        GGUF(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "bad.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert peak < 1 << 20


def test_too_many_strings(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    count = MAX_OBJECTS + 1
    start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", ARRAY, STRING, count)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + 8 * count)
    tracemalloc.start()
    with pytest.raises(ArtifactError, match="elements"):
        GGUF(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_missing_empty_and_folder(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    for path in (tmp_path / "none.gguf", tmp_path / "empty.gguf", tmp_path):
        with pytest.raises(ArtifactError, match=path.name):
            GGUF(path)


def test_truncation_at_and_around_every_boundary(tmp_path: Path) -> None:
    sections = small().sections()
    whole, boundary, path = b"".join(sections), 0, tmp_path / "x.gguf"
    for section in sections:
        boundary += len(section)
        for length in {boundary - 1, boundary, boundary + 1}:
            if length < len(whole):
                path.write_bytes(whole[: max(length, 0)])
                with pytest.raises(ArtifactError):
                    GGUF(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_an_artifact_error_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(b"".join(small().sections()))
    header = len(raw) - 400
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, header))
        raw[at] = data.draw(st.sampled_from([0, 1, 2, 8, 9, 127, 128, 255]) | st.integers(0, 255))
    raw = raw[: data.draw(st.just(len(raw)) | st.integers(0, len(raw)))]
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    with contextlib.suppress(ArtifactError):
        for tensor in GGUF(path).tensors.values():
            assert tensor.read().shape == tensor.shape
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_opening_fits_in_a_small_address_space(tmp_path: Path) -> None:
    """The whole table of lies, in a process that may not take 64 MB more than it has after its imports."""
    for number, (spec, _) in enumerate(LIES.values()):
        spec.write(tmp_path / f"{number}.gguf")
    program = """
import resource, sys
from pathlib import Path
from steelyard.checkpoint.gguf import GGUF
from steelyard.errors import ArtifactError
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
for path in Path(sys.argv[1]).glob("*.gguf"):
    try:
        GGUF(path)
    except ArtifactError:
        continue
    sys.exit(f"{path} was believed")
"""
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
