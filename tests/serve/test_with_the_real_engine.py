"""The whole way with a real, tiny, untrained model: SDK, server, wire, engine process, and the same tokens again."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import openai
import pydantic
import pytest
from running_service import Service, eventually, serving

from steelyard.serve.engine_client import worker_command

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def real(make_checkpoint: Callable[[str], Path]) -> Iterator[Service]:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = make_checkpoint("real")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    for file in ("config.json", "model.safetensors"):
        shutil.move(folder / "model" / file, folder / file)
    shutil.rmtree(folder / "model")
    with serving(folder, command=worker_command, seconds=60) as service:
        yield service


def test_the_same_seed_gives_the_same_answer_whole_and_streamed(real: Service) -> None:
    client = real.sdk()
    options = {"model": "real", "messages": MESSAGES, "n": 3, "seed": 7, "max_tokens": 24, "logprobs": True}
    whole = client.chat.completions.create(**options)
    again = client.chat.completions.create(**options)
    texts = [choice.message.content for choice in whole.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**options, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    assert whole.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in whole.choices)


def test_stop_and_logprobs_of_a_real_model(real: Service) -> None:
    client = real.sdk()
    options = {"model": "real", "prompt": "The steelyard", "max_tokens": 12, "temperature": 0}
    full = client.completions.create(**options, logprobs=5, extra_body={"ignore_eos": True}).choices[0]
    assert full.finish_reason == "length"
    for value, top in zip(full.logprobs.token_logprobs, full.logprobs.top_logprobs, strict=True):
        assert value <= 0
        assert max(top.values()) == pytest.approx(value)  # greedy
    stop = full.text[len(full.text) // 2 :][:4]
    cut = client.completions.create(**options, stop=stop, extra_body={"ignore_eos": True}).choices[0]
    assert (cut.text, cut.finish_reason) == (full.text[: full.text.index(stop)], "stop")
    assert client.completions.create(**{**options, "top_p": 0, "temperature": 1}).choices[0].text == full.text


def test_a_prompt_is_scored_alike_in_every_way(real: Service) -> None:
    """Echoed whole and streamed, as text and as tokens, in vLLM's shape, and as the choice of a shorter prompt."""
    tokenizer = next(iter(real.models.values())).tokenizer
    prompt = "The steelyard weighs exactly, Grüße 😀! " * 4
    ids = tokenizer.encode(prompt)
    client = real.sdk()
    options = {"model": "real", "max_tokens": 1, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(prompt=prompt, echo=True, **options).choices[0]
    values = whole.logprobs.token_logprobs
    assert len(values) == len(ids) + 1
    assert values[0] is None
    as_tokens = client.completions.create(prompt=ids, echo=True, **options).choices[0]
    assert (as_tokens.text, as_tokens.logprobs) == (whole.text, whole.logprobs)
    parts = list(client.completions.create(prompt=prompt, echo=True, stream=True, **options))
    assert "".join(part.choices[0].text for part in parts) == whole.text
    streamed = [part.choices[0].logprobs for part in parts if part.choices[0].logprobs]
    assert [value for one in streamed for value in one.token_logprobs] == values
    assert [offset for one in streamed for offset in one.text_offset] == whole.logprobs.text_offset
    ranked = client.completions.create(prompt=prompt, extra_body={"prompt_logprobs": 1}, **options).choices[0]
    assert [entry[str(id)]["logprob"] for id, entry in zip(ids[1:], ranked.prompt_logprobs[1:], strict=True)] == values[
        1:-1
    ]
    place = len(ids) // 2
    shorter = client.completions.create(
        prompt=ids[:place], extra_body={"logit_bias": {str(ids[place]): 100}}, **options
    ).choices[0]
    assert shorter.logprobs.token_logprobs[0] == pytest.approx(values[place], abs=1e-2)  # float weights run in bfloat16


def test_its_work_is_counted(real: Service) -> None:
    def generated() -> int:
        return real.engine.stats.generated_tokens

    before = generated()
    real.sdk().completions.create(
        model="real", prompt="a", max_tokens=20, extra_body={"ignore_eos": True, "draft": False}
    )
    assert eventually(lambda: generated() - before == 20)


def test_probes_are_answered_while_prompts_are_read(real: Service) -> None:
    """Fast and with the truth; `benchmarks/reliability.py` does so with prompts of thousands of tokens."""
    ending = threading.Event()
    asked: list[int] = []

    def ask() -> None:
        while not ending.is_set():
            prompts = [[seeded.randrange(500) for _ in range(250)] for _ in range(16)]
            usage = real.sdk().completions.create(model="real", prompt=prompts, max_tokens=1).usage
            asked.append(usage.prompt_tokens if usage is not None else 0)

    seeded = random.Random(13)
    thread = threading.Thread(target=ask)
    thread.start()
    times = []
    with real.http() as http:
        while len(asked) < 3 or len(times) < 100:
            began = time.monotonic()
            answers = [http.get("/live"), http.get("/ready")]
            times.append(time.monotonic() - began)
            assert [answer.status_code for answer in answers] == [200, 200]
            time.sleep(0.01)
    ending.set()
    thread.join()
    assert sum(asked) >= 3 * 16 * 250
    assert sorted(times)[len(times) * 9 // 10] < 1


def test_it_is_ready_again_after_a_kill(real: Service) -> None:
    def read_and_kill() -> None:
        stream = real.sdk().completions.create(
            model="real", prompt="a", max_tokens=250, n=16, stream=True, extra_body={"ignore_eos": True}
        )
        for number, _ in enumerate(stream):
            if number == 3:
                real.engine._process.kill()

    with pytest.raises(openai.APIError):
        read_and_kill()
    eventually(lambda: real.engine.ready, 30)
    assert real.sdk().completions.create(model="real", prompt="a", max_tokens=2).usage.completion_tokens == 2


def test_adapters_are_loaded_swapped_and_dropped_while_a_stream_runs(
    make_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    torch, lora = pytest.importorskip("torch"), pytest.importorskip("steelyard.models.lora")
    from families import make
    from steelyard.models import weights

    checkpoint = make_checkpoint("adapted")
    make(checkpoint, "smollm", vocab_size=512)
    decoder = weights.load(checkpoint)
    for number in (1, 2):
        generator = torch.Generator().manual_seed(number)
        adapter = lora.Adapter.create(decoder, rank=4, alpha=64, targets=("o_proj", "up_proj"), generator=generator)
        for _, b in adapter.pairs.values():
            b.normal_(0, 0.5, generator=generator)
        (tmp_path / str(number)).mkdir()
        adapter.save(tmp_path / str(number), str(checkpoint))
    with serving(checkpoint, command=worker_command, seconds=60, adapter_folder=tmp_path) as service:
        client, http = service.sdk(), service.admin_http()
        options = {"prompt": "The steelyard", "max_tokens": 30, "temperature": 0, "extra_body": {"ignore_eos": True}}

        def load(number: int) -> None:
            http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": str(number)}).raise_for_status()

        def text() -> str:
            return client.completions.create(model="x", **options).choices[0].text

        load(1)
        old = text()
        stream = client.completions.create(model="x", stream=True, **options)
        begun = next(iter(stream)).choices[0].text
        load(2)
        new = text()
        assert begun + "".join(chunk.choices[0].text for chunk in stream) == old
        assert old != new
        service.engine._process.kill()
        eventually(lambda: service.engine.ready is None, 10)
        eventually(lambda: service.engine.ready, 60)
        assert text() == new, "the restarted engine has the current adapter"
        http.post("/v1/unload_lora_adapter", json={"lora_name": "x"}).raise_for_status()
        with pytest.raises(openai.NotFoundError):
            text()
        with pytest.raises(httpx.HTTPStatusError):
            load(3)


def test_beams_come_back_the_best_first(real: Service) -> None:
    """Whole and streamed; every beam is paid for, and usage tells of those that did not come back."""
    client = real.sdk()
    options = {"model": "real", "messages": MESSAGES, "max_tokens": 8}
    extra = {"use_beam_search": True, "ignore_eos": True}
    whole = client.chat.completions.create(**options, n=3, extra_body={**extra, "beam_width": 5})
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    rejected = whole.usage.completion_tokens_details.rejected_prediction_tokens
    assert whole.usage.completion_tokens == 3 * 8 + rejected
    assert 0 < rejected <= 2 * 8
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**options, n=3, stream=True, extra_body={**extra, "beam_width": 5}):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    one = client.chat.completions.create(**options, extra_body={**extra, "beam_width": 1})
    greedy = client.chat.completions.create(**options, temperature=0, extra_body={"ignore_eos": True})
    assert one.choices[0].message.content == greedy.choices[0].message.content
    assert one.usage.completion_tokens == greedy.usage.completion_tokens == 8
    assert client.chat.completions.create(**options, extra_body=extra).usage.completion_tokens > 8  # four beams


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 3, "beam_width": 2}, "n"),
        ({"beam_width": 65}, "beam_width"),
        ({"beam_width": 4, "num_beam_groups": 3}, "num_beam_groups"),
        ({"use_beam_search": False, "beam_width": 4}, "beam_width"),
        ({"use_beam_search": None, "length_penalty": 0.5}, "length_penalty"),
        ({"temperature": 0.5}, "temperature"),
        ({"stop": ["x"]}, "stop"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_what_beams_do_not_do_is_refused(real: Service, fields: dict[str, object], param: str) -> None:
    body = {"model": "real", "messages": MESSAGES, "max_tokens": 4, "use_beam_search": True, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        real.sdk().post("/chat/completions", body=body, cast_to=object)
    assert caught.value.param == param


class Verdict(pydantic.BaseModel):
    kind: Literal["ham", "spam"]
    score: Annotated[int, pydantic.Field(ge=0, le=9)]


def test_the_sdk_parses_what_a_schema_says(real: Service) -> None:
    """By a model that was never trained; whole, streamed by its events, with log-probabilities and by beams."""
    client = real.sdk()
    options: dict[str, Any] = {"model": "real", "messages": MESSAGES, "max_tokens": 60}
    parsed = client.chat.completions.parse(**options, n=3, seed=1, response_format=Verdict)
    assert all(isinstance(choice.message.parsed, Verdict) for choice in parsed.choices)
    assert all(choice.finish_reason == "stop" for choice in parsed.choices)
    scored = client.chat.completions.parse(**options, seed=1, logprobs=True, response_format=Verdict).choices[0]
    assert "".join(token.token for token in scored.logprobs.content) == scored.message.content
    beams = client.chat.completions.parse(**options, response_format=Verdict, extra_body={"use_beam_search": True})
    assert isinstance(beams.choices[0].message.parsed, Verdict)
    with client.chat.completions.stream(**options, seed=1, response_format=Verdict) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion().choices[0].message
    assert isinstance(final.parsed, Verdict)
    assert final.content == parsed.choices[0].message.content
    assert "content.done" in events


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"regex": "[0-9]{3}-[0-9]{2}"}, r"[0-9]{3}-[0-9]{2}"),
        ({"choice": ["yes", "no, never"]}, "yes|no, never"),
        ({"grammar": 'start: "a" "b"+ "c"'}, "ab+c"),
        ({"json": {"type": "integer", "minimum": 10, "maximum": 99}}, "[1-9][0-9]"),
        ({"json_object": True}, r"\{.*\}"),
        ({"json": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}, "depth": 2}, r"\[(\[\])?\]"),
    ],
)
def test_structured_outputs(real: Service, wanted: dict[str, Any], pattern: str) -> None:
    options: dict[str, Any] = {"model": "real", "max_tokens": 100, "extra_body": {"structured_outputs": wanted}}
    told = real.sdk().completions.create(prompt="The steelyard", n=4, **options).choices
    chatted = real.sdk().chat.completions.create(messages=MESSAGES, n=4, **options).choices
    texts = [(one.text, one.finish_reason) for one in told]
    texts += [(one.message.content, one.finish_reason) for one in chatted]
    ended = [text for text, reason in texts if reason == "stop"]
    assert ended or "json_object" in wanted
    assert all(re.fullmatch(pattern, text, re.DOTALL) for text in ended)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object", "json_schema": {"name": "x"}}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "description": "said to nobody"}}},
            "response_format.json_schema.description",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "begin: x"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": {"allOf": [{"$ref": "#"}]}}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {}, "depth": 65}}, "structured_outputs.depth"),
        ({"structured_outputs": {"regex": "a", "depth": 2}}, "structured_outputs.depth"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
    ],
)
def test_what_no_answer_can_be_held_to_is_refused(real: Service, fields: dict[str, Any], param: str) -> None:
    body = {"model": "real", "messages": MESSAGES, "max_tokens": 4, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        real.sdk().post("/chat/completions", body=body, cast_to=object)
    assert caught.value.param == param


def test_given_up_while_its_grammar_is_compiled(real: Service) -> None:
    """The engine goes on, and holds nothing of it."""
    words = ["".join(random.Random(number).choices("abcdefghij", k=30)) for number in range(1000)]
    body = {"model": "real", "messages": MESSAGES, "max_tokens": 50, "structured_outputs": {"choice": words}}
    for _ in range(5):
        with contextlib.suppress(httpx.TimeoutException), real.http() as client:
            client.post("/v1/chat/completions", json=body, timeout=0.02)
    told = real.sdk().completions.create(model="real", prompt="The", max_tokens=3, extra_body={"ignore_eos": True})
    assert told.usage.completion_tokens == 3


class Weather(pydantic.BaseModel):
    """What the weather is like."""

    city: Literal["Rome", "Oslo"]
    days: Annotated[int, pydantic.Field(ge=1, le=9)]


class Add(pydantic.BaseModel):
    a: Annotated[int, pydantic.Field(ge=0, le=99)]
    b: Annotated[int, pydantic.Field(ge=0, le=99)]


TOOLS = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Add)]


