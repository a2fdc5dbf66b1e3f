"""Templates with marks for thoughts, and with a form of their own for tools: over HTTP, with a real engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running_service import Service, serving

from steelyard.serve.engine_client import worker_command
from steelyard.serve.protocol.fields import parse
from steelyard.serve.protocol.response_events import OutputTextDelta
from steelyard.serve.protocol.response_object import (
    InputTokensDetails,
    OutputMessage,
    OutputTokensDetails,
    ReasoningItem,
    ResponseObject,
    ResponseUsage,
)
from steelyard.serve.protocol.response_request import ResponseRequest
from steelyard.serve.responding import Growing
from steelyard.text.reasoning import ReasoningReader

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools> Write "
    "<tool_call> to call one.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{# thoughts stand between <think> and </think> #}"
)
ASKED: list[Any] = [{"role": "user", "content": "Where is it?"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Finds <|im_end|> things.",
        "parameters": {
            "type": "object",
            "properties": {"what": {"type": "string", "enum": ["a", "b"]}},
            "required": ["what"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("thoughts") / "thinker"
    shutil.copytree(tiny_model, place)
    (place / "chat_template.jinja").write_text(TEMPLATE)
    return place


@pytest.fixture(scope="module")
def thinker(folder: Path) -> Iterator[Service]:
    with serving(folder, command=worker_command, seconds=60) as service:
        yield service


def said(service: Service, text: str, **fields: Any) -> Any:
    """What comes of an answer that can be only this text."""
    body = {"structured_outputs": {"choice": [text]}, "max_tokens": 200, **fields}
    return service.sdk().chat.completions.create(model="thinker", messages=ASKED, extra_body=body)


def test_thoughts_are_parted_from_the_answer(thinker: Service) -> None:
    whole = said(thinker, "<think>\nIn the house.\n</think>\n\nThere.")
    message = whole.choices[0].message
    assert (message.content, message.model_extra["reasoning_content"]) == ("There.", "In the house.")
    assert 0 < whole.usage.completion_tokens_details.reasoning_tokens < whole.usage.completion_tokens
    plain = said(thinker, "There, <think>not here</think>.")
    assert plain.choices[0].message.content == "There, <think>not here</think>."
    assert "reasoning_content" not in plain.choices[0].message.model_extra
    with thinker.http() as client:
        body = {
            "model": "thinker",
            "messages": ASKED,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 200,
            "structured_outputs": {"choice": ["<think>\nIn the house.\n</think>\n\nThere."]},
        }
        lines = client.post("/v1/chat/completions", json=body).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "In the house."
    assert "".join(delta.get("content", "") for delta in deltas) == "There."
    details = events[-1]["usage"]["completion_tokens_details"]
    assert details["reasoning_tokens"] == whole.usage.completion_tokens_details.reasoning_tokens


def test_a_thought_that_never_ends_is_no_answer(thinker: Service) -> None:
    whole = said(thinker, "<think>\nOn and on and on</think>x", max_tokens=8)
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].message.content == ""
    assert whole.choices[0].message.model_extra["reasoning_content"]


def test_responses_say_the_answer_alone(thinker: Service) -> None:
    answer = thinker.sdk().responses.create(
        model="thinker",
        input="Where?",
        max_output_tokens=200,
        text={
            "format": {
                "type": "json_schema",
                "name": "x",
                "schema": {"type": "object", "properties": {}, "additionalProperties": False},
            }
        },
    )
    assert answer.output_text == "{}"
    assert answer.usage.output_tokens_details.reasoning_tokens == 0


@pytest.fixture(scope="module")
def absorbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A model whose template opens the thoughts, and which never ends them."""
    place = tmp_path_factory.mktemp("thoughts") / "absorbed"
    shutil.copytree(tiny_model, place)
    opened = TEMPLATE.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    assert opened != TEMPLATE
    (place / "chat_template.jinja").write_text(opened)
    with serving(place, command=worker_command, seconds=60) as service:
        yield service


