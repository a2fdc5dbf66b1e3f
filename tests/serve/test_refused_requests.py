"""Every field is honoured, or neutral, or refused by name; nothing is ignored, and nothing is ever a 422 or a 500."""

from __future__ import annotations

import json
import typing
from typing import Any

import openai
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import ChatCompletionStreamOptionsParam
from openai.types.chat import completion_create_params as chat_create_params
from running_service import Service

from steelyard.errors import RequestError
from steelyard.serve.protocol.chat import ChatRequest
from steelyard.serve.protocol.completions import CompletionRequest
from steelyard.serve.protocol.errors import error_body
from steelyard.serve.protocol.fields import NEUTRAL, parse
from steelyard.serve.protocol.reading import ClassifyRequest

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
LONG = [{"role": "user", "content": "word " * 400}]
COMPLETION = {"model": "tiny", "prompt": "Hello"}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "chat": (ChatRequest, CHAT),
    "completion": (CompletionRequest, COMPLETION),
}

# The contract's fields, for both endpoints. A field that is added there is added here.
CONTRACT = (  # noqa: SIM905
    "model stream stream_options temperature top_p max_tokens n stop seed logprobs logit_bias presence_penalty"
    " frequency_penalty tools tool_choice parallel_tool_calls response_format user safety_identifier metadata store"
    " service_tier prompt_cache_key modalities reasoning_effort verbosity audio prediction functions function_call"
    " web_search_options moderation top_k min_p repetition_penalty min_tokens ignore_eos stop_token_ids bad_words"
    " prompt_logprobs use_beam_search length_penalty structured_outputs explain draft"
).split()
CHAT_CONTRACT = [*CONTRACT, "messages", "max_completion_tokens", "top_logprobs"]
COMPLETION_CONTRACT = [*CONTRACT, "prompt", "echo", "suffix", "best_of"]
CHAT_SDK = list(chat_create_params.CompletionCreateParamsBase.__annotations__)
COMPLETION_SDK = list(completion_create_params.CompletionCreateParamsBase.__annotations__)

WRONG: list[tuple[str, list[Any]]] = [
    ("model", [None, 1, ["tiny"]]),
    ("stream", ["true", 1, []]),
    ("stream_options", [True, [], {"include_usage": 1}]),
    ("temperature", ["hot", -0.1, 2.1, True, [], {}]),
    ("top_p", ["x", -0.1, 1.1, False]),
    ("draft", [1, 0, "yes", [], {}]),
    ("prompt_logprobs", [-1, 21, 1.5, "1", True]),
    ("top_k", [-2, 1.5, "1", True, 1 << 40]),
    ("min_p", [-0.1, 1.1, "0", True]),
    ("max_tokens", [0, -1, 1.5, "5", True, 1 << 70]),
    ("n", [0, 129, 1.5, "1", True]),
    ("stop", [1, True, {}, [1], [None], "", [""], ["a"] * 17, "a" * 1001]),
    ("seed", ["1", 1.5, True, 1 << 63, -(1 << 63) - 1]),
    (
        "logit_bias",
        [[], "x", {"a": 1}, {"1": 101}, {"1": "1"}, {"1": True}, {"-1": 1}, {"1.0": 1}, {"01": 1}, {"²": 1}],
    ),
    ("presence_penalty", [-2.1, 2.1, "0", True]),
    ("frequency_penalty", [-2.1, 2.1, "0", True]),
    ("ignore_eos", [1, "true"]),
    ("response_format", ["json", [], {}, {"type": "xml"}, {"type": "json_schema"}, {"type": "text", "other": 1}]),
    ("structured_outputs", ["json", [], {}, {"regex": 1}, {"regex": "a", "choice": ["b"]}, {"json_object": False}]),
    ("use_beam_search", [1, "true", []]),
    ("beam_width", [0, 65, True, "4", 4]),  # the last without use_beam_search
    ("length_penalty", [11, "1", True, 0.5]),
    ("num_beam_groups", [0, 65, "1", 2]),
    ("diversity_penalty", [-1, "1", 0.5]),
]
CHAT_WRONG = [
    ("messages", [None, [], {}, "Hello", ["Hello"], [None]]),
    ("max_completion_tokens", [0, "1", True]),
    ("logprobs", [1, 5, "true"]),
    ("top_logprobs", [-1, 21, True, "1", 3]),  # 3 without logprobs
]
COMPLETION_WRONG = [
    ("prompt", [None, [], {}, 1, [[]], ["a", 1], [1, "a"], [1, True], [-1], [1.5], [["a"]], ["a", [1]], ["a"] * 65]),
    ("logprobs", [-1, 6, True, "1", 1.5]),
    ("best_of", [2, 0, True, "1"]),
    ("echo", ["yes", 0, 1, []]),
    ("suffix", ["x", 1]),
]


