"""What a response is asked with: items of its `input`, checked, as they are kept, and as turns of a conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from steelyard.errors import RequestError
from steelyard.serve.ids import fresh
from steelyard.serve.protocol.chat import MAX_MESSAGES, ROLES
from steelyard.serve.protocol.fields import accept_neutral, neutral_properties
from steelyard.serve.protocol.tools import check_arguments
from steelyard.text import tool_calls

Item = dict[str, Any]

MAX_ITEMS = MAX_MESSAGES
MAX_NAME = 64
STATUSES = ("in_progress", "completed", "incomplete")
NEUTRAL_OF_MESSAGES: dict[str, tuple[Any, ...]] = {"phase": ()}
NEUTRAL_OF_CALLS: dict[str, tuple[Any, ...]] = {"async": (False,), "caller": (), "namespace": ()}
NEUTRAL_OF_RESULTS: dict[str, tuple[Any, ...]] = {"caller": (), "name": (), "namespace": ()}
NEUTRAL_OF_PARTS: dict[str, tuple[Any, ...]] = {"annotations": ([],), "prompt_cache_breakpoint": ()}
"""Fields of items and parts that are accepted at these values, such as an answer of ours that is sent back has them."""
NEUTRAL_OF_THOUGHTS: dict[str, tuple[Any, ...]] = {"encrypted_content": (), "summary": ([],)}
SPOKEN = ("output_text", "input_text")
"""Types of parts that an assistant's message has; others have the latter alone."""
THOUGHT = ("reasoning_text",)


def _part(*types: str) -> Item:
    properties = {"type": {"enum": list(types)}, "text": {"type": "string"}, "logprobs": {"type": ["array", "null"]}}
    return _object({**neutral_properties(NEUTRAL_OF_PARTS), **properties}, "type", "text")


def _object(properties: Item, *required: str) -> Item:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _content(*types: str) -> Item:
    return {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _part(*types)}]}


_NAME = {"type": "string", "minLength": 1, "maxLength": MAX_NAME}
_OWN = {"id": {"anyOf": [_NAME, {"type": "null"}]}, "status": {"enum": [None, *STATUSES]}}


def _message(roles: list[str], *types: str) -> Item:
    own = {"type": {"enum": ["message", None]}, "role": {"enum": roles}, "content": _content(*types)}
    return _object({**neutral_properties(NEUTRAL_OF_MESSAGES), **_OWN, **own}, "role", "content")


INPUT = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_ITEMS,
            "items": {
                "anyOf": [
                    _message([role for role in ROLES if role != "assistant"], "input_text"),
                    _message(["assistant"], *SPOKEN),
                    _object(
                        {
                            **neutral_properties(NEUTRAL_OF_THOUGHTS),
                            **_OWN,
                            "type": {"const": "reasoning"},
                            "content": {"anyOf": [{"type": "null"}, _content(*THOUGHT)]},
                        },
                        "type",
                    ),
                    _object(
                        {
                            **neutral_properties(NEUTRAL_OF_CALLS),
                            **_OWN,
                            "type": {"const": "function_call"},
                            "call_id": _NAME,
                            "name": {"type": "string", "minLength": 1},
                            "arguments": {"type": "string", "contentMediaType": "application/json"},
                        },
                        "type",
                        "call_id",
                        "name",
                        "arguments",
                    ),
                    _object(
                        {
                            **neutral_properties(NEUTRAL_OF_RESULTS),
                            **_OWN,
                            "type": {"const": "function_call_output"},
                            "call_id": _NAME,
                            "output": _content("input_text"),
                        },
                        "type",
                        "call_id",
                        "output",
                    ),
                ]
            },
        },
    ]
}
"""Input as it is written."""


