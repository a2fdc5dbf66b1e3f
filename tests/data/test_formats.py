"""Every format read, and every complaint about a row: file, line, field and reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steelyard.data import chat
from steelyard.data.chat import FormatConfig, ask, read
from steelyard.data.readers import MAX_LINE_BYTES, detect
from steelyard.data.rows import Conversation
from steelyard.errors import ConfigError, DataError

USER = '{"role": "user", "content": "hi"}'
ANSWER = '{"role": "assistant", "content": "yes"}'
GOOD_CHAT = f'{{"messages": [{USER}, {ANSWER}]}}'
GOOD_INSTRUCTION = '{"instruction": "add", "input": "1 2", "output": "3"}'
GOOD_LABELLED = '{"text": "a", "label": "ham"}\n{"text": "b", "label": "spam"}'


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def turns(row: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in row.messages]


def test_chat(tmp_path: Path) -> None:
    silent = '{"role": "assistant", "content": "no", "weight": 0}'
    system = '{"role": "system", "content": "be brief"}'
    path = write(
        tmp_path, "rows.jsonl", f'{GOOD_CHAT}\n\n{{"messages": [{system}, {USER}, {silent}, {USER}, {ANSWER}]}}'
    )
    first, second = read(path)
    assert turns(first) == [("user", "hi"), ("assistant", "yes")]
    assert (first.file, first.line, first.label) == (path, 1, None)
    assert second.line == 3, "blank lines count"
    assert [message.trained for message in second.messages] == [True, True, False, True, True]


def test_instruction(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", GOOD_INSTRUCTION + '\n{"instruction": "greet", "output": "hello"}\n')
    first, second = read(path, FormatConfig(system="be brief"))
    assert turns(first) == [("system", "be brief"), ("user", "add\n\n1 2"), ("assistant", "3")]
    assert turns(second)[1:] == [("user", "greet"), ("assistant", "hello")]


def test_labelled(tmp_path: Path) -> None:
    rows = read(write(tmp_path, "rows.jsonl", GOOD_LABELLED), FormatConfig(template="{labels}? {text}"))
    assert [turns(row) for row in rows] == [
        [("user", "ham or spam? a"), ("assistant", "ham")],
        [("user", "ham or spam? b"), ("assistant", "spam")],
    ]
    assert [row.label for row in rows] == ["ham", "spam"]


def test_text(tmp_path: Path) -> None:
    (document,) = read(write(tmp_path, "book.txt", "One.\r\n\r\nTwo.\n"))
    assert turns(document) == [("text", "One.\n\nTwo.")]
    rows = read(write(tmp_path, "books.jsonl", '{"text": "One."}\n{"text": "Two."}\n'))
    assert [turns(row) for row in rows] == [[("text", "One.")], [("text", "Two.")]]


def test_csv_with_quoted_fields_over_several_lines(tmp_path: Path) -> None:
    content = 'text,label\n"one\ntwo, ""quoted""",ham\nthree,spam\n'
    first, second = read(write(tmp_path, "rows.csv", content), FormatConfig(template="{text}"))
    assert turns(first)[0] == ("user", 'one\ntwo, "quoted"')
    assert (first.line, second.line) == (2, 4), "a row has the line that it begins in"