READ = {**COMPLETION, "max_tokens": 0, "echo": True}


def refusal(kind: str, fields: dict[str, Any]) -> RequestError:
    model, body = KINDS[kind]
    with pytest.raises(RequestError) as caught:
        parse(model, json.dumps({**body, **fields}).encode())
    assert error_body(caught.value, "").error.message.isprintable()
    return caught.value


CASES = [
    (kind, name, value)
    for kind, own in (("chat", CHAT_WRONG), ("completion", COMPLETION_WRONG))
    for name, values in WRONG + own
    for value in values
]


@pytest.mark.parametrize(("kind", "name", "value"), CASES)
def test_a_wrong_value_is_refused_by_name(kind: str, name: str, value: Any) -> None:
    param = refusal(kind, {name: value}).param
    assert param is not None
    assert param.split("[")[0].split(".")[0] == name


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 400])
@pytest.mark.parametrize("name", ["temperature", "presence_penalty", "seed"])
def test_numbers_are_finite(name: str, literal: str) -> None:
    with pytest.raises(RequestError):
        parse(CompletionRequest, b'{"model": "tiny", "prompt": "a", "%s": %s}' % (name.encode(), literal.encode()))
    with pytest.raises(RequestError):
        parse(CompletionRequest, b'{"model": "tiny", "prompt": "a", "logit_bias": {"1": %s}}' % literal.encode())


@pytest.mark.parametrize(
    ("kind", "name"),
    [("chat", name) for name in sorted({*CHAT_CONTRACT, *CHAT_SDK})]
    + [("completion", name) for name in sorted({*COMPLETION_CONTRACT, *COMPLETION_SDK})],
)
def test_every_field_of_the_contract_and_of_the_sdk_is_known(kind: str, name: str) -> None:
    model, body = KINDS[kind]
    if name in model.model_fields:
        return
    parse(model, json.dumps({**body, name: None}).encode())
    for value in NEUTRAL[name]:
        parse(model, json.dumps({**body, name: value}).encode())
    for value in ("other", 12345, [1], {"a": 1}, 0.5):
        error = refusal(kind, {name: value})
        assert (error.param, error.code) == (name, "unsupported_parameter")
        assert f"'{name}'" in str(error)


@pytest.mark.parametrize(("name", "lookalike"), [("store", 0), ("use_beam_search", 0), ("min_tokens", False)])
def test_a_neutral_value_of_another_type_is_refused(name: str, lookalike: Any) -> None:
    assert refusal("chat", {name: lookalike}).param == name


@pytest.mark.parametrize("kind", KINDS)
@given(name=st.text(min_size=1, max_size=30), value=st.none() | st.booleans() | st.integers() | st.text(max_size=5))
@example(name="Temperature", value=1)
@example(name="__class__", value=None)
@example(name="model_config", value=None)
def test_an_unknown_field_is_refused_by_name(kind: str, name: str, value: Any) -> None:
    if name in NEUTRAL or name in KINDS[kind][0].model_fields:
        return
    error = refusal(kind, {name: value})
    assert (error.param, error.code) == (name, "unknown_parameter")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