def test_tools_are_called_as_their_schemas_say(real: Service) -> None:
    """By a model that was never trained: required, by name, one or several; parsed by the SDK; streamed alike."""
    client = real.sdk()
    options: dict[str, Any] = {"model": "real", "messages": MESSAGES, "max_tokens": 80, "tools": TOOLS}
    for seed in range(4):
        told = client.chat.completions.parse(
            **options, seed=seed, tool_choice="required", parallel_tool_calls=False
        ).choices[0]
        (call,) = told.message.tool_calls
        assert isinstance(call.function.parsed_arguments, {"Weather": Weather, "Add": Add}[call.function.name])
        assert (told.finish_reason, told.message.content) == ("tool_calls", None)
        with client.chat.completions.stream(
            **options, seed=seed, tool_choice="required", parallel_tool_calls=False
        ) as stream:
            kinds = {event.type for event in stream}
            (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
        assert "tool_calls.function.arguments.delta" in kinds
        assert streamed.function.arguments == call.function.arguments
        assert streamed.function.name == call.function.name
        assert streamed.id.startswith("call_")
    named = {"type": "function", "function": {"name": "Add"}}
    told = client.chat.completions.create(**options, seed=1, tool_choice=named, logprobs=True).choices[0]
    assert [call.function.name for call in told.message.tool_calls] == ["Add"]
    assert told.logprobs.content
    several = [
        client.chat.completions.create(**{**options, "max_tokens": 180}, seed=seed, tool_choice="required").choices[0]
        for seed in range(12)
    ]
    counts = [len(one.message.tool_calls) for one in several if one.finish_reason == "tool_calls"]
    assert counts
    assert max(len(one.message.tool_calls) for one in several) > 1
    ids = [call.id for one in several for call in one.message.tool_calls]
    assert len(set(ids)) == len(ids)


def test_a_conversation_with_tools_goes_on(real: Service) -> None:
    """An answer of ours is sent back with its results; the model may also just speak."""
    client = real.sdk()
    options: dict[str, Any] = {"model": "real", "max_tokens": 60, "tools": TOOLS}
    asked = client.chat.completions.create(messages=MESSAGES, **options, tool_choice="required", seed=3, store=True)
    message = asked.choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 21}'} for call in message.tool_calls]
    history = [*MESSAGES, message.model_dump(exclude_none=True), *results]
    told = client.chat.completions.create(messages=history, **options, seed=1).choices[0]
    assert told.message.content or told.message.tool_calls
    quiet = client.chat.completions.create(messages=history, **options, tool_choice="none", seed=1)
    assert quiet.choices[0].message.tool_calls is None
    plain = client.chat.completions.create(messages=MESSAGES, model="real", max_tokens=60, seed=1)
    offered = client.chat.completions.create(messages=MESSAGES, **options, seed=1)
    assert offered.usage.prompt_tokens > plain.usage.prompt_tokens + 50
    kept = client.chat.completions.retrieve(asked.id)
    assert kept.choices[0].message.tool_calls == message.tool_calls


CALL = {"id": "call_1", "type": "function", "function": {"name": "Add", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]},
            "tools[0].function.parameters",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "tools"),
        ({"tools": TOOLS, "ignore_eos": True}, "ignore_eos"),
        ({"messages": [{"role": "tool", "tool_call_id": "x", "content": "y"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages[0].tool_calls[0]"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "a", "arguments": "{"}}]}
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
    ],
)
def test_what_tools_cannot_be_is_refused(real: Service, fields: dict[str, object], param: str) -> None:
    body = {"model": "real", "messages": MESSAGES, "max_tokens": 4, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        real.sdk().post("/chat/completions", body=body, cast_to=object)
    assert caught.value.param == param
