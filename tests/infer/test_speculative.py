"""Guessing changes the speed alone: the same tokens, texts and log-probabilities with it and without."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_reproducible import BLOCK_BYTES, small

from steelyard.compress.quantize import layout
from steelyard.errors import CheckpointError
from steelyard.infer.decoding.draft_model import DraftModel
from steelyard.infer.decoding.speculative import FIRST_REST, LONGEST, Confidence, plan_lengths
from steelyard.infer.engine import Engine, EngineConfig
from steelyard.infer.request import FinishReason, Output, Request, Sampling, TokenLogprob
from steelyard.models import weights
from steelyard.models.head_tokens import FILE as TOKENS

__all__ = ["small"]  # a fixture

ROOMY = EngineConfig(kv_bytes=400 * BLOCK_BYTES)
CROWDS = {
    "roomy": ROOMY,
    "chunked": EngineConfig(kv_bytes=400 * BLOCK_BYTES, token_budget=11, max_running=6),
    "preempting": EngineConfig(kv_bytes=20 * BLOCK_BYTES, max_running=9),
    "few-rows": EngineConfig(kv_bytes=400 * BLOCK_BYTES, max_running=4, logit_rows=6, reuse=False),
}
Small = tuple[Path, dict[str, Path]]


@dataclass
class Answer:
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None


def answers(engine: Engine, wanted: list[Request], arrivals: random.Random | None = None) -> dict[str, list[Answer]]:
    found = {request.id: [Answer() for _ in range(request.n)] for request in wanted}
    waiting = list(wanted)
    while waiting or engine.busy:
        for _ in range(len(waiting) if arrivals is None else arrivals.randint(0, 3)):
            if waiting:
                engine.add(waiting.pop(0))
        for output in engine.step():
            assert isinstance(output, Output)
            answer = found[output.id][output.choice]
            assert answer.finish is None, "nothing comes after the end"
            assert output.tokens
            answer.text += output.text
            answer.tokens += output.tokens
            answer.logprobs += output.logprobs or []
            answer.finish = output.finish_reason
            assert output.completion_tokens == len(answer.tokens)
        engine.check_integrity()
    assert engine.pool.available == engine.pool.blocks
    assert all(answer.finish for choices in found.values() for answer in choices)
    if engine.speculation is not None:
        assert not engine.speculation._confidence, "nobody is remembered after his end"
        if isinstance(proposer := engine.speculation.proposer, DraftModel):
            proposer.pool.check_integrity([])
            assert proposer.pool.available == proposer.pool.blocks
    return found


def requests(count: int = 24) -> list[Request]:
    """Every field that a draw or an end depends on; many prompts repeat themselves, many begin alike."""
    draw = random.Random(11)
    shared = [draw.randrange(3, 250) for _ in range(66)]
    made = []
    for number in range(count):
        phrase = [draw.randrange(3, 250) for _ in range(draw.randint(1, 6))]
        prompt = shared[: draw.choice([0, 0, 40, 66])] + phrase * draw.randint(1, 8)
        sampling = Sampling(
            max_tokens=draw.randint(1, 60),
            temperature=draw.choice([0.0, 0.0, 0.4, 1.0]),
            top_k=draw.choice([0, 5]),
            seed=number,
            frequency_penalty=draw.choice([0.0, 0.0, 0.3]),
            presence_penalty=draw.choice([0.0, 0.0, 1.0]),
            logit_bias=draw.choice([{}, {}, {phrase[0]: 4.0}, {2: 8.0}]),
            stop=draw.choice([(), (), ("e", "th"), (" w",)]),
            ignore_eos=draw.random() < 0.7,
            logprobs=draw.choice([None, None, 2]),
        )
        adapter, n = draw.choice([None, None, None, "one", "two"]), draw.choice([1, 1, 1, 3])
        made.append(Request(id=str(number), prompt=prompt, sampling=sampling, adapter=adapter, n=n))
    return made


@pytest.fixture(scope="module")
def drafts(small: Small, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The first of the tiny model's two layers, as it is and in int8, both also with half of the tokens; and the int8
    model itself.
    """
    folder = tmp_path_factory.mktemp("drafts")
    dense, packed = folder / "dense", folder / "int8"
    shutil.copytree(tiny_model, dense)
    tensors = load_file(dense / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    save_file(kept, dense / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    packed.mkdir()
    layout.write(weights.load(dense, torch.float32), packed, dense)
    found = {"dense": dense, "int8": packed, "itself": small[0]}
    for name in ("dense", "int8"):
        half = found[f"{name}-half"] = folder / f"{name}-half"
        shutil.copytree(found[name], half)
        (half / TOKENS).write_text(json.dumps({"tokens": list(range(0, config["vocab_size"], 2))}))
    return found


@pytest.fixture(scope="module")
def plain(small: Small) -> dict[str, list[Answer]]:
    """One by one and without guesses."""
    engine = Engine.load(*small, msgspec.structs.replace(ROOMY, speculate="off", reuse=False))
    assert engine.speculation is None
    found = {}
    for request in requests():
        found |= answers(engine, [request])
    assert engine.stats().drafted_tokens == 0
    return found


@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize("draft", [None, "dense", "int8", "dense-half", "int8-half"])
def test_the_same_answers(
    small: Small, drafts: dict[str, Path], plain: dict[str, list[Answer]], crowd: str, draft: str | None
) -> None:
    engine = Engine.load(*small, CROWDS[crowd], draft=None if draft is None else drafts[draft])
    for seed in range(2):  # the second time prompts are found in the cache
        wanted = requests()
        random.Random(seed).shuffle(wanted)
        assert answers(engine, wanted, random.Random(seed)) == plain
    stats = engine.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert (stats.preemptions > 0) == (crowd == "preempting")
    assert (stats.cached_tokens > 0) == CROWDS[crowd].reuse
    assert stats.generated_tokens == 2 * sum(len(one.tokens) for choices in plain.values() for one in choices)
    assert (stats.running, stats.waiting, stats.used_blocks) == (0, 0, 0)


def test_a_draft_that_is_the_model_itself_is_always_right(small: Small, drafts: dict[str, Path]) -> None:
    engine = Engine.load(*small, ROOMY, draft=drafts["itself"])
    assert engine.speculation is not None
    assert isinstance(engine.speculation.proposer, DraftModel)
    assert engine.speculation.proposer.share == 1
    engine.speculation.proposer.share = 0.1  # or it would not pay
    for seed, temperature in enumerate((0.0, 1.0)):
        sampling = Sampling(max_tokens=100, temperature=temperature, seed=seed, ignore_eos=True, presence_penalty=0.5)
        answers(engine, [Request(id="a", prompt=[5, 6, 7], sampling=sampling)])
    stats = engine.stats()
    assert stats.accepted_tokens == stats.drafted_tokens > 120


def test_runs_that_are_right_take_few_steps_and_end_where_they_must(small: Small) -> None:
    """With one token forced, every guess is right; an answer still ends at its last token."""
    engine = Engine.load(*small, EngineConfig(kv_bytes=3 * BLOCK_BYTES, max_running=1))
    assert engine.context == 96

    def ask(prompt: int, max_tokens: int, **fields: object) -> Answer:
        sampling = Sampling(temperature=0, logit_bias={9: 1e6}, max_tokens=max_tokens, **fields)  # type: ignore[arg-type]
        return answers(engine, [Request(id="a", prompt=[9] * prompt, sampling=sampling)])["a"][0]

    for length in (1, 2, 5, 40):
        before = engine.stats().steps
        answer = ask(10, length)
        assert (answer.tokens, answer.finish) == ([9] * length, "length")
        assert engine.stats().steps - before <= 1 + max(1, length / 2.5)
    assert ask(50, 100).tokens == [9] * 46, "the context ends it"
    text = engine.tokenizer.token_text(9)
    cut = ask(10, 40, stop=(text * 7,))
    assert (cut.text, cut.finish, len(cut.tokens)) == ("", "stop", 7)
    ended = ask(10, 40, stop_token_ids=(9,))
    assert (ended.text, ended.finish, ended.tokens) == ("", "stop", [9])


def test_a_request_can_turn_it_off(small: Small) -> None:
    engine = Engine.load(*small, ROOMY)
    sampling = Sampling(max_tokens=40, temperature=0, logit_bias={9: 1e6})
    for speculate in (False, True):
        answers(engine, [Request(id="a", prompt=[9] * 9, sampling=sampling, speculate=speculate)])
        assert (engine.stats().drafted_tokens > 0) == speculate


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_repeating_prompt(small: Small, data: st.DataObject) -> None:
    on, off = pair(small)
    few = st.integers(3, 8)
    parts = data.draw(st.lists(st.tuples(st.lists(few, min_size=1, max_size=5), st.integers(1, 6)), min_size=1))
    prompt = [token for phrase, times in parts for token in phrase * times][:200]
    sampling = Sampling(
        max_tokens=data.draw(st.integers(1, 40)),
        temperature=data.draw(st.sampled_from([0.0, 0.3, 1.0])),
        logit_bias=dict.fromkeys(range(3, 9), data.draw(st.sampled_from([0.0, 5.0]))),
        frequency_penalty=data.draw(st.sampled_from([0.0, 0.2])),
        seed=data.draw(st.integers(0, 5)),
        ignore_eos=data.draw(st.booleans()),
    )
    request = Request(id="a", prompt=prompt, sampling=sampling, n=data.draw(st.integers(1, 2)))
    assert answers(on, [request]) == answers(off, [request])


_pairs: list[tuple[Engine, Engine]] = []


def pair(small: Small) -> tuple[Engine, Engine]:
    """The same two engines for all examples."""
    if not _pairs:
        off = msgspec.structs.replace(ROOMY, speculate="off")
        _pairs.append((Engine.load(small[0], config=ROOMY), Engine.load(small[0], config=off)))
    return _pairs[0]


def test_drafts_that_do_not_fit_are_refused(
    small: Small, drafts: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(drafts["dense"], other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="has another vocabulary than the model"):
        Engine.load(small[0], draft=other)
    larger = tmp_path / "larger"
    shutil.copytree(drafts["dense"], larger)
    tensors = load_file(larger / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:5]])
    save_file(tensors, larger / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((larger / "config.json").read_text())
    (larger / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 5}))
    with pytest.raises(CheckpointError, match="another vocabulary"):
        Engine.load(small[0], draft=larger)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        Engine.load(small[0], draft=tmp_path / "none")
    for tokens in ([], [3, 2], [2, 2], [-1], [100_000], ["a"], 5):
        (other / TOKENS).write_text(json.dumps({"tokens": tokens}))
        shutil.copy(drafts["dense"] / "tokenizer.json", other / "tokenizer.json")
        with pytest.raises(CheckpointError, match=r"draft_tokens\.json"):
            Engine.load(small[0], draft=other)
    with pytest.raises(CheckpointError, match="a draft needs a model in int8 or bfloat16"):
        Engine.load(tiny_model, draft=drafts["dense"], dtype=torch.float32)


