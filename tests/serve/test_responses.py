"""`/v1/responses` by the unmodified SDK: whole, as events, kept, gone on from, refused by name."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import response_create_params
from openai.types.responses.input_token_count_params import InputTokenCountParams
from running_service import Service, eventually, serving
from sqlalchemy import select

from steelyard.errors import RequestError, StorageError
from steelyard.serve import stored_responses
from steelyard.serve.protocol import response_items, response_request
from steelyard.serve.protocol.fields import parse
from steelyard.serve.protocol.response_request import InputTokensRequest, ResponseRequest
from steelyard.store import tables

SECRET = "the codeword is steelyard"
BODY: dict[str, Any] = {"model": "tiny", "input": "Hello"}
EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    *["response.output_text.delta"] * 6,
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


@pytest.fixture(scope="module")
def service(make_checkpoint: Callable[[str], Path]) -> Iterator[Service]:
    with serving(make_checkpoint("tiny")) as service:
        yield service


@pytest.fixture
def client(service: Service) -> openai.OpenAI:
    return service.sdk(_strict_response_validation=True)


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.responses.create(**{**BODY, "max_output_tokens": 6, **options})


def prompt_of(service: Service) -> str:
    """What the engine was asked last."""
    tokenizer = next(iter(service.models.values())).tokenizer
    prompts = [message["prompt"] for message in service.received() if message["type"] == "request"]
    return tokenizer.decode(prompts[-1])


def test_a_text_is_answered(service: Service, client: openai.OpenAI) -> None:
    metadata = {"topic": "a"}
    told = ask(client, instructions="Be brief.", metadata=metadata, temperature=0.5, top_p=0.9, user="x")
    (message,) = told.output
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        max_tokens=6,
    )
    assert told.output_text == chat.choices[0].message.content
    assert chat.usage is not None
    usage = told.usage
    assert (usage.input_tokens, usage.output_tokens) == (chat.usage.prompt_tokens, 6)
    assert usage.total_tokens == usage.input_tokens + 6
    assert (usage.input_tokens_details.cached_tokens, usage.output_tokens_details.reasoning_tokens) == (0, 0)
    assert (told.status, told.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (message.status, message.content[0].annotations, message.content[0].logprobs) == ("incomplete", [], [])
    assert (told.instructions, told.metadata, told.user) == ("Be brief.", metadata, "x")
    assert (told.temperature, told.top_p, told.max_output_tokens) == (0.5, 0.9, 6)
    assert (told.model, told.tools, told.tool_choice, told.parallel_tool_calls) == ("tiny", [], "auto", True)
    assert (told.text.format.type, told.truncation, told.service_tier) == ("text", "disabled", "default")
    assert told.background is False
    schema = {"type": "object", "properties": {"a": {"type": ["null"], "default": None}}}
    form = {"type": "json_schema", "name": "x", "schema": schema}
    assert ask(client, text={"format": form}).text.format.schema_ == schema
    assert told.error is None
    with service.admin_http() as admin:
        entries = admin.get("/v1/organization/ledger", params={"reference": told.id}).json()["data"]
    assert sum(entry["output_tokens"] for entry in entries) == 6


def test_neutral_values_are_accepted(client: openai.OpenAI) -> None:
    for name, values in ResponseRequest.neutral.items():
        for value in (None, *values):
            assert ask(client, extra_body={name: value}).object == "response"


def test_log_probabilities(client: openai.OpenAI) -> None:
    told = ask(client, include=["message.output_text.logprobs"], top_logprobs=2)
    (part,) = told.output[0].content
    assert len(part.logprobs) == 6
    assert all(len(one.top_logprobs) == 2 for one in part.logprobs)
    streamed = list(ask(client, include=["message.output_text.logprobs"], stream=True))
    scored = [one for event in streamed if event.type == "response.output_text.delta" for one in event.logprobs]
    (done,) = (event for event in streamed if event.type == "response.output_text.done")
    assert [one.logprob for one in scored] == [one.logprob for one in part.logprobs]
    assert [one.token for one in done.logprobs] == [one.token for one in part.logprobs]
    again = [{"role": "user", "content": "x"}, told.output[0].to_dict(), {"role": "user", "content": "y"}]
    assert ask(client, input=again).output


def test_events_come_in_order_and_add_up(service: Service, client: openai.OpenAI) -> None:
    whole = ask(client)
    events = list(ask(client, stream=True))
    assert [event.type for event in events if event.type != "response.incomplete"] == EVENTS
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1].response
    assert (last.status, last.output_text) == ("incomplete", whole.output_text)
    assert last.usage == whole.usage
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == last.output_text
    assert events[0].response.output == []
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {last.output[0].id}
    assert client.responses.retrieve(last.id) == last
    with service.http() as http:
        text = http.post("/v1/responses", json={**BODY, "max_output_tokens": 2, "stream": True}).text
    lines = [line for line in text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    for name, data in zip(lines[:-1:2], lines[1:-1:2], strict=True):
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def test_the_sdks_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(**BODY, max_output_tokens=6) as stream:
        kinds = {event.type for event in stream}
    assert "response.incomplete" in kinds


def test_an_engine_that_dies_fails_the_stream(make_checkpoint: Callable[[str], Path]) -> None:
    with serving(make_checkpoint("tiny")) as service:
        stream = service.sdk().responses.create(**BODY, stream=True, extra_body={"seed": 50})
        seen = []
        for event in stream:
            seen.append(event)
            if event.type == "response.output_text.delta":
                service.engine._process.kill()
        failed = seen[-1]
        assert failed.type == "response.failed"
        assert (failed.response.status, failed.response.error.code) == ("failed", "server_error")
        assert failed.response.output_text
        assert failed.sequence_number == len(seen) - 1
        eventually(lambda: service.engine.ready, 30)
        with pytest.raises(openai.NotFoundError):
            service.sdk().responses.retrieve(failed.response.id)


def test_what_is_refused_before_the_first_event_is_an_ordinary_error(service: Service) -> None:
    with service.admin_http() as admin:
        project = admin.post("/v1/organization/projects", json={"name": "poor"}).json()["id"]
        key = admin.post(f"/v1/organization/projects/{project}/api_keys", json={"name": "x"}).json()["value"]
        path = f"/v1/organization/projects/{project}/rate_limits/rl-tiny"
        admin.post(path, json={"max_tokens_per_1_minute": 1}).raise_for_status()
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError):
            service.sdk(api_key=key).responses.create(**BODY, stream=stream)


def test_what_cannot_be_kept_has_failed(
    service: Service, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(project: str, kept: Any) -> None:
        raise StorageError("the database is away")

    monkeypatch.setattr(service.behind.responses, "keep", away)
    last = list(ask(client, stream=True))[-1]
    assert (last.type, last.response.status, last.response.error.message) == (
        "response.failed",
        "failed",
        "the database is away",
    )
    assert last.response.incomplete_details is None
    with pytest.raises(openai.InternalServerError):
        ask(client)
    assert ask(client, store=False).output


def test_a_client_that_leaves_is_not_answered_on(service: Service) -> None:
    stream = service.sdk().responses.create(**BODY, stream=True, extra_body={"seed": 30})
    next(iter(stream))
    asked = next(message for message in reversed(service.received()) if message["type"] == "request")
    stream.close()
    eventually(lambda: service.aborted(asked))


def test_kept_read_listed_and_deleted(service: Service, client: openai.OpenAI) -> None:
    given = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": SECRET}, {"type": "input_text", "text": "b"}]},
        {"role": "assistant", "content": "Yes?"},
        {"type": "message", "id": "msg_mine", "role": "user", "content": "c", "status": "completed"},
    ]
    told = ask(client, input=given)
    assert client.responses.retrieve(told.id) == told
    items = list(client.responses.input_items.list(told.id, order="asc", limit=2))
    assert [(one.role, [part.text for part in one.content]) for one in items] == [  # type: ignore[union-attr]
        ("developer", ["Be brief."]),
        ("user", [SECRET, "b"]),
        ("assistant", ["Yes?"]),
        ("user", ["c"]),
    ]
    page = client.responses.input_items.list(told.id, limit=1)
    assert [one.id for one in page.data] == ["msg_mine"]
    assert page.has_more
    with pytest.raises(openai.NotFoundError):
        client.responses.input_items.list(told.id, after="msg_none")
    stored = service.behind.database.read_now(
        lambda connection: b"".join(connection.execute(select(tables.responses.c.content)).scalars())
    )
    assert SECRET.encode() not in stored
    with pytest.raises(openai.BadRequestError, match="only background"):
        client.responses.cancel(told.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.retrieve(told.id, stream=True)
    assert refused.value.param == "stream"
    with service.http() as http:
        assert http.delete(f"/v1/responses/{told.id}").json() == {
            "id": told.id,
            "object": "response",
            "deleted": True,
        }
    for verb in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            verb(told.id)


def test_without_store_nothing_is_kept(client: openai.OpenAI) -> None:
    told = ask(client, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(told.id)
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, previous_response_id=told.id)
    assert (refused.value.param, refused.value.code) == ("previous_response_id", "previous_response_not_found")


def test_going_on_from_a_response(service: Service, client: openai.OpenAI) -> None:
    """The chain is the history; instructions are those of the last alone."""
    first = ask(client, input="one", instructions="Old.")
    second = ask(client, input="two", previous_response_id=first.id)
    third = ask(client, input="three", previous_response_id=second.id, instructions="New.")
    told = prompt_of(service)
    ask(
        client,
        store=False,
        instructions="New.",
        input=[
            {"role": "user", "content": "one"},
            *(item.to_dict() for item in first.output),
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": [part.to_dict() for part in second.output[0].content]},
            {"role": "user", "content": "three"},
        ],
    )
    assert prompt_of(service) == told
    assert "Old." not in told
    assert third.previous_response_id == second.id
    items = client.responses.input_items.list(third.id).data
    assert [one.content[0].text for one in items] == ["three"]  # type: ignore[union-attr]
    client.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, previous_response_id=third.id)
    assert refused.value.code == "previous_response_not_found"
    assert first.id in refused.value.message


def test_another_projects_response_is_nothing_to_go_on_from(service: Service, client: openai.OpenAI) -> None:
    told = ask(client)
    with service.admin_http() as admin:
        project = admin.post("/v1/organization/projects", json={"name": "other"}).json()["id"]
        key = admin.post(f"/v1/organization/projects/{project}/api_keys", json={"name": "x"}).json()["value"]
    other = service.sdk(api_key=key)
    with pytest.raises(openai.NotFoundError):
        other.responses.retrieve(told.id)
    for name in (told.id, "resp_none"):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(other, previous_response_id=name)
        assert refused.value.message.replace(name, "ID").count("'ID' is not in this project") == 1
    assert ask(other, input="x").output
    assert client.responses.retrieve(told.id) == told


def test_what_is_old_is_forgotten(service: Service, client: openai.OpenAI) -> None:
    told, database = ask(client), service.behind.database
    later = told.created_at + stored_responses.KEPT_SECONDS

    def forget(now: int) -> None:
        database.write_now(lambda connection: stored_responses.expire(connection, now))

    forget(int(later) - 1)
    assert client.responses.retrieve(told.id).id == told.id
    forget(int(later))
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(told.id)


@pytest.mark.parametrize(
    ("where", "bound", "most"),
    [(stored_responses, "MOST_BEFORE", 2), (stored_responses, "MOST_BYTES", 3000), (response_request, "MAX_ITEMS", 6)],
)
def test_a_chain_has_an_end(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, where: Any, bound: str, most: int
) -> None:
    monkeypatch.setattr(where, bound, most)
    name = None
    for _ in range(3):
        name = ask(client, previous_response_id=name, input="x", max_output_tokens=1).id
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, previous_response_id=name)
    assert refused.value.param == "previous_response_id"


def test_tokens_are_counted_as_they_are_read(service: Service, client: openai.OpenAI) -> None:
    first = ask(client)
    tool: Any = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
    options: dict[str, Any] = {**BODY, "previous_response_id": first.id, "instructions": "Be brief.", "tools": [tool]}
    asked = len(service.received())
    counted = client.responses.input_tokens.count(**options)
    assert len(service.received()) == asked
    told = client.responses.create(**options, max_output_tokens=1)
    assert told.usage is not None
    assert counted.input_tokens == told.usage.input_tokens > first.usage.input_tokens


def test_sent_again_it_is_answered_again(service: Service) -> None:
    """Whole and as a stream, by its Idempotency-Key."""
    for number, more in enumerate(({}, {"stream": True})):
        with service.http() as http:
            headers = {"idempotency-key": f"responses-{number}"}
            answers = [http.post("/v1/responses", json={**BODY, **more}, headers=headers) for _ in range(2)]
        assert answers[0].text == answers[1].text
        assert answers[1].headers["idempotent-replayed"] == "true"


FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,x", "detail": "auto"}
FILE = {"type": "input_file", "file_id": "file-x"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"background": True}, "background"),
    ({"conversation": "conv_x"}, "conversation"),
    ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
    ({"include": ["message.output_text.logprobs"], "tools": [FUNCTION]}, "include"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
    ({"instructions": ["x"]}, "instructions"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_tool_calls": 1}, "max_tool_calls"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"prompt": {"id": "pmpt_x"}}, "prompt"),
    ({"prompt_cache_key": "x"}, "prompt_cache_key"),
    ({"reasoning": {"effort": "low"}}, "reasoning"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"truncation": "auto"}, "truncation"),
    ({"previous_response_id": "a b"}, "previous_response_id"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
    ({"text": {"format": {"type": "json_object", "name": "x"}}}, "text.format.name"),
    (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "description": "x"}}},
        "text.format.description",
    ),
    ({"text": {"format": {"type": "json_object"}}, "tools": [FUNCTION]}, "tools"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "file_search", "vector_store_ids": ["x"]}]}, "tools[0].type"),
    ({"tools": [{**FUNCTION, "defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tools": [FUNCTION, FUNCTION]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "web_search_preview"}, "tools": [FUNCTION]}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "g"}, "tools": [FUNCTION]}, "tool_choice"),
    ({"input": []}, "input"),
    ({"input": 1}, "input"),
    ({"input": ["x"]}, "input[0]"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [FILE]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "output_text", "text": "x"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": "x", "phase": "commentary"}]}, "input[0].phase"),
    ({"input": [{"role": "user", "content": "x", "name": "y"}]}, "input[0].name"),
    ({"input": [{"role": "user", "content": "x", "status": "late"}]}, "input[0].status"),
    ({"input": [{"role": "user", "content": "x", "id": ""}]}, "input[0].id"),
    ({"input": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}]}]}, "input[0].summary"),
    ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input[0].encrypted_content"),
    ({"input": [{"type": "reasoning", "content": [{"type": "text", "text": "x"}]}]}, "input[0].content[0].type"),
    ({"input": [{"type": "item_reference", "id": "msg_x"}]}, "input[0].type"),
    ({"input": [{**CALL, "arguments": "{"}]}, "input[0].arguments"),
    ({"input": [{**CALL, "arguments": {}}]}, "input[0].arguments"),
    ({"input": [{**CALL, "name": ""}]}, "input[0].name"),
    ({"input": [{**CALL, "call_id": None}]}, "input[0].call_id"),
    ({"input": [{**CALL, "namespace": "x"}]}, "input[0].namespace"),
    ({"input": [CALL, {"type": "function_call_output", "call_id": "d", "output": "x"}]}, "input[1].call_id"),
    ({"input": [CALL, {"type": "function_call_output", "call_id": "c", "output": [IMAGE]}]}, "input[1].output[0].type"),
    ({"messages": []}, "messages"),
    ({"n": 2}, "n"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_what_is_not_had_is_refused_by_name(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/responses", body={**BODY, "max_output_tokens": 2, **fields}, cast_to=object)
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("kind", "sdk"),
    [
        (ResponseRequest, response_create_params.ResponseCreateParamsBase),
        (InputTokensRequest, InputTokenCountParams),
    ],
)
def test_every_field_of_the_sdk_is_known(kind: type[InputTokensRequest], sdk: Any) -> None:
    """Honoured, or accepted at some values and refused at others."""
    for name in typing.get_type_hints(sdk):
        known = name in kind.model_fields
        assert known != (name in kind.neutral), name
        if not known:
            with pytest.raises(RequestError) as refused:
                parse(kind, json.dumps({**BODY, name: "nothing like this"}).encode())
            assert (refused.value.param, refused.value.code) == (name, "unsupported_parameter")


def test_too_long_an_input(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, input="word " * 400)
    assert (refused.value.param, refused.value.code) == ("input", "context_length_exceeded")
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, model="none")
    assert missing.value.code == "model_not_found"


def test_items_of_one_name_are_kept_apart() -> None:
    twice = [{"role": "user", "content": text, "id": "msg_x"} for text in "ab"]
    first, second = response_items.read(twice)
    assert first["id"] == "msg_x" != second["id"]


def test_calls_are_one_turn_with_what_is_said() -> None:
    """As a chat has them, whose messages hold both."""
    said = {"role": "assistant", "content": "Let me see."}
    result = {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "21"}]}
    items = response_items.read([{"role": "user", "content": "x"}, said, CALL, {**CALL, "call_id": "d"}, result, said])
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert response_items.turns(items[:2], items[2:]) == [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": f"Let me see.\n{call}\n{call}"},
        {"role": "user", "content": "<tool_response>21</tool_response>"},
        {"role": "assistant", "content": "Let me see."},
    ]


def test_kept_by_either_database(make_checkpoint: Callable[[str], Path], fresh_database: str) -> None:
    with serving(make_checkpoint("tiny"), database=fresh_database) as service:
        client = service.sdk(_strict_response_validation=True)
        first = ask(client, input="NUL: \0", metadata={"a": "\0"})
        second = ask(client, previous_response_id=first.id)
        assert client.responses.retrieve(first.id) == first
        assert second.usage.input_tokens > first.usage.input_tokens
        for name in ("resp_\0", f"{first.id}\0"):
            with pytest.raises(openai.BadRequestError) as refused:
                ask(client, previous_response_id=name)
            assert refused.value.param == "previous_response_id"
        service.behind.database.write_now(lambda connection: stored_responses.expire(connection, 1 << 40))
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(second.id)


def test_what_is_kept_is_bounded_and_charged(service: Service) -> None:
    """A large request is answered and not kept; what lies in the database is stored like a file."""
    from steelyard.serve.billing import storage
    from steelyard.serve.billing.prices import Price, PriceList

    padded = {"model": "tiny", "input": "Hello", "instructions": " " * (1 << 20)}
    with service.http() as client:
        refused = client.post("/v1/responses", json=padded)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "store"
        assert client.post("/v1/responses", json={"model": "tiny", "input": "Hello"}).status_code == 200
    prices = PriceList(1, {"*": Price(storage=1 << 40)}, 0)
    charges = service.behind.database.read_now(lambda connection: storage.due(connection, prices, 0))
    assert sum(int(charge.note.split()[0]) for charge in charges) > 500
