"""Calls in texts, however these are cut; and a grammar that lets through nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.errors import RequestError
from steelyard.text import grammar
from steelyard.text.tool_calls import OPEN, Arguments, Begun, CallReader, Said, written

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
arguments = st.dictionaries(st.text(max_size=8), json_values, max_size=4)


def read(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """What was said, and each call's name and arguments."""
    reader, said, calls = CallReader(), "", list[list[str]]()
    for piece in [found for text in pieces for found in reader.push(text)] + reader.flush():
        match piece:
            case Said(text):
                said += text
            case Begun(number, name):
                assert number == len(calls)
                calls.append([name, ""])
            case Arguments(number, text):
                calls[number][1] += text
    assert reader.whole == reader.calls == len(calls)
    return said, [(name, given) for name, given in calls]


@settings(max_examples=100)
@given(
    st.text(max_size=20).filter(lambda text: "<" not in text),
    st.lists(st.tuples(st.text(min_size=1, max_size=8), arguments), max_size=3),
    st.lists(st.integers(1, 9), min_size=1, max_size=20),
)
def test_calls_are_found_however_the_text_is_cut(before: str, calls: list[tuple[str, Any]], sizes: list[int]) -> None:
    wanted = [(name, json.dumps(given, ensure_ascii=False)) for name, given in calls]
    whole = before + "\n".join(written(name, given) for name, given in wanted)
    pieces, at, turn = [], 0, 0
    while at < len(whole):
        size = sizes[turn % len(sizes)]
        pieces.append(whole[at : at + size])
        at, turn = at + size, turn + 1
    assert read(pieces) == (before, wanted)
    assert read([whole]) == (before, wanted)


def test_what_only_looks_like_a_mark_is_text() -> None:
    assert read(["a <tool", "_ca", "ke> and <", " b"]) == ("a <tool_cake> and < b", [])
    assert read(["1 < 2"]) == ("1 < 2", [])


def test_arguments_come_as_they_are_written() -> None:
    reader = CallReader()
    assert reader.push(f'so: {OPEN}{{"name": "f", "argu') == [Said("so: ")]
    assert reader.push('ments": {"a": "}<') == [Begun(0, "f"), Arguments(0, '{"a": "}<')]
    assert reader.push('/tool_call>"') == [Arguments(0, '/tool_call>"')]
    assert reader.push("}}</tool_call>") == [Arguments(0, "}")]
    assert (reader.calls, reader.whole) == (1, 1)


def test_a_tool_whose_arguments_cannot_be_kept_is_named() -> None:
    tools = [("f", {"type": "object"}, "tools[0]"), ("g", {"not": {}}, "tools[1]")]
    with pytest.raises(RequestError, match=r"tools\[1\]"):
        grammar.of_calls(tools, text=True, several=True, param="tools")
