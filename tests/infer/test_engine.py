"""The engine against transformers: the same greedy tokens, whatever the batch, the chunks and the preemptions."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from steelyard.infer.engine import Engine, EngineConfig
from steelyard.infer.request import Output, Request, Sampling

SIZES = {
    "roomy": EngineConfig(kv_bytes=1 << 24),
    "chunked": EngineConfig(kv_bytes=1 << 24, block_size=4, token_budget=7, max_running=5),
    "preempting": EngineConfig(kv_bytes=24 * 4 * 512, block_size=4, max_running=20),  # 24 blocks
}


@pytest.mark.parametrize("size", SIZES)
def test_twenty_prompts_equal_transformers(tiny_model: Path, size: str) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    engine = Engine.load(tiny_model, config=SIZES[size], dtype=torch.float32)
    draw = random.Random(3)
    prompts = [[draw.randrange(3, 250) for _ in range(draw.randint(1, 40))] for _ in range(20)]
    sampling = Sampling(max_tokens=12, temperature=0, ignore_eos=True)
    tokens: dict[str, list[int]] = {str(index): [] for index in range(20)}
    waiting = [Request(id=str(index), prompt=prompt, sampling=sampling) for index, prompt in enumerate(prompts)]
    while waiting or engine.busy:
        for _ in range(min(3, len(waiting))):  # arrivals in the middle
            engine.add(waiting.pop(0))
        for output in engine.step():
            assert isinstance(output, Output)
            tokens[output.id] += output.tokens
        engine.check_integrity()
    assert (engine.scheduler.preemptions > 0) == (size == "preempting")
    assert engine.pool.available == engine.pool.blocks
    for index, prompt in enumerate(prompts):
        row = prompt.copy()
        with torch.no_grad():
            for _ in range(12):
                row.append(int(reference(torch.tensor([row])).logits[0, -1].argmax()))
        assert tokens[str(index)] == row[len(prompt) :]
