"""What each part matters, against the plain way: change it, run everything, compare."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from test_rounding import batches

from families import make
from steelyard.compress import sensitivity
from steelyard.compress.inputs import linears
from steelyard.compress.quantize import grid
from steelyard.data.packing import Pack
from steelyard.models import weights
from steelyard.models.attention import PackedAttention
from steelyard.models.decoder import Decoder


def scores(decoder: Decoder, batch: Pack) -> torch.Tensor:
    with torch.no_grad():
        states = decoder(batch.token_ids, batch.positions, PackedAttention(batch.lengths))
        return decoder.logits(states[batch.places]).double().log_softmax(-1)


def divergence(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("family", ["smollm", "qwen3"])
def test_layers_and_blocks(tmp_path: Path, family: str) -> None:
    make(tmp_path, family)
    decoder = weights.load(tmp_path, torch.float32)
    given, kept = batches(), copy.deepcopy(decoder.state_dict())
    told: list[tuple[int, int]] = []

    def change(weight: torch.Tensor) -> torch.Tensor:
        return grid.rounded(weight, 4, None).restored()

    found = sensitivity.of_layers(decoder, given, change, lambda done, of: told.append((done, of)))
    whole, layers = scores(decoder, given[0]), linears(decoder.model.layers)
    assert len(found) == len(layers)
    assert told == [(number + 1, len(decoder.model.layers)) for number in range(len(decoder.model.layers))]
    for name, layer in layers.items():
        before = layer.weight.data
        layer.weight.data = change(before)
        expected = divergence(whole, scores(decoder, given[0]))
        assert found[f"model.layers.{name}"] == pytest.approx(expected, rel=1e-3, abs=3e-7)
        layer.weight.data = before
    blocks = sensitivity.of_blocks(decoder, given)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in decoder.state_dict().items())
    every = decoder.model.layers
    for number in range(len(every)):
        decoder.model.layers = torch.nn.ModuleList(block for place, block in enumerate(every) if place != number)
        assert blocks[number] == pytest.approx(divergence(whole, scores(decoder, given[0])), rel=1e-3)