def test_tsv_has_no_quoting_and_may_have_no_header(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.tsv", 'ham\tsay "hi\nspam\t"buy" now\n')
    first, second = read(path, FormatConfig(columns=("label", "text"), template="{text}"))
    assert (turns(first)[0][1], first.label, first.line) == ('say "hi', "ham", 1)
    assert (turns(second)[0][1], second.label, second.line) == ('"buy" now', "spam", 2)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv"])
def test_byte_order_mark_and_carriage_returns_change_nothing(tmp_path: Path, suffix: str) -> None:
    content = {
        "jsonl": GOOD_LABELLED,
        "csv": "text,label\na,ham\nb,spam\n",
        "tsv": "text\tlabel\na\tham\nb\tspam\n",
    }[suffix]
    plain = read(write(tmp_path, f"plain.{suffix}", content))
    windows = read(write(tmp_path, f"windows.{suffix}", b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode()))
    assert [(turns(row), row.label, row.line) for row in windows] == [
        (turns(row), row.label, row.line) for row in plain
    ]


@pytest.mark.parametrize(
    ("name", "content", "format_"),
    [
        ("a.jsonl", GOOD_CHAT, "chat"),
        ("a.ndjson", GOOD_INSTRUCTION, "instruction"),
        ("a.jsonl", GOOD_LABELLED, "labelled"),
        ("a.JSONL", '\n{"text": "a"}', "text"),
        ("a.csv", "", "labelled"),
        ("a.tsv", "", "labelled"),
        ("a.txt", "", "text"),
        ("a.md", "", "text"),
    ],
)
def test_detect(tmp_path: Path, name: str, content: str, format_: str) -> None:
    assert detect(write(tmp_path, name, content)) == format_


@pytest.mark.parametrize(
    ("name", "content", "line", "reason"),
    [
        ("a.jsonl", '\n{"prompt": 1}', 2, "set data.format"),
        ("a.jsonl", "", None, "the file is empty"),
        ("a.orc", "PAR1", None, "known: .jsonl .csv .tsv .txt"),
    ],
)
def test_what_cannot_be_detected(tmp_path: Path, name: str, content: str, line: int | None, reason: str) -> None:
    with pytest.raises(DataError, match=r"cannot tell|is empty") as caught:
        detect(write(tmp_path, name, content))
    assert caught.value.line == line
    assert reason in caught.value.reason


def turn(**fields: Any) -> str:
    return f'{{"messages": [{json.dumps({"role": "user", "content": "hi"} | fields)}, {ANSWER}]}}'


BAD_ROWS = [
    # format, row, field, part of the reason
    ("chat", "{", None, "not JSON: Expecting property name"),
    ("chat", "[1]", None, "a JSON object is needed, not an array"),
    ("chat", '"a"', None, "not a string"),
    ("chat", '{"messages": NaN}', None, "NaN is no finite number"),
    ("chat", '{"messages": 1e999}', None, "1e999 is no finite number"),
    ("chat", f'{{"messages": {"9" * 5000}}}', None, "too many digits"),
    ("chat", "[" * 100_000, None, "nested too deeply"),
    ("chat", '{"messages": [], "messages": []}', "messages", "is there twice"),
    ("chat", '{"messages": ["\\ud800"]}', "messages", "lone surrogate"),
    ("chat", '{"messages": [], "tools": []}', "tools", "is not known here; known: messages"),
    ("chat", "{}", "messages", "a list of messages is needed"),
    ("chat", '{"messages": []}', "messages", "a list of messages is needed"),
    ("chat", '{"messages": {}}', "messages", "a list of messages is needed"),
    ("chat", f'{{"messages": [{", ".join([ANSWER] * 2049)}]}}', "messages", "over 2048 messages"),
    ("chat", f'{{"messages": [{USER}]}}', "messages", "no message of the assistant"),
    ("chat", f'{{"messages": [{USER}, {ANSWER[:-1]}, "weight": 0}}]}}', "messages", "no message of the assistant"),
    ("chat", f'{{"messages": [{USER}, 3]}}', "messages[1]", "an object is needed"),
    ("chat", turn(name="x"), "messages[0].name", "is not known here; known: content, role, weight"),
    ("chat", turn(role="tool"), "messages[0].role", "must be one of system, user, assistant, not 'tool'"),
    ("chat", turn(role=["user"]), "messages[0].role", "must be one of"),
    ("chat", turn(content=""), "messages[0].content", "is empty"),
    ("chat", turn(content=None), "messages[0].content", "must be a string"),
    ("chat", turn(content=[{"type": "text"}]), "messages[0].content[0]", "must be a text part"),
    ("chat", turn(weight=0.5), "messages[0].weight", "must be 0 or 1, not 0.5"),
    ("chat", turn(weight=True), "messages[0].weight", "must be 0 or 1, not True"),
    ("chat", turn(weight=[1]), "messages[0].weight", "must be 0 or 1"),
    ("instruction", '{"output": "3"}', "instruction", "is missing; the row has: output"),
    ("instruction", '{"instruction": "a", "output": ""}', "output", "is empty"),
    ("instruction", '{"instruction": "a", "input": 3, "output": "b"}', "input", "must be a string"),
    ("instruction", '{"instruction": "a", "output": "b", "text": "c"}', "text", "is not known here"),
    ("labelled", '{"text": "a"}', "label", "is missing; the row has: text"),
    ("labelled", '{"text": " ", "label": "ham"}', "text", "is empty"),
    ("labelled", '{"text": "a", "label": 1}', "label", "must be a string"),
    ("labelled", '{"text": "a", "label": "eggs"}', "label", "'eggs' is not one of ham, spam"),
    ("text", '{"text": 3}', "text", "must be a string"),
    ("text", '{"content": "a"}', "text", "is missing; the row has: content"),
]
GOOD = {
    "chat": GOOD_CHAT,
    "instruction": GOOD_INSTRUCTION,
    "labelled": '{"text": "a", "label": "ham"}',
    "text": '{"text": "a"}',
}


@pytest.mark.parametrize(
    ("format_", "row", "field", "reason"), BAD_ROWS, ids=[f"{bad[0]}-{bad[1][:40]}" for bad in BAD_ROWS]
)
def test_a_bad_row(tmp_path: Path, format_: str, row: str, field: str | None, reason: str) -> None:
    path = write(tmp_path, "rows.jsonl", f"{GOOD[format_]}\n{row}\n")
    with pytest.raises(DataError) as caught:
        read(path, FormatConfig(format=format_, labels=("ham", "spam")))
    error = caught.value
    assert (error.file, error.line, error.field) == (path, 2, field)
    assert reason in error.reason
    where = f"{path}:2: " + (f"field '{field}': " if field else "")
    assert str(error).startswith(where)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("name", "content", "line", "field", "reason"),
    [
        ("a.csv", "text,label\na,ham\nb\n", 3, None, "1 fields where the header has 2 (text, label)"),
        ("a.csv", 'text,label\n"a\nb",ham\nc,"d" e\n', 4, None, "not CSV"),
        ("a.csv", 'text,label\n"a,ham\n', 2, None, "not CSV"),
        ("a.tsv", "text\tlabel\na\tham\tb\n", 2, None, "3 fields where the header has 2"),
        ("a.csv", "text,label,text\n", 1, "text", "two columns have this name"),
        ("a.csv", "text,class\na,ham\n", 2, "label", "is missing; the row has: text, class"),
        ("a.csv", "text,label\na,ham\n", None, "label", "one label only ('ham')"),
        ("a.csv", "text,label\n", None, None, "the file has no rows"),
        ("a.txt", " \n", None, None, "the file has no rows"),
        ("a.txt", b"fine\n\xff\n", 2, None, "byte 0 is not UTF-8"),
        ("a.txt", b"x" * (MAX_LINE_BYTES + 1), 1, None, "the line is over 8 MB"),
    ],
)
def test_a_bad_table_or_text(
    tmp_path: Path, name: str, content: str | bytes, line: int | None, field: str | None, reason: str
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert (caught.value.file, caught.value.line, caught.value.field) == (path, line, field)
    assert reason in caught.value.reason


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="this is a folder"):
        read(tmp_path)


def test_a_format_that_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.format 'alpaca' is not known; known: auto, chat, instruction"):
        read(write(tmp_path, "rows.jsonl", GOOD_CHAT), FormatConfig(format="alpaca"))
    assert set(chat.READERS) == {"chat", "instruction", "labelled", "text"}


@given(st.text(min_size=1).filter(str.strip))
def test_a_template_fills_in_text_and_labels_and_nothing_else(text: str) -> None:
    asked = ask(text, ("ham", "spam"), "{0} {text.__class__} {labels}: {text} {{ 7 * 7 }}")
    assert asked == "{0} {text.__class__} ham or spam: " + text.strip() + " {{ 7 * 7 }}"


def test_a_text_cannot_bring_labels_of_its_own() -> None:
    assert ask("{labels} {text}", ("a", "b"), "{labels}: {text}") == "a or b: {labels} {text}"
    with pytest.raises(ConfigError, match=r"data\.template has no \{text\}"):
        ask("x", ("a", "b"), "Classify.")
