"""Beams in the engine against transformers, whatever the batch, the chunks, the preemptions and the neighbours."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from steelyard.compress.quantize.decoders import QuantizeConfig
from steelyard.errors import RequestError
from steelyard.infer.engine import Engine, EngineConfig
from steelyard.infer.request import Beam, Output, Request, Sampling
from steelyard.stages.compress import quantize

SIZES = {
    "roomy": EngineConfig(kv_bytes=1 << 24),
    "chunked": EngineConfig(kv_bytes=1 << 24, block_size=4, token_budget=7, max_running=9, reuse=False),
    "preempting": EngineConfig(kv_bytes=24 * 4 * 512, block_size=4, max_running=20),  # 24 blocks
    "hardly any": EngineConfig(kv_bytes=14 * 4 * 512, block_size=4, max_running=8),
}


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    draw = random.Random(3)
    return [[draw.randrange(3, 250) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def asked(number: int, prompt: list[int], width: int = 4, n: int = 2, **fields: Any) -> Request:
    beam = fields.pop("beam", Beam(width=width))
    sampling = Sampling(**{"max_tokens": 10, "temperature": 0, **fields})
    return Request(id=str(number), prompt=prompt, n=n, beam=beam, sampling=sampling)


def collect(engine: Engine, requests: list[Request]) -> dict[tuple[str, int], Output]:
    """Run with arrivals in the middle; the integrity is checked after each step."""
    waiting, found = list(requests), {}
    while waiting or engine.busy:
        for _ in range(min(3, len(waiting))):
            engine.add(waiting.pop(0))
        for output in engine.step():
            assert isinstance(output, Output)
            if output.finish_reason is not None:
                found[output.id, output.choice] = output
        engine.check_integrity()
    assert engine.pool.available == engine.pool.blocks
    return found


@pytest.mark.parametrize("size", SIZES)
def test_twenty_prompts_equal_transformers(tiny_model: Path, size: str) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    engine = Engine.load(tiny_model, config=SIZES[size], dtype=torch.float32)
    given = prompts(20, 12 if size == "hardly any" else 40)
    plain = Request(id="plain", prompt=given[0], sampling=Sampling(max_tokens=20, temperature=0, ignore_eos=True))
    found = collect(engine, [*(asked(number, prompt) for number, prompt in enumerate(given)), plain])
    assert (engine.scheduler.preemptions > 0) == (size in ("preempting", "hardly any"))
    ends = sorted(engine.tokenizer.eos_ids)
    for number, prompt in enumerate(given):
        made = reference.generate(
            torch.tensor([prompt]),
            num_beams=4,
            num_return_sequences=2,
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for choice, (row, score) in enumerate(zip(made.sequences, made.sequences_scores.tolist(), strict=True)):
            output = found[str(number), choice]
            assert output.tokens == row[len(prompt) : len(prompt) + len(output.tokens)].tolist()
            assert output.score == pytest.approx(score, abs=1e-3)
            assert output.completion_tokens == len(output.tokens)


def test_the_same_beside_others_and_alone(tiny_model: Path, tmp_path: Path) -> None:
    """By a plan, whose rows are the same bits in any company; others are as they are without beams."""
    quantize(tiny_model, tmp_path / "int8", QuantizeConfig(), accept=True)
    given = prompts(12)
    engine = Engine.load(tmp_path / "int8")
    beams = [asked(number, prompt, width=3, n=3) for number, prompt in enumerate(given[:6])]
    others = [
        Request(id=str(number), prompt=prompt, sampling=Sampling(max_tokens=12, seed=number))
        for number, prompt in enumerate(given[6:], 6)
    ]
    mixed = [request for pair in zip(beams, others, strict=True) for request in pair]
    together = collect(engine, mixed)
    small = Engine.load(tmp_path / "int8", config=EngineConfig(token_budget=33, max_running=4, reuse=False))
    for request in mixed:
        alone = collect(small, [request])
        for key, output in alone.items():
            assert (output.text, output.score) == (together[key].text, together[key].score)
            assert output.tokens == together[key].tokens or request.beam is None


def test_searches_that_take_each_others_place(tiny_model: Path) -> None:
    """Widths that together are more than may run, of two projects, with hardly any blocks: all come to their end."""
    config = EngineConfig(kv_bytes=9 * 4 * 512, block_size=4, max_running=4, reuse=False)
    engine = Engine.load(tiny_model, config=config, dtype=torch.float32)
    requests = [
        msgspec.structs.replace(asked(number, prompt, width=3, n=1, max_tokens=14), project=f"p{number % 2}")
        for number, prompt in enumerate(prompts(12, 9))
    ]
    waiting, ended, steps = list(requests), 0, 0
    while waiting or engine.busy:
        if waiting and steps % 2 == 0:
            engine.add(waiting.pop(0))
        ended += sum(isinstance(output, Output) and output.finish_reason is not None for output in engine.step())
        engine.check_integrity()
        steps += 1
        assert steps < 5000, "nothing goes on any more"
    assert ended == 12
    assert engine.scheduler.preemptions > 0


def test_what_comes_back(tiny_model: Path) -> None:
    """The best first; what was kept and did not come back is counted in the last output."""
    engine = Engine.load(tiny_model, dtype=torch.float32)
    outputs = list(engine.run([asked(0, [5, 6, 7], width=4, n=3)]))
    assert [output.choice for output in outputs] == [0, 1, 2]
    scores = [output.score for output in outputs]
    assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]
    assert [output.timeline is not None for output in outputs] == [False, False, True]
    assert [output.rejected_tokens > 0 for output in outputs] == [False, False, True]
    told = sum(output.completion_tokens for output in outputs) + outputs[-1].rejected_tokens
    assert told <= 4 * max(output.completion_tokens for output in outputs)
    for output in outputs:
        assert output.text == engine.tokenizer.decode(output.tokens)


def test_aborted_on_the_way(tiny_model: Path) -> None:
    engine = Engine.load(tiny_model, dtype=torch.float32)
    engine.add(asked(0, [5, 6, 7]))
    for _ in range(4):
        engine.step()
    aborted = engine.abort("0")
    assert aborted is not None
    assert aborted.completion_tokens == [4] * 4
    assert not engine.busy
    engine.check_integrity()
    assert engine.pool.available == engine.pool.blocks


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"width": 65}, "beam_width"),
        ({"width": 0}, "beam_width"),
        ({"width": 2, "n": 3}, "n"),
        ({"beam": Beam(width=4, groups=3)}, "num_beam_groups"),
        ({"beam": Beam(width=4, length_penalty=1e9)}, "length_penalty"),
        ({"beam": Beam(width=4, diversity=-1.0)}, "diversity_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_p": 0.5}, "top_p"),
        ({"temperature": 0.5}, "temperature"),
        ({"stop": ("x",)}, "stop"),
        ({"logprobs": 1}, "logprobs"),
    ],
)
def test_refused_by_name(tiny_model: Path, fields: dict[str, Any], param: str) -> None:
    engine = Engine.load(tiny_model, dtype=torch.float32)
    with pytest.raises(RequestError) as caught:
        engine.add(asked(0, [5], **fields))
    assert caught.value.param == param
    assert not engine.busy
