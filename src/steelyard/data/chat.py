"""The formats of rows: OpenAI's chat JSONL, instruction JSONL, labelled rows, plain text -> conversations.

Every complaint names file, line, field and reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from steelyard.data.readers import FORMATS, PARQUET, detect, json_kind, json_row, json_rows, lines, table_rows
from steelyard.data.rows import ROLES, Conversation, Message
from steelyard.errors import ConfigError, DataError

MAX_MESSAGES = 2048
DOCUMENT = 8 << 20
"""Characters of a .txt file after which another document begins, where two lines with words meet; at the latest after
as many again.
"""
DEFAULT_TEMPLATE = "Classify the text as {labels}.\n\nText: {text}"


class FormatConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How the rows of a file are read."""

    format: str = "auto"
    """`chat`, `instruction`, `labelled`, `text`, or `auto`: by the ending and the first row."""
    columns: tuple[str, ...] | None = None
    """Names of the columns of a CSV or TSV file whose first line is no header."""
    text: str = "text"
    """Labelled and text rows: the field that holds the text."""
    label: str = "label"
    """Labelled rows: the field that holds the label."""
    image: str = "image"
    """Lists of images: the field that holds a path, relative to the list."""
    audio: str = "audio"
    """Lists of recordings: the field that holds a path, relative to the list."""
    tokens: str = "tokens"
    """Tagged rows: the field that holds a sentence's words."""
    tags: str = "tags"
    """Tagged rows: the field that holds their tags."""
    labels: tuple[str, ...] = ()
    """Labelled rows: all labels; empty takes those of the file, sorted."""
    template: str = DEFAULT_TEMPLATE
    """Labelled rows: the user's turn; {text} and {labels} are filled in."""
    system: str | None = None
    """Labelled and instruction rows: a system turn before the user's."""


def read(path: Path, config: FormatConfig | None = None) -> list[Conversation]:
    """All rows of a file as conversations. Raises as `iterate` does."""
    return list(iterate(path, config))


def iterate(path: Path, config: FormatConfig | None = None) -> Iterator[Conversation]:
    """The rows of a file one after the other; but labelled ones are held together, for their labels.

    Raises:
        DataError: a row that is wrong, or no row at all.
        ConfigError: a format that is not known.
    """
    config = config or FormatConfig()
    format_ = detect(path) if config.format == "auto" else config.format
    if format_ not in READERS:
        raise ConfigError(f"data.format '{format_}' is not known; known: auto, {', '.join(FORMATS)}")
    conversation = None
    for conversation in READERS[format_](path, config):
        yield conversation
    if conversation is None:
        raise DataError("the file has no rows", file=path)


def chat(path: Path, config: FormatConfig) -> Iterator[Conversation]:
    """OpenAI's fine-tuning format: `{"messages": [{"role", "content", "weight"?}, ...]}`."""
    for line, row in json_rows(path):
        yield _conversation(row, path, line)


def problems(path: Path, most: int = 100) -> list[DataError]:
    """What is wrong with the first lines of a chat file that are, one thing a line; empty: all is well."""
    found: list[DataError] = []
    rows = 0
    try:
        for line, content in lines(path):
            if not content.strip():
                continue
            rows += 1
            try:
                _conversation(json_row(content, path, line), path, line)
            except DataError as error:
                found.append(error)
                if len(found) == most:
                    break
        if not rows:
            raise DataError("the file has no rows", file=path)
    except DataError as error:
        found.append(error)
    return found


def _conversation(row: dict[str, Any], path: Path, line: int) -> Conversation:
    _only(row, {"messages"}, path, line)
    messages = turns(row, path, line)
    if not any(turn.role == "assistant" and turn.trained for turn in messages):
        reason = "no message of the assistant to learn from"
        raise DataError(reason, file=path, line=line, field="messages")
    return Conversation(messages=messages, file=path, line=line)