def test_a_model_without_a_plan_does_not_guess(tiny_model: Path) -> None:
    assert Engine.load(tiny_model, dtype=torch.float32).speculation is None


def test_how_far_to_guess() -> None:
    sure, good, poor = 0.95, 0.6, 0.1
    assert plan_lengths([(sure, 50)], 1, 100, 1.0) == [LONGEST]
    assert plan_lengths([(sure, 3)], 1, 100, 1.0) == [3], "no further than is of use"
    assert plan_lengths([(sure, 50)], 1, 2, 1.0) == [2], "no further than there is room"
    assert 1 <= plan_lengths([(good, 50)], 1, 100, 1.0)[0] <= 4
    assert plan_lengths([(poor, 50)], 1, 100, 1.0) == [0]
    assert plan_lengths([(good, 50)] * 32, 32, 100, 1.0) == [0] * 32, "a crowd fills the step by itself"
    assert sum(plan_lengths([(sure, 50)] * 32, 32, 1000, 1.0)) > 0, "unless it is sure"
    assert plan_lengths([(0.99, 50)] * 256, 256, 1000, 1.0) == [0] * 256
    assert plan_lengths([(poor, 9), (good, 9), (sure, 9)], 3, 4, 1.0) == [0, 1, 3], "the surest first"
    dear = plan_lengths([(0.8, 50)], 1, 100, 3.0)[0]
    assert 0 < dear < plan_lengths([(0.8, 50)], 1, 100, 1.0)[0], "guesses that cost more go less far"


def test_who_is_wrong_rests_longer_and_longer() -> None:
    confidence = Confidence(right=1.2)
    assert confidence.rate == pytest.approx(0.6)
    confidence.observe(3, 0)
    first = confidence.rate
    assert first < 0.6
    assert confidence.rest == FIRST_REST
    confidence.observe(1, 0)
    assert confidence.rest == 2 * FIRST_REST
    confidence.observe(4, 2)
    assert (confidence.rest, confidence.patience) == (FIRST_REST, FIRST_REST)
    for _ in range(20):
        confidence.observe(5, 5)
    assert confidence.rate > 0.97