message_keys = st.sampled_from(["role", "content", "name", "tool_calls", "type", "text"])
messages = st.lists(st.dictionaries(message_keys, json_values, max_size=4) | json_values, max_size=3)


@settings(max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from(sorted({*CHAT_CONTRACT, *COMPLETION_CONTRACT})), json_values | messages, max_size=5
    ),
    st.sampled_from(list(KINDS)),
)
def test_whatever_comes_is_parsed_or_refused_by_name(fields: dict[str, Any], kind: str) -> None:
    model, body = KINDS[kind]
    param: str | None = "model"
    try:
        parse(model, json.dumps({**body, **fields}).encode())
    except RequestError as error:
        param = error.param
    assert param is not None
    assert param.split("[")[0].split(".")[0] in {*body, *fields}


@given(st.binary(max_size=60))
@example(b"")
@example(b"[]")
@example(b"null")
@example(b'"model"')
@example(b"{" * 100_000)
@example(b'{"a":' * 10_000)
@example(b'{"model": "tiny", "prompt": "\\ud800"}')
@example(b'{"model": "tiny", "prompt": "\xff"}')
@example(b'{"model": "tiny", "prompt": "a"} trailing')
def test_bytes_that_are_no_request_are_refused(content: bytes) -> None:
    with pytest.raises(RequestError):
        parse(CompletionRequest, content)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x", "tool_call_id": "1"}, "messages[0].tool_call_id"),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id"),
        ({"role": "function", "content": "x"}, "messages[0].role"),
        ({"role": ["user"], "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": 1}, "messages[0].content"),
        ({"role": "user", "content": []}, "messages[0].content"),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "more": 1}]}, "messages[0].content[0].more"),
        ({"role": "user", "content": "x", "name": "Bob"}, "messages[0].name"),
        ({"role": "user", "content": "x", "weight": 1}, "messages[0].weight"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[0].tool_calls[0]"),
        ({"role": "assistant", "tool_calls": []}, "messages[0].content"),
    ],
)
def test_a_wrong_message_is_refused_by_its_path(message: Any, param: str) -> None:
    assert refusal("chat", {"messages": [message]}).param == param
    later = refusal("chat", {"messages": [{"role": "user", "content": "x"}, message]})
    assert later.param == param.replace("[0]", "[1]", 1)


def test_fields_that_contradict_each_other() -> None:
    assert refusal("chat", {"max_tokens": 5, "max_completion_tokens": 6}).param == "max_tokens"
    assert parse(ChatRequest, json.dumps({**CHAT, "max_tokens": 5, "max_completion_tokens": 5}).encode())
    assert refusal("chat", {"stream_options": {"include_usage": True}}).param == "stream_options"
    assert refusal("chat", {"stream": False, "stream_options": {}}).param == "stream_options"
    assert refusal("completion", {"n": 2, "best_of": 1}).param == "best_of"
    for kind in KINDS:
        assert refusal(kind, {"prompt_logprobs": 1, "stream": True}).param == "prompt_logprobs"
    assert parse(CompletionRequest, json.dumps({**COMPLETION, "max_tokens": 0, "echo": True}).encode()).max_tokens == 0
    assert refusal("chat", {"max_tokens": 0, "prompt_logprobs": 1}).param == "max_tokens"
    assert parse(CompletionRequest, json.dumps({**COMPLETION, "n": 2, "best_of": 2}).encode())


def test_stream_options_are_refused_one_by_one() -> None:
    for name in typing.get_type_hints(ChatCompletionStreamOptionsParam).keys() - {"include_usage"}:
        error = refusal("chat", {"stream": True, "stream_options": {name: True}})
        assert error.param == f"stream_options.{name}"