def turns(row: dict[str, Any], path: Path, line: int) -> tuple[Message, ...]:
    """The messages of a row in OpenAI's chat format, checked; at least one.

    Raises:
        DataError: one that is none; the field is `messages[index]` or one in it.
    """
    raw = row.get("messages")
    if not isinstance(raw, list) or not raw:
        raise DataError("a list of messages is needed", file=path, line=line, field="messages")
    if len(raw) > MAX_MESSAGES:
        raise DataError(f"over {MAX_MESSAGES} messages", file=path, line=line, field="messages")
    return tuple(_message(item, index, path, line) for index, item in enumerate(raw))


def _message(item: Any, index: int, path: Path, line: int) -> Message:
    field = f"messages[{index}]"
    if not isinstance(item, dict):
        raise DataError(f"an object is needed, not {json_kind(item)}", file=path, line=line, field=field)
    _only(item, {"role", "content", "weight"}, path, line, f"{field}.")
    role = item.get("role")
    role = "system" if role == "developer" else role  # OpenAI's newer name for it
    if role not in ROLES:
        given = f"'{role}'" if isinstance(role, str) else json_kind(role)
        reason = f"must be one of {', '.join(ROLES)}, not {given}"
        raise DataError(reason, file=path, line=line, field=f"{field}.role")
    content = _text_of(item.get("content"), path, line, f"{field}.content")
    if not isinstance(content, str) or not content.strip():
        what = "is empty" if isinstance(content, str) else f"must be a string, not {json_kind(content)}"
        raise DataError(what, file=path, line=line, field=f"{field}.content")
    weight = item.get("weight", 1)
    if weight not in (0, 1) or isinstance(weight, bool):
        raise DataError(f"must be 0 or 1, not {weight!r}", file=path, line=line, field=f"{field}.weight")
    return Message(role, content, weight == 1)


