"""Packed weights are kept on disk: found again, never believed when they do not fit, never in the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from steelyard.compress.quantize import layout
from steelyard.infer.engine import Engine
from steelyard.infer.packed import packed_file
from steelyard.infer.request import Request, Sampling
from steelyard.infer.runner import PlanRunner
from steelyard.kernels import library
from steelyard.models import weights

pytestmark = pytest.mark.skipif(library.load() is None, reason="no native kernels: nothing is packed")


@pytest.fixture
def checkpoint(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEELYARD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "int8").mkdir()
    layout.write(weights.load(tiny_model, torch.float32), tmp_path / "int8", tiny_model)
    return tmp_path / "int8"


def tokens(engine: Engine) -> list[int]:
    request = Request(id="1", prompt=[1, 2, 3], sampling=Sampling(max_tokens=20, temperature=0, ignore_eos=True))
    return [token for output in engine.run([request]) for token in output.tokens]


def test_the_second_start_finds_them(checkpoint: Path) -> None:
    first = Engine.load(checkpoint)
    file = packed_file(checkpoint)
    assert file.is_file()
    written = file.stat().st_ino
    second = Engine.load(checkpoint)
    assert file.stat().st_ino == written, "packed again"
    assert tokens(first) == tokens(second)
    assert isinstance(second.runner, PlanRunner)
    assert all(buffer.is_meta for buffer in second.decoder.buffers()), "the plain weights are still held"


@pytest.mark.parametrize("damage", ["empty", "truncated", "another"])
def test_a_file_that_does_not_fit_is_replaced(checkpoint: Path, damage: str) -> None:
    expected = tokens(Engine.load(checkpoint))
    file = packed_file(checkpoint)
    whole = file.read_bytes()
    if damage == "another":
        from safetensors.torch import save_file

        save_file({"model.embed_tokens.data": torch.zeros(3, dtype=torch.uint8)}, file)
    else:
        file.write_bytes(b"" if damage == "empty" else whole[: len(whole) // 2])
    assert tokens(Engine.load(checkpoint)) == expected
    assert file.read_bytes() == whole


def test_other_weights_have_another_file(checkpoint: Path) -> None:
    before = packed_file(checkpoint)
    os.utime(checkpoint / "model.safetensors", ns=(1, 1))
    assert packed_file(checkpoint) != before


def test_one_that_nobody_has_used_for_long_goes(checkpoint: Path) -> None:
    Engine.load(checkpoint)
    stale, used = packed_file(checkpoint), packed_file(checkpoint).with_name("used.safetensors")
    used.write_bytes(stale.read_bytes())
    os.utime(stale, (1, 1))
    os.utime(checkpoint / "model.safetensors", ns=(1, 1))
    Engine.load(checkpoint)
    assert used.exists()
    assert not stale.exists()


def test_a_cache_that_cannot_be_written_is_no_obstacle(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert tokens(Engine.load(checkpoint))