def test_the_sdk_sees_a_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=CHAT["messages"], temperature="hot")  # type: ignore[arg-type]
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    assert caught.value.body["message"] == "'temperature' must be a valid number, not \"hot\""
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=CHAT["messages"], reasoning_effort="high")
    assert caught.value.param == "reasoning_effort"


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("chat/completions", {**CHAT, "messages": LONG}, "messages", "context_length_exceeded"),
        ("completions", {**COMPLETION, "prompt": "word " * 400}, "prompt", "context_length_exceeded"),
        ("completions", {**COMPLETION, "prompt": [5] * 256}, "prompt", "context_length_exceeded"),
        ("completions", {**COMPLETION, "prompt": ""}, "prompt", None),
        ("completions", {**COMPLETION, "prompt": [100_000]}, "prompt", None),
        ("completions", {**COMPLETION, "prompt": [1 << 80]}, "prompt", None),
        ("completions", {**COMPLETION, "prompt": ["a", ""]}, "prompt", None),
        ("completions", {**COMPLETION, "prompt": [7, 7, 7]}, "prompt", None),
        ("completions", {**COMPLETION, "prompt": [7, 7, 7], "stream": True}, "prompt", None),
        ("completions", {**COMPLETION, "logit_bias": {"99999": 1}}, "logit_bias", None),
        ("completions", {**READ, "prompt": [5] * 257}, "prompt", "context_length_exceeded"),
        ("completions", {**COMPLETION, "prompt": [[5] * 200] * 64, "echo": True, "n": 30}, "echo", None),
        ("completions", {**COMPLETION, "prompt": [[5] * 200] * 64, "echo": True, "logprobs": 5, "n": 3}, "echo", None),
        ("completions", {**COMPLETION, "prompt": [[5] * 200] * 64, "prompt_logprobs": 20}, "prompt_logprobs", None),
        ("chat/completions", {**CHAT, "model": "none"}, "model", "model_not_found"),
        ("completions", {**COMPLETION, "model": "none", "stream": True}, "model", "model_not_found"),
    ],
)  # fmt: skip
def test_what_only_the_model_can_refuse(
    service: Service, path: str, body: dict[str, Any], param: str, code: str | None
) -> None:
    with service.http() as http:
        response = http.post(f"/v1/{path}", json=body)
    assert response.status_code == (404 if code == "model_not_found" else 400)
    error = response.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")


def test_a_prompt_may_fill_all_but_one_of_the_context(service: Service) -> None:
    with service.http() as http:
        usage = http.post("/v1/completions", json={**COMPLETION, "prompt": [5] * 255, "max_tokens": 9}).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (255, 1)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["a", ""], "'input[1]' must be at least 1 long"),
        ([], "'input' must hold at least 1, not 0"),
        (["a"] * 3000, "'input' must hold at most 2048, not 3000"),
        ([1, 2], "'input[0]' must be a valid string, not 1"),
        (["a", {"text": "b"}], '\'input[1]\' must be a valid string, not {"text":"b"}'),
        ("", "'input' must be at least 1 long"),
        ({"text": "b", "image": ""}, "'input.image' must be at least 1 long"),
        ([{"text": "b"}, {"txt": "c"}], "unknown field 'input[1].txt': remove it"),
    ],
)
def test_of_a_field_of_several_kinds_the_most_telling_is_said(given: Any, told: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(ClassifyRequest, json.dumps({"model": "m", "input": given}).encode())
    assert str(caught.value) == told


def test_too_many_pairs_are_counted() -> None:
    body = {**CHAT, "metadata": {str(number): "x" for number in range(20)}}
    with pytest.raises(RequestError, match="'metadata' must hold at most 16, not 20"):
        parse(ChatRequest, json.dumps(body).encode())


def test_what_is_nested_too_deeply_is_called_so() -> None:
    content = b'{"model": "m", "input": ' + b"[" * 500 + b"]" * 500 + b"}"
    with pytest.raises(RequestError, match="the body is nested too deeply"):
        parse(ClassifyRequest, content)
