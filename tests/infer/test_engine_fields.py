"""What a request can ask of the engine, field by field, and what each leaves behind."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import make
from steelyard.errors import CheckpointError, RequestError
from steelyard.infer.engine import Engine, EngineConfig
from steelyard.infer.request import Failure, FinishReason, Output, Request, Sampling, TokenLogprob
from steelyard.models import lora, weights
from steelyard.models.lora import Adapter
from steelyard.text.tokenizer import Tokenizer

PROMPT = [40, 41, 42, 43]
GREEDY = Sampling(max_tokens=12, temperature=0, ignore_eos=True)


@dataclass
class Choice:
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None


def collect(engine: Engine, *requests: Request) -> dict[tuple[str, int], Choice]:
    found: dict[tuple[str, int], Choice] = {}
    for output in engine.run(requests):
        choice = found.setdefault((output.id, output.choice), Choice())
        assert choice.finish is None, "nothing comes after the end"
        choice.text += output.text
        choice.tokens += output.tokens
        choice.logprobs += output.logprobs or []
        choice.finish = output.finish_reason
        assert output.completion_tokens == len(choice.tokens)
    engine.check_integrity()
    assert engine.pool.available == engine.pool.blocks
    return found


def one(engine: Engine, sampling: Sampling, prompt: list[int] = PROMPT, adapter: str | None = None) -> Choice:
    return collect(engine, Request(id="a", prompt=prompt, sampling=sampling, adapter=adapter))["a", 0]


def sampling(**fields: object) -> Sampling:
    return Sampling(**{"max_tokens": 12, "ignore_eos": True, **fields})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return Engine.load(tiny_model, config=EngineConfig(kv_bytes=1 << 24), dtype=torch.float32)


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2-window", "qwen3", "gemma3", "gemma3-linear"])
def test_families_generate_what_transformers_generates(
    tmp_path: Path, tiny_tokenizer_folder: Path, family: str
) -> None:
    reference = make(tmp_path, family)
    config = EngineConfig(kv_bytes=1 << 24, block_size=4, token_budget=16)
    engine = Engine(weights.load(tmp_path, torch.float32), Tokenizer.load(tiny_tokenizer_folder), config=config)
    draw = random.Random(5)
    prompts = [[draw.randrange(97) for _ in range(draw.randint(1, 40))] for _ in range(6)]
    requests = [Request(id=str(place), prompt=prompt, sampling=GREEDY) for place, prompt in enumerate(prompts)]
    found = collect(engine, *requests)
    for place, prompt in enumerate(prompts):
        expected = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert found[str(place), 0].tokens == expected[0, len(prompt) :].tolist()


def test_the_end_token_ends_and_is_counted(engine: Engine) -> None:
    free = one(engine, GREEDY)
    assert (free.finish, len(free.tokens)) == ("length", 12)
    end = min(engine.tokenizer.eos_ids)
    # Its logit is lifted above all others from the first token on.
    biased = one(engine, Sampling(max_tokens=12, temperature=0, logit_bias={end: 1e6}))
    assert (biased.tokens, biased.text, biased.finish) == ([end], "", "stop")
    on = one(engine, sampling(temperature=0, logit_bias={end: 1e6}, max_tokens=3))
    assert (on.tokens, on.finish) == ([end] * 3, "length")


def test_stop_tokens(engine: Engine) -> None:
    free = one(engine, GREEDY)
    place = next(p for p in range(3, 12) if free.tokens[p] not in free.tokens[:p])
    cut = one(engine, sampling(temperature=0, stop_token_ids=(free.tokens[place],)))
    assert (cut.tokens, cut.finish) == (free.tokens[: place + 1], "stop")
    assert free.text.startswith(cut.text), "the stop token's text is no part of it"


def test_stop_strings_end_the_text_before_them(engine: Engine) -> None:
    free = one(engine, sampling(temperature=0, max_tokens=40))
    for begin in range(1, len(free.text) - 4, 3):
        stop = free.text[begin : begin + 3]
        cut = one(engine, sampling(temperature=0, max_tokens=40, stop=("never said", stop)))
        assert cut.finish == "stop"
        assert cut.text == free.text[: free.text.index(stop)]
        assert cut.tokens == free.tokens[: len(cut.tokens)]


def test_choices_differ_and_a_seed_repeats_them(engine: Engine) -> None:
    request = Request(id="a", prompt=PROMPT, sampling=sampling(seed=11), n=4)
    first = collect(engine, request)
    others = [
        Request(id=str(place), prompt=[50 + place] * (place + 1), sampling=sampling(seed=place)) for place in range(7)
    ]
    crowded = collect(engine, *others[:3], request, *others[3:])
    assert len({tuple(choice.tokens) for choice in first.values()}) == 4
    assert all(crowded[key].tokens == choice.tokens for key, choice in first.items())
    alone = collect(engine, Request(id="a", prompt=PROMPT, sampling=sampling(seed=11)))
    assert alone["a", 0].tokens == first["a", 0].tokens, "a choice does not depend on how many there are"
    unseeded = [one(engine, sampling()).tokens for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_logprobs_are_the_models_own(engine: Engine, tiny_model: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    bias = {7: 3.0}
    found = one(engine, sampling(seed=3, temperature=0.7, top_k=20, logit_bias=bias, logprobs=3))
    row = torch.tensor([PROMPT + found.tokens])
    with torch.no_grad():
        expected = reference(row).logits[0].log_softmax(-1)[len(PROMPT) - 1 : -1]
    assert len(found.logprobs) == 12
    for place, entry in enumerate(found.logprobs):
        assert entry.token == found.tokens[place]
        assert entry.logprob == pytest.approx(float(expected[place, entry.token]), abs=1e-4)
        values, tokens = expected[place].topk(3)
        assert [token for token, _, _ in entry.top] == tokens.tolist()
        assert [value for _, _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert entry.text == engine.tokenizer.token_text(entry.token)
    assert one(engine, GREEDY).logprobs == []


def test_penalties_count_what_was_generated_and_not_the_prompt(engine: Engine) -> None:
    token = one(engine, GREEDY).tokens[0]
    strong = one(engine, sampling(temperature=0, presence_penalty=1e6, max_tokens=40))
    assert len(set(strong.tokens)) == 40, "nothing is said twice"
    kept = one(engine, sampling(temperature=0, presence_penalty=1e6), prompt=[*PROMPT[:-1], PROMPT[-1]])
    assert kept.tokens[0] == token, "the prompt's tokens are not penalised"
    often = one(engine, sampling(temperature=0, logit_bias={9: 100.0}, frequency_penalty=30.0, max_tokens=6))
    assert 1 <= often.tokens.count(9) <= 4


def test_the_context_ends_a_choice(tiny_model: Path) -> None:
    size = EngineConfig(kv_bytes=10 * 4 * 512, block_size=4)  # 10 blocks of 4 tokens
    engine = Engine.load(tiny_model, config=size, dtype=torch.float32)
    assert engine.context == 40
    cut = one(engine, sampling(temperature=0, max_tokens=100), prompt=[5] * 30)
    assert (len(cut.tokens), cut.finish) == (10, "length")
    with pytest.raises(RequestError, match="40 tokens; the context holds 40") as refused:
        engine.add(Request(id="b", prompt=[5] * 40))
    assert (refused.value.param, refused.value.code) == ("prompt", "context_length_exceeded")


def test_an_abort_frees_everything_at_once(engine: Engine) -> None:
    engine.add(Request(id="a", prompt=PROMPT * 10, sampling=GREEDY, n=3))
    engine.add(Request(id="b", prompt=PROMPT, sampling=GREEDY))
    for _ in range(3):
        engine.step()
    engine.abort("a")
    engine.abort("a")
    engine.abort("never there")
    engine.check_integrity()
    tokens: list[int] = []
    while engine.busy:
        for output in engine.step():
            assert isinstance(output, Output)
            assert output.id == "b"
            tokens += output.tokens
    assert engine.pool.available == engine.pool.blocks
    assert one(engine, GREEDY).tokens[-len(tokens) :] == tokens, "the others go on as if nothing had been"


def test_abort_of_what_waits_and_of_what_was_preempted(tiny_model: Path) -> None:
    size = EngineConfig(kv_bytes=16 * 4 * 512, block_size=4, max_running=8)
    engine = Engine.load(tiny_model, config=size, dtype=torch.float32)
    for number in range(8):
        engine.add(Request(id=str(number), prompt=[20 + number] * 12, sampling=sampling(max_tokens=30)))
    while not engine.scheduler.preemptions:
        engine.step()
    waiting = [sequence.request.id for sequence in engine.scheduler.waiting]
    assert waiting
    for number in range(8):
        engine.abort(str(number))
        engine.check_integrity()
    assert not engine.busy
    assert engine.step() == []
    assert engine.pool.available == engine.pool.blocks


def test_rows_wear_their_adapters_in_one_batch(tiny_model: Path, tmp_path: Path) -> None:
    decoder = weights.load(tiny_model, torch.float32)
    adapters: dict[str, Path] = {}
    for number, (name, rank, targets) in enumerate(
        [("small", 2, ("q_proj", "v_proj")), ("large", 8, ("up_proj", "down_proj", "o_proj"))]
    ):
        generator = torch.Generator().manual_seed(number)
        adapter = Adapter.create(decoder, rank=rank, alpha=2.0 * rank, targets=targets, generator=generator)
        for _, b in adapter.pairs.values():
            b.normal_(0, 0.3, generator=generator)
        adapters[name] = tmp_path / name
        adapters[name].mkdir()
        adapter.save(adapters[name], str(tiny_model))
    engine = Engine.load(tiny_model, adapters, EngineConfig(kv_bytes=1 << 24), torch.float32)
    worn = ["small", None, "large", "small", "large", None]
    prompts = [[60 + place] * (place + 2) for place in range(6)]
    requests = [
        Request(id=str(place), prompt=prompt, sampling=GREEDY, adapter=name)
        for place, (prompt, name) in enumerate(zip(prompts, worn, strict=True))
    ]
    together = collect(engine, *requests)
    for place, (prompt, name) in enumerate(zip(prompts, worn, strict=True)):
        merged = weights.load(tiny_model, torch.float32)
        if name is not None:
            lora.merge(merged, Adapter.load(adapters[name], merged))
        expected = one(Engine(merged, engine.tokenizer, config=EngineConfig(kv_bytes=1 << 24)), GREEDY, prompt)
        assert together[str(place), 0].tokens == expected.tokens, name
    same = {name: one(engine, GREEDY, adapter=name).tokens for name in (None, "small", "large")}
    assert len({tuple(tokens) for tokens in same.values()}) == 3


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (Request(id="x", prompt=[]), "prompt"),
        (Request(id="x", prompt=[1], n=0), "n"),
        (Request(id="x", prompt=[1], n=1000), "n"),
        (Request(id="x", prompt=[-1]), "prompt"),
        (Request(id="x", prompt=[10**6]), "prompt"),
        (Request(id="x", prompt=[1], adapter="none"), "model"),
        (Request(id="x", prompt=[1], sampling=Sampling(max_tokens=-1)), "max_tokens"),
        (Request(id="x", prompt=[1], sampling=Sampling(temperature=-1)), "temperature"),
        (Request(id="x", prompt=[1], sampling=Sampling(temperature=float("nan"))), "temperature"),
        (Request(id="x", prompt=[1], sampling=Sampling(top_p=1.5)), "top_p"),
        (Request(id="x", prompt=[1], sampling=Sampling(min_p=-0.1)), "min_p"),
        (Request(id="x", prompt=[1], sampling=Sampling(logprobs=-1)), "logprobs"),
        (Request(id="x", prompt=[1], sampling=Sampling(prompt_logprobs=-1)), "prompt_logprobs"),
        (Request(id="x", prompt=[1], sampling=Sampling(logit_bias={10**6: 1.0})), "logit_bias"),
        (Request(id="x", prompt=[1], sampling=Sampling(logit_bias={1: float("inf")})), "logit_bias"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_field(engine: Engine, request_: Request, param: str) -> None:
    with pytest.raises(RequestError) as refused:
        engine.add(request_)
    assert refused.value.param == param
    assert not engine.busy


def test_an_id_is_used_once_at_a_time(engine: Engine) -> None:
    engine.add(Request(id="a", prompt=[1], sampling=GREEDY))
    with pytest.raises(RequestError, match="id 'a' is in use"):
        engine.add(Request(id="a", prompt=[1]))
    engine.abort("a")
    assert len(one(engine, GREEDY).tokens) == 12


def test_logits_that_are_not_finite_fail_their_request_alone(tiny_model: Path) -> None:
    engine = Engine.load(tiny_model, config=EngineConfig(kv_bytes=1 << 24), dtype=torch.float32)
    engine.decoder.model.embed_tokens.weight = torch.nn.Parameter(
        engine.decoder.model.embed_tokens.weight.clone(), requires_grad=False
    )
    expected = one(engine, GREEDY).tokens
    broken = next(token for token in range(200, 250) if token not in expected and token not in PROMPT)
    engine.decoder.model.embed_tokens.weight[broken] = float("nan")
    engine.decoder.lm_head.weight = torch.nn.Parameter(
        engine.decoder.lm_head.weight.nan_to_num(), requires_grad=False
    )  # the head is whole: only who says the broken token is hit
    engine.add(Request(id="bad", prompt=[broken, 5], sampling=GREEDY, n=2))
    engine.add(Request(id="good", prompt=PROMPT, sampling=GREEDY))
    failures, tokens = [], []
    while engine.busy:
        for output in engine.step():
            if isinstance(output, Failure):
                failures.append(output.id)
            else:
                tokens += output.tokens
    assert failures == ["bad"]
    assert tokens == expected
    engine.check_integrity()
    assert engine.pool.available == engine.pool.blocks


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path, tiny_tokenizer_folder: Path) -> None:
    make(tmp_path, "smollm")  # 97 tokens, the tokenizer has more
    for path in tiny_tokenizer_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="the tokenizer has more tokens than the model"):
        Engine.load(tmp_path)


@pytest.mark.slow
def test_smollm2_twenty_prompts_equal_transformers(smollm2: Path) -> None:
    """Greedy in float32: the same tokens, all twenty in one batch, in chunks of 64 tokens."""
    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    config = EngineConfig(kv_bytes=1 << 28, token_budget=64)
    engine = Engine.load(smollm2, config=config, dtype=torch.float32)
    subjects = ["a steelyard", "the moon", "bread", "a prime number", "Paris", "rain", "a cat", "music", "iron", "tea"]
    texts = [form.format(subject) for form in ("What is {}?", "Write one sentence about {}.") for subject in subjects]
    prompts = [
        engine.tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n") for text in texts
    ]
    sampled = Sampling(max_tokens=40, temperature=0)
    found = collect(
        engine, *(Request(id=str(place), prompt=prompt, sampling=sampled) for place, prompt in enumerate(prompts))
    )
    for place, prompt in enumerate(prompts):
        expected = reference.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=40, do_sample=False
        )
        assert found[str(place), 0].tokens == expected[0, len(prompt) :].tolist(), texts[place]
