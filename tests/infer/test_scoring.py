"""The log-probabilities of prompts: the reference's, and the same to the bit however they are computed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from test_reproducible import BLOCK_BYTES, small
from transformers import AutoModelForCausalLM

from steelyard.errors import RequestError
from steelyard.infer.engine import Engine, EngineConfig
from steelyard.infer.request import Failure, Output, PromptLogprob, Request, Sampling

__all__ = ["small"]  # a fixture

Small = tuple[Path, dict[str, Path]]
PROMPT = [(13 * place) % 250 + 3 for place in range(150)]
SIZES = {
    "whole": EngineConfig(kv_bytes=400 * BLOCK_BYTES, logit_rows=256),
    "few-rows": EngineConfig(kv_bytes=400 * BLOCK_BYTES, max_running=3, logit_rows=5),
    "chunked": EngineConfig(kv_bytes=400 * BLOCK_BYTES, token_budget=23),
    "preempting": EngineConfig(kv_bytes=14 * BLOCK_BYTES, token_budget=40, max_running=9),
    "without-reuse": EngineConfig(kv_bytes=400 * BLOCK_BYTES, reuse=False, max_running=8, logit_rows=9),
}


def scored(engine: Engine, wanted: list[Request]) -> dict[tuple[str, int], tuple[list[PromptLogprob], list[int]]]:
    """Of every choice, what was said of its prompt, and its tokens."""
    found: dict[tuple[str, int], tuple[list[PromptLogprob], list[int]]] = {}
    ended: set[tuple[str, int]] = set()
    for output in engine.run(wanted):
        key = output.id, output.choice
        assert key not in ended
        prompt, tokens = found.setdefault(key, ([], []))
        assert output.prompt_logprobs is None or output.choice == 0
        assert not (output.prompt_logprobs and tokens), "the prompt comes first"
        prompt += output.prompt_logprobs or []
        tokens += output.tokens
        if output.choice:
            asked = next(request for request in wanted if request.id == output.id)
            if asked.sampling.prompt_logprobs is not None:
                assert len(found[output.id, 0][0]) == len(asked.prompt) - 1, "before any other choice"
        if output.finish_reason is not None:
            ended.add(key)
    engine.check_integrity()
    assert engine.pool.available == engine.pool.blocks
    return found


def test_they_are_the_references(tiny_model: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(torch.tensor([PROMPT])).logits[0].log_softmax(-1)[:-1]
    engine = Engine.load(tiny_model, config=EngineConfig(kv_bytes=1 << 24, token_budget=64), dtype=torch.float32)
    sampling = Sampling(max_tokens=3, temperature=0, prompt_logprobs=4, logit_bias={5: 100.0})
    prompt, tokens = scored(engine, [Request(id="a", prompt=PROMPT, sampling=sampling)])["a", 0]
    assert tokens == [5, 5, 5], "biases are for what is generated"
    assert [one.token for one in prompt] == PROMPT[1:]
    for place, one in enumerate(prompt):
        values, likeliest = expected[place].topk(4)
        assert one.logprob == pytest.approx(float(expected[place, one.token]), abs=1e-4)
        assert one.rank == 1 + int((expected[place] > expected[place, one.token]).sum())
        assert [token for token, _, _ in one.top] == likeliest.tolist()
        assert [value for _, _, value in one.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert one.text == engine.tokenizer.token_text(one.token)
        assert (one.token == one.top[0][0]) == (one.rank == 1)


def crowd() -> list[Request]:
    """Prompts that are scored and others, many of which begin alike; some only read, some with several choices."""
    draw, made = random.Random(4), []
    for number in range(14):
        prompt = PROMPT[: draw.choice([1, 2, 32, 33, 64, 100])] + [
            draw.randrange(3, 250) for _ in range(draw.randint(0, 30))
        ]
        sampling = Sampling(
            max_tokens=draw.choice([0, 1, 12, 40]),
            temperature=draw.choice([0.0, 1.0]),
            seed=number,
            prompt_logprobs=draw.choice([None, 0, 2]),
            ignore_eos=True,
        )
        adapter = draw.choice([None, None, "one"])
        made.append(
            Request(id=str(number), prompt=prompt, sampling=sampling, n=draw.choice([1, 1, 3]), adapter=adapter)
        )
    return made


@pytest.fixture(scope="module")
def alone(small: Small) -> dict[tuple[str, int], tuple[list[PromptLogprob], list[int]]]:
    engine = Engine.load(*small, SIZES["whole"])
    found = {}
    for request in crowd():
        engine.pool._secret = request.id.encode()  # nothing is found again
        found |= scored(engine, [request])
    return found


@pytest.mark.parametrize("size", SIZES)
def test_the_same_bits_in_any_chunks_and_crowds(
    small: Small, alone: dict[tuple[str, int], tuple[list[PromptLogprob], list[int]]], size: str
) -> None:
    engine = Engine.load(*small, SIZES[size])
    for seed in range(2):  # the second time, prompts are in the cache
        wanted = crowd()
        random.Random(seed).shuffle(wanted)
        assert scored(engine, wanted) == alone
    assert (engine.scheduler.preemptions > 0) == (size == "preempting")


def test_a_scored_prompt_is_computed_again_and_kept_for_others(small: Small) -> None:
    engine = Engine.load(*small, SIZES["whole"])

    def cached(**fields: int | None) -> int:
        sampling = Sampling(max_tokens=1, temperature=0, **fields)  # type: ignore[arg-type]
        (*_, last) = engine.run([Request(id="a", prompt=PROMPT, sampling=sampling)])
        return last.cached_tokens

    assert [cached(prompt_logprobs=0), cached(prompt_logprobs=0), cached()] == [0, 0, 128]


def test_reading_a_prompt_generates_nothing(small: Small) -> None:
    engine = Engine.load(*small, EngineConfig(kv_bytes=2 * BLOCK_BYTES))
    assert engine.context == 64
    read = Sampling(max_tokens=0, prompt_logprobs=0)
    (*_, last) = engine.run([Request(id="a", prompt=PROMPT[:64], sampling=read)])
    assert (last.tokens, last.text, last.finish_reason, last.completion_tokens) == ([], "", "length", 0)
    (only,) = engine.run([Request(id="a", prompt=[5], sampling=read)])
    assert (only.prompt_logprobs, only.finish_reason) == (None, "length"), "the first token has none"
    with pytest.raises(RequestError, match="65 tokens; the context holds 64"):
        engine.add(Request(id="a", prompt=PROMPT[:65], sampling=read))
    with pytest.raises(RequestError, match="64 tokens; the context holds 64"):
        engine.add(Request(id="a", prompt=PROMPT[:64], sampling=Sampling(max_tokens=1)))


def test_a_prompt_whose_logits_are_not_finite_fails(tiny_model: Path) -> None:
    engine = Engine.load(tiny_model, config=EngineConfig(kv_bytes=1 << 24), dtype=torch.float32)
    broken = engine.decoder.model.embed_tokens.weight.clone()
    broken[7] = float("nan")
    engine.decoder.model.embed_tokens.weight = torch.nn.Parameter(broken, requires_grad=False)
    engine.add(Request(id="a", prompt=[5, 7, 6, 9], sampling=Sampling(max_tokens=0, prompt_logprobs=1), n=2))
    outputs: list[Output | Failure] = []
    while engine.busy:
        outputs += engine.step()
    assert [type(output) for output in outputs] == [Failure]
    engine.check_integrity()