def _text_of(content: Any, path: Path, line: int, field: str) -> Any:
    """The text parts of a content that is a list of them, joined as in a request; any other content as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for number, part in enumerate(content):
        known = isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
        if not known or not isinstance(part["text"], str):
            raise DataError(
                'must be a text part, {"type": "text", "text": ...}', file=path, line=line, field=f"{field}[{number}]"
            )
        texts.append(part["text"])
    return "\n".join(texts)


def instruction(path: Path, config: FormatConfig) -> Iterator[Conversation]:
    """Instruction JSONL: `{"instruction", "input"?, "output"}` (Alpaca's fields)."""
    for line, row in json_rows(path):
        _only(row, {"instruction", "input", "output"}, path, line)
        asked = _string(row, "instruction", path, line)
        given = "" if row.get("input") is None else row["input"]
        if not isinstance(given, str):
            raise DataError(f"must be a string, not {json_kind(given)}", file=path, line=line, field="input")
        question = Message("user", f"{asked}\n\n{given}" if given else asked)
        answer = Message("assistant", _string(row, "output", path, line))
        yield Conversation(messages=_with_system(config, [question, answer]), file=path, line=line)


def labelled(path: Path, config: FormatConfig) -> Iterator[Conversation]:
    """CSV, TSV or JSONL with a text and a label, turned into chat by the template."""
    tabular = path.suffix.lower() in (".csv", ".tsv")
    rows = table_rows(path, config.columns) if tabular else json_rows(path)
    pairs = []
    for line, row in rows:
        pairs.append((line, _string(row, config.text, path, line), _string(row, config.label, path, line).strip()))
    labels = config.labels or tuple(sorted({label for _, _, label in pairs}))
    if config.labels:
        check_labels(labels)
    elif len(labels) == 1:
        reason = f"one label only ('{labels[0]}'): at least two are needed; if the others are rare, set data.labels"
        raise DataError(reason, file=path, field=config.label)
    for line, text, label in pairs:
        if label not in labels:
            reason = f"'{label}' is not one of {', '.join(labels)}"
            raise DataError(reason, file=path, line=line, field=config.label)
        asked = [Message("user", ask(text, labels, config.template)), Message("assistant", label)]
        yield Conversation(messages=_with_system(config, asked), label=label, text=text, file=path, line=line)


def texts(path: Path, config: FormatConfig) -> Iterator[Conversation]:
    """CSV, TSV or JSONL with a text; a label is not looked at. Raises DataError: a row without one."""
    tabular = path.suffix.lower() in (".csv", ".tsv")
    if path.suffix.lower() == ".txt":
        raise DataError("texts come as rows here: JSONL, CSV or TSV, each with a text", file=path)
    for line, row in table_rows(path, config.columns) if tabular else json_rows(path):
        found = _string(row, config.text, path, line)
        yield Conversation(messages=(Message("text", found),), text=found, file=path, line=line)


def asked(text: str, config: FormatConfig, path: Path | None, line: int | None) -> Conversation:
    """Which of the labels a text has, not answered yet."""
    question = [Message("user", ask(text, config.labels, config.template))]
    return Conversation(messages=_with_system(config, question), file=path, line=line)


def ask(text: str, labels: tuple[str, ...], template: str = DEFAULT_TEMPLATE) -> str:
    """The user's turn for a text to be labelled. Only {labels} and {text} are filled in; nothing is evaluated.

    Raises:
        ConfigError: the template has no {text}.
    """
    if "{text}" not in template:
        raise ConfigError("data.template has no {text}: the text would never be shown")
    return text.strip().join(part.replace("{labels}", " or ".join(labels)) for part in template.split("{text}"))


def check_labels(labels: tuple[str, ...]) -> None:
    """Refuse labels that are no choice.

    Raises:
        ConfigError: fewer than two, one that is empty or begins or ends with a space, or one that is there twice.
    """
    if len(labels) < 2:
        raise ConfigError(f"data.labels names {len(labels)}: at least two are needed")
    for label in labels:
        if not label or label != label.strip() or labels.count(label) > 1:
            what = "is there twice" if labels.count(label) > 1 else "is empty, or begins or ends with a space"
            raise ConfigError(f"data.labels: '{label}' {what}; known: {', '.join(labels)}")


def text(path: Path, config: FormatConfig) -> Iterator[Conversation]:
    """Plain text: a JSONL row is a document. A .txt file is one, too; one of many megabytes is cut into several."""
    if path.suffix.lower() in (".jsonl", ".ndjson", PARQUET):
        for line, row in json_rows(path):
            content = _string(row, config.text, path, line)
            yield Conversation(messages=(Message("text", content),), file=path, line=line)
        return
    piece: list[str] = []
    first, size = 1, 0
    for line, content in lines(path):
        between = bool(piece) and bool(piece[-1].strip()) and bool(content[:1].strip())  # no token reaches over it
        if (size >= DOCUMENT and between) or size >= 2 * DOCUMENT:
            yield from _document(piece, path, first)
            piece, first, size = [], line, 0
        piece.append(content)
        size += len(content) + 1
    yield from _document(piece, path, first)


def _document(piece: list[str], path: Path, line: int) -> Iterator[Conversation]:
    content = "\n".join(piece)
    if content.strip():
        yield Conversation(messages=(Message("text", content),), file=path, line=line)


READERS: dict[str, Callable[[Path, FormatConfig], Iterator[Conversation]]] = {
    "chat": chat,
    "instruction": instruction,
    "labelled": labelled,
    "text": text,
}


def _with_system(config: FormatConfig, turns: list[Message]) -> tuple[Message, ...]:
    return tuple(turns if config.system is None else [Message("system", config.system), *turns])


def _string(row: dict[str, Any], field: str, path: Path, line: int) -> str:
    value = row.get(field)
    if value is None:
        known = ", ".join(row) or "nothing"
        hint = ""
        if path.suffix.lower() in (".csv", ".tsv"):
            hint = (
                "; say which columns are meant (--set text=COLUMN --set label=COLUMN), or, if the first line is no "
                "header, name all (data.columns, or --columns a,b)"
            )
        what = "is null" if field in row else f"is missing; the row has: {known}{hint}"
        raise DataError(what, file=path, line=line, field=field)
    if not isinstance(value, str) or not value.strip():
        what = "is empty" if isinstance(value, str) else f"must be a string, not {json_kind(value)}"
        raise DataError(what, file=path, line=line, field=field)
    return value


def _only(row: dict[str, Any], known: set[str], path: Path, line: int, prefix: str = "") -> None:
    for field in row:
        if field not in known:
            reason = f"is not known here; known: {', '.join(sorted(known))}"
            raise DataError(reason, file=path, line=line, field=f"{prefix}{field}")
