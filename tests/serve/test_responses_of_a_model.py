"""`/v1/responses` of a real, tiny, untrained model: functions, structured output, a chain, by the SDK."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import openai
import pydantic
import pytest
from running_service import Service, serving

from steelyard.serve.engine_client import worker_command


class Verdict(pydantic.BaseModel):
    kind: Literal["ham", "spam"]
    score: Annotated[int, pydantic.Field(ge=0, le=9)]


class Add(pydantic.BaseModel, extra="forbid"):
    """Add two numbers."""

    a: Annotated[int, pydantic.Field(ge=0, le=99)]
    b: Annotated[int, pydantic.Field(ge=0, le=99)]


class Weather(pydantic.BaseModel, extra="forbid"):
    city: Literal["Rome", "Oslo"]


TOOLS: list[Any] = [
    {"type": "function", "name": kind.__name__, "strict": True, "parameters": kind.model_json_schema()}
    for kind in (Add, Weather)
]


@pytest.fixture(scope="module")
def real(make_checkpoint: Callable[[str], Path]) -> Iterator[Service]:
    pytest.importorskip("torch")
    from families import make

    folder = make_checkpoint("real")
    make(folder, "smollm", vocab_size=512, max_position_embeddings=2048)
    with serving(folder, command=worker_command, seconds=60) as service:
        yield service


@pytest.fixture
def client(real: Service) -> openai.OpenAI:
    return real.sdk(_strict_response_validation=True)


def ask(client: openai.OpenAI, **options: Any) -> Any:
    """`seed` is ours."""
    seed = options.pop("seed", 1)
    options = {"model": "real", "input": "Hello", "max_output_tokens": 80, **options}
    return client.responses.create(**options, extra_body={"seed": seed})


def test_it_says_what_a_chat_says(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="real", messages=[{"role": "user", "content": "Hello"}], max_tokens=24, seed=7
    )
    told = ask(client, max_output_tokens=24, seed=7)
    assert told.output_text == chat.choices[0].message.content
    streamed = list(ask(client, max_output_tokens=24, seed=7, stream=True))
    assert "".join(event.delta for event in streamed if event.type == "response.output_text.delta") == told.output_text


def test_the_sdk_parses_what_a_schema_says(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "real", "input": "Hello", "max_output_tokens": 80, "extra_body": {"seed": 1}}
    parsed = client.responses.parse(**options, text_format=Verdict)
    assert isinstance(parsed.output_parsed, Verdict)
    assert (parsed.status, parsed.incomplete_details) == ("completed", None)
    assert parsed.completed_at is not None
    assert parsed.text is not None
    assert parsed.text.format is not None
    assert parsed.text.format.type == "json_schema"
    with client.responses.stream(**options, text_format=Verdict) as stream:
        done = [event for event in stream if event.type == "response.output_text.done"]
        final = stream.get_final_response()
    assert final.output_parsed == parsed.output_parsed == done[0].parsed
    told = ask(client, text={"format": {"type": "json_object"}}, max_output_tokens=120)
    assert told.status == "incomplete" or json.loads(told.output_text) is not None


def test_a_function_is_called_and_answered(client: openai.OpenAI) -> None:
    """Required, by name, whole and as events; the result goes back by the chain and by hand."""
    for seed in range(3):
        asked = ask(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=seed)
        (call,) = asked.output
        {"Add": Add, "Weather": Weather}[call.name].model_validate_json(call.arguments)
        assert (call.type, call.status, asked.status) == ("function_call", "completed", "completed")
        assert (asked.tool_choice, asked.parallel_tool_calls) == ("required", False)
        assert [tool.name for tool in asked.tools] == ["Add", "Weather"]
        events = list(
            ask(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=seed, stream=True)
        )
        kinds = [event.type for event in events if event.type != "response.function_call_arguments.delta"]
        assert kinds == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.completed",
        ]
        given = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        assert "".join(given) == events[-1].response.output[0].arguments == call.arguments
        assert (events[2].item.name, events[2].item.arguments) == (call.name, "")
    named = ask(client, tools=TOOLS, tool_choice={"type": "function", "name": "Weather"})
    assert [call.name for call in named.output] == ["Weather"]
    assert named.tool_choice.name == "Weather"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "21"}
    told = ask(client, previous_response_id=asked.id, input=[result], tools=TOOLS, tool_choice="none", seed=2)
    by_hand = [{"role": "user", "content": "Hello"}, *(item.to_dict() for item in asked.output), result]
    again = ask(client, input=by_hand, tools=TOOLS, tool_choice="none", seed=2)
    assert told.output_text == again.output_text
    assert told.usage.input_tokens == again.usage.input_tokens
    assert [one.type for one in client.responses.input_items.list(told.id)] == ["function_call_output"]


def test_several_calls_and_the_sdks_stream(client: openai.OpenAI) -> None:
    counts, ids = set(), list[str]()
    for seed in range(8):
        asked = ask(client, tools=TOOLS, tool_choice="required", seed=seed, max_output_tokens=180)
        counts.add(len(asked.output))
        ids += [item.call_id for item in asked.output] + [item.id for item in asked.output]
        assert all(item.status == "completed" for item in asked.output[:-1])
    assert max(counts) > 1
    assert len(set(ids)) == len(ids)
    options: dict[str, Any] = {"model": "real", "input": "Hello", "max_output_tokens": 80, "extra_body": {"seed": 1}}
    chosen: Any = {"type": "function", "name": "Add"}
    with client.responses.stream(**options, tools=[openai.pydantic_function_tool(Add)], tool_choice=chosen) as stream:
        final = stream.get_final_response()
    assert all(isinstance(item.parsed_arguments, Add) for item in final.output if item.type == "function_call")


def test_it_may_just_speak(client: openai.OpenAI) -> None:
    told = ask(client, tools=TOOLS, max_output_tokens=20)
    plain = ask(client, max_output_tokens=20)
    assert told.output
    assert told.usage.input_tokens > plain.usage.input_tokens + 20
    events = list(ask(client, tools=TOOLS, max_output_tokens=20, stream=True))
    assert [item.type for item in events[-1].response.output] == [item.type for item in told.output]
    cut = ask(client, tools=TOOLS, tool_choice="required", max_output_tokens=12)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert all(item.status == "incomplete" for item in cut.output[-1:])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}},
            "text.format.schema",
        ),
        ({"tools": [{**TOOLS[0], "parameters": {"not": {}}}]}, "tools[0].parameters"),
    ],
)
def test_a_schema_that_is_not_kept_is_refused(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **fields)
    assert refused.value.param == param