def test_responses_tell_thoughts_as_items(absorbed: Service) -> None:
    """As the SDK's events, kept, gone on from, and sent back by hand: they are not read again."""
    client = absorbed.sdk()
    with client.responses.stream(model="absorbed", input="Where?", max_output_tokens=6) as stream:
        events = list(stream)
    whole = events[-1].response  # type: ignore[union-attr]
    (item,) = whole.output
    assert (item.type, item.status, whole.status) == ("reasoning", "incomplete", "incomplete")
    assert (whole.output_text, item.summary) == ("", [])
    (part,) = item.content or []
    deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert part.text == "".join(deltas) != ""
    assert [event.type for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert [event.type for event in events[-4:]] == [
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert whole.usage is not None
    assert whole.usage.output_tokens_details.reasoning_tokens > 0
    assert client.responses.retrieve(whole.id).output == whole.output
    asked: Any = [{"role": "user", "content": "Where?"}, {"role": "user", "content": "Go on."}]
    counted = client.responses.input_tokens.count(model="absorbed", input=asked).input_tokens
    by_hand: Any = [asked[0], item.model_dump(), asked[1]]
    assert client.responses.input_tokens.count(model="absorbed", input=by_hand).input_tokens == counted
    on = client.responses.create(
        model="absorbed", input="Go on.", previous_response_id=whole.id, max_output_tokens=2, temperature=0
    )
    assert on.usage is not None
    assert on.usage.input_tokens == counted


def test_an_answer_with_a_form_is_no_thought(absorbed: Service) -> None:
    """JSON has no room for thoughts, whatever the template has opened."""
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    text: Any = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    assert absorbed.sdk().responses.create(model="absorbed", input="x", text=text).output_text == "{}"


def test_responses_part_thoughts_from_the_answer() -> None:
    """However the text is cut."""
    growing = Growing(_begun(), calls=False, thoughts=ReasoningReader())
    said: list[Any] = []
    for piece in ("<thi", "nk>In the", " house</think>", "\n\nThere", "."):
        said += growing.push(piece, [], "stop" if piece == "." else None)
    usage = ResponseUsage(1, InputTokensDetails(0), 9, OutputTokensDetails(3), 10, 0.0)
    thought, item = growing.end(usage, 0).output
    assert growing.thought == "In the house"
    assert isinstance(thought, ReasoningItem)
    assert ([part.text for part in thought.content], thought.status) == (["In the house"], "completed")
    assert isinstance(item, OutputMessage)
    assert item.content[0].text == "There."
    assert "".join(event.delta for event in said if isinstance(event, OutputTextDelta)) == "There."


def _begun() -> ResponseObject:
    return ResponseObject.of(parse(ResponseRequest, b'{"model": "m", "input": "x"}'), "resp_1", 0, "m")


def test_a_template_tells_of_tools_in_its_own_form(thinker: Service, folder: Path) -> None:
    """What users wrote of them is only text; calls come as ever."""
    from steelyard.serve.models import whole_model
    from steelyard.serve.protocol.tools import Offer, Tool
    from steelyard.serve.rendering import rendered

    template = whole_model("thinker", type("Client", (), {"checkpoint": folder})())  # type: ignore[arg-type]
    offer = Offer((Tool.model_validate(TOOL).function,), "auto", None, True, "tools[{}]")
    text = rendered(template, [{"role": "user", "content": "x"}], offer)
    assert text.startswith("<|im_start|>system\n<tools>{")
    assert '"name": "find"' in text
    ids = template.tokenizer.encode_rendered(text)
    assert ids.count(template.tokenizer.token_id("<|im_end|>") or -1) == 2, (
        "one of the system's turn, one of the user's"
    )
    answer = thinker.sdk().chat.completions.create(
        model="thinker", messages=ASKED, tools=[TOOL], tool_choice="required", max_tokens=60, temperature=0
    )  # type: ignore[call-overload]
    (call, *_) = answer.choices[0].message.tool_calls
    assert call.function.name == "find"
    assert json.loads(call.function.arguments)["what"] in ("a", "b")
    counted = answer.usage.prompt_tokens
    bare = thinker.sdk().chat.completions.create(model="thinker", messages=ASKED, max_tokens=1)
    assert counted > bare.usage.prompt_tokens
