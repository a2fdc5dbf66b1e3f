"""A state that was cut off or altered, anywhere, is found out, and the one before it taken (RELIABILITY 3)."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from steelyard.train import state

MUTATIONS = 500


def write_two(folder: Path) -> None:
    for step in (5, 10):
        tensors = {"master.w": torch.full((40, 7), float(step)), "random": torch.get_rng_state()}
        state.save(folder, step, tensors, {"loader": {"epoch": step}})


def mutate(content: bytes, draw: random.Random) -> bytes:
    """One bit flipped, a part cut off, moved, repeated or zeroed."""
    kind = draw.choice(["flip", "truncate", "empty", "append", "zero", "swap"])
    place = draw.randrange(len(content))
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]
    if kind == "truncate":
        return content[:place]
    if kind == "empty":
        return b""
    if kind == "append":
        return content + content[place:][: draw.randint(1, 64)]
    if kind == "zero":
        return content[:place] + bytes(min(16, len(content) - place)) + content[place + 16 :]
    half = len(content) // 2
    return content[half:] + content[:half]


def test_every_mutation_is_found_out(tmp_path: Path) -> None:
    whole, draw = tmp_path / "whole", random.Random(0)
    write_two(whole)
    newest = whole / "step-00000010"
    seen = 0
    while seen < MUTATIONS:
        file = draw.choice(sorted(path.name for path in newest.iterdir()))
        content = (newest / file).read_bytes()
        changed = mutate(content, draw)
        if changed == content:
            continue
        seen += 1
        folder = tmp_path / "changed"
        shutil.copytree(whole, folder)
        (folder / newest.name / file).write_bytes(changed)
        found = state.load(folder)
        assert found is not None, (file, seen)
        tensors, info = found
        assert info["step"] == 5, (file, seen)
        assert float(tensors["master.w"][0, 0]) == 5.0
        assert not (folder / newest.name).exists()
        shutil.rmtree(folder)


@pytest.mark.parametrize("missing", ["tensors.safetensors", "state.json", state.SUMS])
def test_a_file_that_is_gone(tmp_path: Path, missing: str) -> None:
    write_two(tmp_path)
    (tmp_path / "step-00000010" / missing).unlink()
    found = state.load(tmp_path)
    assert found is not None
    assert found[1]["step"] == 5


def test_states_from_a_step_on_are_forgotten(tmp_path: Path) -> None:
    write_two(tmp_path)
    found = state.load(tmp_path, before=10)
    assert found is not None
    assert found[1]["step"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert state.load(tmp_path, before=5) is None
    assert state.load(tmp_path / "none") is None
