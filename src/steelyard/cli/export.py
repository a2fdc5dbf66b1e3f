"""`steelyard export`: a checkpoint in another program's format."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from steelyard.checkpoint.sources import resolve
from steelyard.cli import console
from steelyard.stages import export as stage
from steelyard.stages import export_onnx
from steelyard.stages.export import Kind

app = typer.Typer(no_args_is_help=True, help="Write a checkpoint in another program's format.")


@app.callback()
def _family() -> None:
    pass


@app.command(
    help=console.examples(
        "A language model as one GGUF file, for llama.cpp and what is built on it. An adapter is merged into its base "
        "first. Integers that a compressed checkpoint has are kept as they are where the type holds them: those of 8 "
        "bits in q8_0, those of 4 in both, if as many inputs share a scale as divide by 32.",
        "export gguf runs/sms/best --output sms.gguf",
        "export gguf models/sms-int4 --output sms.gguf --type q4_0",
    )
)
def gguf(
    checkpoint: Annotated[str, typer.Argument(help="A model or adapter: a folder or a source.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file, NAME.gguf.")],
    kind: Annotated[Kind, typer.Option("--type", help="Of matrices; embedding and head: 8 bits at least.")] = "q8_0",
    as_json: console.Json = False,
) -> None:
    """See its help."""
    console.logs()
    with console.counting("writing") as report:
        made = stage.gguf(resolve(checkpoint), output, kind, report)
    kept = f", {made.kept} matrices' integers as they were" if made.kept else ""
    told = f"{made.kind}, {made.bytes / 1e6:.1f} MB{kept}: [bold]{escape(str(output))}[/bold]"
    console.result(dataclasses.asdict(made), as_json, table=told)


@app.command(
    help=console.examples(
        "An encoder of sentences, a classifier of texts or images, or a tagger as one ONNX file, for onnxruntime and "
        "whatever else reads it (extra onnx). It takes any number of rows; labels are in its metadata. A compressed "
        "checkpoint is written as the numbers that its integers stand for. Texts go in as the tokens of the "
        "checkpoint's tokenizer.json.",
        "export onnx runs/photos/best --output photos.onnx",
        "export onnx models/minilm --output minilm.onnx --json",
    )
)
def onnx(
    checkpoint: Annotated[str, typer.Argument(help="An encoder, classifier or tagger: a folder or a source.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file, NAME.onnx.")],
    as_json: console.Json = False,
) -> None:
    """See its help."""
    console.logs()
    with console.people.status("writing"):
        made = export_onnx.onnx(resolve(checkpoint), output)
    sizes = ", ".join(f"{name} {list(shape)}" for name, shape in made.inputs.items())
    restored = "; its integers as the numbers that they stand for" if made.restored else ""
    told = f"{made.bytes / 1e6:.1f} MB{restored}: [bold]{escape(str(output))}[/bold]\n"
    told += escape(f"{sizes} -> {made.output}")
    console.result(dataclasses.asdict(made), as_json, table=told)
