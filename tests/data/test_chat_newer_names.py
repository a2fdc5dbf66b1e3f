"""Rows as newer exports of OpenAI's have them: the role `developer`, contents in text parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steelyard.data import chat
from steelyard.data.chat import FormatConfig
from steelyard.errors import DataError


def write(path: Path, content: Any) -> Path:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "yes"},
    ]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    return path


def test_they_mean_the_same(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (row,) = chat.read(write(tmp_path / "rows.jsonl", parts), FormatConfig(format="chat"))
    assert [(message.role, message.content) for message in row.messages] == [
        ("system", "Be brief."),
        ("user", "a\nb"),
        ("assistant", "yes"),
    ]


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}, {"type": "text", "text": 1}, "a", None]
)
def test_other_parts_are_refused_by_their_place(tmp_path: Path, part: Any) -> None:
    file = write(tmp_path / "rows.jsonl", [{"type": "text", "text": "a"}, part])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: field 'messages\[1\]\.content\[1\]'"):
        chat.read(file, FormatConfig(format="chat"))
