"""Rows of preferences: a prompt, the answer that is preferred, and one that is not; in OpenAI's format.

`{"input": {"messages": [...]}, "preferred_output": [{"role": "assistant", "content"}], "non_preferred_output": [...]}`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from steelyard.data.chat import turns
from steelyard.data.readers import json_kind, json_rows
from steelyard.data.rows import Conversation, Message
from steelyard.errors import DataError

FIELDS = ("input", "preferred_output", "non_preferred_output")
NEUTRAL: dict[str, tuple[Any, ...]] = {"tools": ([], None), "parallel_tool_calls": (True, None)}
"""Fields of `input` that nothing is done with, and the values at which that is right."""


class Preference(msgspec.Struct, frozen=True):
    """Two answers to one prompt, each as a whole conversation of which the last turn alone is learnt."""

    preferred: Conversation
    other: Conversation


def read(path: Path) -> list[Preference]:
    """All rows of a file.

    Raises:
        DataError: a row that is wrong, or no row at all; file, line and field are named.
    """
    found = [_preference(row, path, line) for line, row in json_rows(path)]
    if not found:
        raise DataError("the file has no rows", file=path)
    return found


def _preference(row: dict[str, Any], path: Path, line: int) -> Preference:
    for name in row.keys() - set(FIELDS):
        reason = f"is not known; a row has {', '.join(FIELDS)}"
        raise DataError(reason, file=path, line=line, field=name[:80])
    asked = row.get("input")
    if not isinstance(asked, dict):
        raise DataError(f"an object is needed, not {json_kind(asked)}", file=path, line=line, field="input")
    for name in asked.keys() - {"messages"}:
        if name not in NEUTRAL or asked[name] not in NEUTRAL[name]:
            raise DataError("is not supported here: remove it", file=path, line=line, field=f"input.{name[:80]}")
    prompt = tuple(
        msgspec.structs.replace(turn, trained=False)
        for turn in _turns({"messages": asked.get("messages")}, "input.", path, line)
    )
    if prompt[-1].role == "assistant":
        reason = "ends with the assistant: the answers follow a turn of the user's"
        raise DataError(reason, file=path, line=line, field="input.messages")
    preferred, other = (_answer(row, name, path, line) for name in FIELDS[1:])
    if preferred.content == other.content:
        raise DataError("is the preferred answer itself", file=path, line=line, field=FIELDS[2])
    return Preference(
        Conversation(messages=(*prompt, preferred), file=path, line=line),
        Conversation(messages=(*prompt, other), file=path, line=line),
    )


def _answer(row: dict[str, Any], name: str, path: Path, line: int) -> Message:
    said = row.get(name)
    if not isinstance(said, list) or len(said) != 1:
        raise DataError("a list of one message is needed", file=path, line=line, field=name)
    (message,) = _turns({"messages": said}, f"{name}:", path, line)
    if message.role != "assistant":
        raise DataError("must be the assistant's", file=path, line=line, field=f"{name}[0].role")
    return msgspec.structs.replace(message, trained=True)


def _turns(row: dict[str, Any], prefix: str, path: Path, line: int) -> tuple[Message, ...]:
    """Messages, whose faults are named by where they stand in this format."""
    try:
        return turns(row, path, line)
    except DataError as error:
        field = error.field or "messages"
        named = prefix + field if prefix.endswith(".") else field.replace("messages", prefix[:-1], 1)
        raise DataError(error.reason, file=path, line=line, field=named) from None
