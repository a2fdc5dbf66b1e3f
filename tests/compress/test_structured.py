"""Structures that go: what is left says what the whole said without them, and scores are what they mean."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from families import make
from steelyard.checkpoint import manifest
from steelyard.compress.prune import structured
from steelyard.compress.prune.decoders import PruneConfig
from steelyard.compress.prune.structured import Structure
from steelyard.data.packing import Pack, pack
from steelyard.data.rows import TokenRow
from steelyard.errors import ConfigError
from steelyard.models import config as configs
from steelyard.models import weights
from steelyard.models.attention import PackedAttention
from steelyard.models.decoder import Block, Decoder
from steelyard.stages.compress import prune

FAMILIES = ["smollm", "llama2", "llama-biases", "qwen2-window", "qwen3", "mistral", "gemma3"]
STRUCTURES: list[Structure] = ["blocks", "heads", "neurons"]


def batches() -> list[Pack]:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(97, (length,), generator=draw).tolist() for length in (12, 30, 20)]
    return [pack([TokenRow(tokens=row, trained=[True] * len(row)) for row in part]) for part in (rows[:2], rows[2:])]


def logits(decoder: Decoder) -> torch.Tensor:
    token_ids = torch.randint(97, (40,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return decoder.logits(decoder(token_ids, torch.arange(40), PackedAttention([40])))


def without(decoder: Decoder, structure: Structure, gone: list[list[int]]) -> Decoder:
    """The same decoder with what some parts add set to 0; `gone` by block."""
    left = copy.deepcopy(decoder)
    share = decoder.config.heads // decoder.config.kv_heads * decoder.config.head_width
    for number, block in enumerate(left.model.layers):
        assert isinstance(block, Block)
        for part in gone[number]:
            if structure == "neurons":
                block.mlp.down_proj.weight[:, part] = 0
            else:
                block.self_attn.o_proj.weight[:, part * share : (part + 1) * share] = 0
    return left


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_is_left_says_what_the_whole_said_without_it(tmp_path: Path, family: str, structure: Structure) -> None:
    make(tmp_path / "base", family, num_hidden_layers=4)
    decoder = weights.load(tmp_path / "base", torch.float32)
    shape = {"blocks": (4,), "heads": (4, 2), "neurons": (4, 80)}[structure]
    found = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    smaller, fields = structured.cut(decoder, structure, 0.5, found)
    if structure == "blocks":
        expected = copy.deepcopy(decoder)
        kept = sorted(found.topk(2).indices.tolist())
        expected.model.layers = torch.nn.ModuleList(decoder.model.layers[number] for number in kept)
        assert fields["num_hidden_layers"] == 2
        assert smaller.config.windows == tuple(decoder.config.windows[number] for number in kept)
    else:
        left = 1 if structure == "heads" else 64
        gone = [row.argsort()[: len(row) - left].tolist() for row in found]
        expected = without(decoder, structure, gone)
    torch.testing.assert_close(logits(smaller), logits(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_say_what_the_loss_does(tmp_path: Path, structure: Structure) -> None:
    """Against the loss itself, with what one part adds made a little smaller, in float64."""
    make(tmp_path / "base", "smollm")
    decoder = weights.load(tmp_path / "base", torch.float32)
    found = structured.scores(decoder, structure, "gradient", batches())
    wide = copy.deepcopy(decoder).double()
    step, share = 1e-4, decoder.config.heads // decoder.config.kv_heads * decoder.config.head_width

    def loss(scale: float, number: int, part: int) -> float:
        changed = copy.deepcopy(wide)
        block = changed.model.layers[number]
        assert isinstance(block, Block)
        if structure == "neurons":
            block.mlp.down_proj.weight[:, part] *= scale
        elif structure == "heads":
            block.self_attn.o_proj.weight[:, part * share : (part + 1) * share] *= scale
        else:
            block.register_forward_hook(lambda layer, inputs, output: inputs[0] + scale * (output - inputs[0]))
        total = 0.0
        with torch.no_grad():
            for batch in batches():
                states = changed(batch.token_ids, batch.positions, PackedAttention(batch.lengths))
                given = changed.logits(states[batch.places])
                total += float(F.cross_entropy(given, batch.targets, reduction="sum"))
        return total

    for number, part in ((0, 0), (2, 1)):
        slope = (loss(1 + step, number, part) - loss(1 - step, number, part)) / (2 * step)
        ours = found[number] if structure == "blocks" else found[number, part]
        assert float(ours) == pytest.approx(abs(slope), rel=0.02, abs=1e-3)


def test_activations_say_how_far_a_block_turns(tmp_path: Path) -> None:
    make(tmp_path / "base", "llama2")
    decoder = weights.load(tmp_path / "base", torch.float32)
    block = decoder.model.layers[1]
    seen: list[torch.Tensor] = []
    handle = block.register_forward_hook(lambda layer, inputs, output: seen.extend((inputs[0], output)))
    with torch.no_grad():
        for batch in batches():
            decoder(batch.token_ids, batch.positions, PackedAttention(batch.lengths))
    handle.remove()
    pairs = zip(seen[::2], seen[1::2], strict=True)
    turned = sum(
        float((1 - (a.double() * b).sum(1) / (a.double().norm(dim=1) * b.norm(dim=1))).sum()) for a, b in pairs
    )
    assert float(structured.scores(decoder, "blocks", "activation", batches())[1]) == pytest.approx(turned, rel=1e-4)


@pytest.mark.parametrize("structure", ["heads", "neurons"])
def test_activations_say_how_much_is_added(tmp_path: Path, structure: Structure) -> None:
    make(tmp_path / "base", "smollm")
    decoder = weights.load(tmp_path / "base", torch.float32)
    block = decoder.model.layers[2]
    assert isinstance(block, Block)
    last = block.self_attn.o_proj if structure == "heads" else block.mlp.down_proj
    seen: list[torch.Tensor] = []
    handle = last.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for batch in batches():
            decoder(batch.token_ids, batch.positions, PackedAttention(batch.lengths))
    handle.remove()
    part = slice(24, 48) if structure == "heads" else slice(1, 2)
    added = torch.cat(seen)[:, part].double() @ last.weight[:, part].double().T
    found = structured.scores(decoder, structure, "activation", batches())
    assert float(found[2, 1]) == pytest.approx(float(added.norm(dim=1).sum()), rel=1e-4)


@pytest.mark.parametrize("family", ["smollm", "qwen2-window", "qwen3", "gemma3"])
@pytest.mark.parametrize(
    ("structure", "method"),
    [
        *((each, method) for each in STRUCTURES for method in ("activation", "gradient")),
        ("blocks", "divergence"),
        ("blocks", "even"),
    ],
)
def test_the_smaller_model_is_one_for_everybody(
    tmp_path: Path, tiny_tokenizer_folder: Path, family: str, structure: Structure, method: Any
) -> None:
    make(tmp_path / "base", family, num_hidden_layers=4, vocab_size=512)
    for file in tiny_tokenizer_folder.iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "The user asks {number} times."}}\n' for number in range(20)))
    config = PruneConfig(method=method, structure=structure, rate=0.5)
    prune(tmp_path / "base", tmp_path / "small", config, data=None if method == "even" else rows, accept=True)
    small = weights.load(tmp_path / "small", torch.float32)
    recipe: Any = manifest.verify(tmp_path / "small").recipe["compress"]
    assert (recipe["structure"], recipe["method"]) == (structure, method)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    token_ids = torch.randint(97, (40,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = theirs(token_ids[None]).logits[0]
    torch.testing.assert_close(logits(small), expected, rtol=1e-3, atol=1e-3)
    assert small.config.windows == configs.load(tmp_path / "small").windows


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (PruneConfig(method="activation"), "structures are judged by activation or gradient"),
        (PruneConfig(method="wanda", structure="blocks"), "structures are judged by activation or gradient"),
        (PruneConfig(method="divergence", structure="heads"), "divergence is for blocks"),
        (PruneConfig(method="gradient", structure="heads", pattern="2:4"), "structures have no pattern"),
        (PruneConfig(method="gradient", structure="blocks", rate=0.9), "rate 0.9 of 2 blocks leaves 0"),
    ],
)
def test_what_does_not_go_together(tiny_model: Path, tmp_path: Path, config: PruneConfig, complaint: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "The user asks."}\n')
    with pytest.raises(ConfigError, match=complaint):
        prune(tiny_model, tmp_path / "small", config, data=rows)
    assert not (tmp_path / "small").exists()