def read(given: object) -> list[Item]:
    """Items as they are kept and listed, each with an id of its own.

    Raises:
        RequestError: they are none, or have something that no model here reads; the field is named.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not 0 < len(given) <= MAX_ITEMS:
        raise RequestError(f"'input' must be a string or a list of 1 to {MAX_ITEMS} items", param="input")
    items: list[Item] = []
    taken: set[str] = set()
    for number, one in enumerate(given):
        item = _read(one, f"input[{number}]")
        if item["id"] in taken:
            item["id"] = fresh("msg_")
        taken.add(item["id"])
        items.append(item)
    return items


def _read(item: object, path: str) -> Item:
    if not isinstance(item, dict):
        raise RequestError(f"'{path}' must be an object", param=path)
    kind = item.get("type") or ("message" if "role" in item else None)
    reader = _READERS.get(kind) if isinstance(kind, str) else None
    if reader is None:
        wrong = f", not '{kind[:40]}'" if isinstance(kind, str) else ""
        raise RequestError(f"'{path}.type' must be one of {', '.join(_READERS)}{wrong}", param=f"{path}.type")
    return reader(item, path)


def _read_message(item: Item, path: str) -> Item:
    kept = accept_neutral(item, NEUTRAL_OF_MESSAGES, ("type", "id", "status", "role", "content"), f"{path}.")
    role = kept.get("role")
    if not isinstance(role, str) or role not in ROLES:
        wrong = f", not '{role[:40]}'" if isinstance(role, str) else ""
        raise RequestError(f"'{path}.role' must be one of {', '.join(ROLES)}{wrong}", param=f"{path}.role")
    spoken = role == "assistant"
    texts = _texts(kept.get("content"), f"{path}.content", SPOKEN if spoken else SPOKEN[1:])
    more: Item = {"annotations": [], "logprobs": []} if spoken else {}
    content = [{"type": SPOKEN[0] if spoken else SPOKEN[1], "text": text, **more} for text in texts]
    return {**_own(kept, path, "msg_"), "type": "message", "role": role, "content": content}


def _read_call(item: Item, path: str) -> Item:
    known = ("type", "id", "status", "call_id", "name", "arguments")
    kept = accept_neutral(item, NEUTRAL_OF_CALLS, known, f"{path}.")
    name, arguments = kept.get("name"), kept.get("arguments")
    if not isinstance(name, str) or not name:
        raise RequestError(f"'{path}.name' must be the name of a function", param=f"{path}.name")
    if not isinstance(arguments, str):
        raise RequestError(f"'{path}.arguments' must be JSON in a string", param=f"{path}.arguments")
    check_arguments(arguments, f"{path}.arguments")
    call = {"call_id": _name(kept.get("call_id"), f"{path}.call_id"), "name": name, "arguments": arguments}
    return {**_own(kept, path, "fc_"), "type": "function_call", **call}


def _read_result(item: Item, path: str) -> Item:
    kept = accept_neutral(item, NEUTRAL_OF_RESULTS, ("type", "id", "status", "call_id", "output"), f"{path}.")
    output = "\n".join(_texts(kept.get("output"), f"{path}.output", SPOKEN[1:]))
    call = {"call_id": _name(kept.get("call_id"), f"{path}.call_id"), "output": output}
    return {**_own(kept, path, "fco_"), "type": "function_call_output", **call}


def _read_thoughts(item: Item, path: str) -> Item:
    """Taken back with the others, and not read again."""
    kept = accept_neutral(item, NEUTRAL_OF_THOUGHTS, ("type", "id", "status", "content"), f"{path}.")
    content = kept.get("content")
    texts = [] if content is None else _texts(content, f"{path}.content", THOUGHT)
    thoughts = [{"type": THOUGHT[0], "text": text} for text in texts]
    return {**_own(kept, path, "rs_"), "type": "reasoning", "summary": [], "content": thoughts}


_READERS: dict[str, Callable[[Item, str], Item]] = {
    "message": _read_message,
    "reasoning": _read_thoughts,
    "function_call": _read_call,
    "function_call_output": _read_result,
}


def _own(kept: Item, path: str, prefix: str) -> Item:
    """What every item has: an id, a fresh one if it has none, and a status."""
    name, status = kept.get("id"), kept.get("status")
    if status is not None and status not in STATUSES:
        raise RequestError(f"'{path}.status' must be one of {', '.join(STATUSES)}", param=f"{path}.status")
    return {"id": fresh(prefix) if name is None else _name(name, f"{path}.id"), "status": status or "completed"}


def _name(value: object, path: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME:
        raise RequestError(f"'{path}' must be a string of 1 to {MAX_NAME} characters", param=path)
    return value


def _texts(content: object, path: str, types: Sequence[str]) -> list[str]:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list) or not content:
        raise RequestError(f"'{path}' must be a string or a list of text parts", param=path)
    texts: list[str] = []
    for number, part in enumerate(content):
        here = f"{path}[{number}]"
        if not isinstance(part, dict) or part.get("type") not in types:
            reason = f"'{here}.type' must be {' or '.join(types)}: this model reads text only"
            raise RequestError(reason, param=f"{here}.type")
        text = accept_neutral(part, NEUTRAL_OF_PARTS, ("type", "text", "logprobs"), f"{here}.").get("text")
        if not isinstance(text, str):
            raise RequestError(f"'{here}.text' must be a string", param=f"{here}.text")
        texts.append(text)
    return texts


def turns(history: Sequence[Item], items: Sequence[Item]) -> list[dict[str, str]]:
    """Items as a chat template is given them, without thoughts; calls and their results are text, as in a chat's.

    Args:
        history: of responses before.
        items: of this one's input.

    Raises:
        RequestError: a result is that of no call before it; the field is named.
    """
    made: list[dict[str, str]] = []
    called: set[str] = set()
    last = ""
    for number, item in enumerate((*history, *items), -len(history)):
        kind = item["type"]
        if kind == "reasoning":
            continue
        if kind == "function_call_output":
            if item["call_id"] not in called:
                path = f"input[{number}].call_id"
                raise RequestError(f"'{path}' is the id of no call before it", param=path)
            made.append({"role": "user", "content": f"<tool_response>{item['output']}</tool_response>"})
        elif kind == "function_call":
            called.add(item["call_id"])
            _speak(made, tool_calls.written(item["name"], item["arguments"]), goes_on=last in ("said", "called"))
        else:
            text = "\n".join(part["text"] for part in item["content"])
            if item["role"] == "assistant":
                _speak(made, text, goes_on=last == "called")
            else:
                made.append({"role": ROLES[item["role"]], "content": text})
        last = "called" if kind == "function_call" else "said" if item.get("role") == "assistant" else ""
    return made


def _speak(made: list[dict[str, str]], text: str, *, goes_on: bool) -> None:
    """Add what the assistant says; calls, and what is said between them, are of one turn."""
    if goes_on:
        before = made[-1]["content"]
        made[-1] = {"role": "assistant", "content": f"{before}\n{text}" if before else text}
    else:
        made.append({"role": "assistant", "content": text})
