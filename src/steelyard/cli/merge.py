"""`steelyard merge`: an adapter and its base as one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from steelyard.checkpoint.sources import resolve
from steelyard.cli import console
from steelyard.stages import merge as stage

HELP = console.examples(
    "Add an adapter (LoRA, DoRA) to its base's weights: a whole model that any tool reads and that says the same.",
    "merge runs/sms/best --output models/sms",
)


def command(
    adapter: Annotated[str, typer.Argument(help="The adapter: a folder or a source.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the model goes.")],
    as_json: console.Json = False,
) -> None:
    """See HELP."""
    console.logs()
    made = stage.merge(resolve(adapter), output)
    told = f"model [bold]{escape(str(output))}[/bold]\n{made}"
    console.result({"path": str(output), "id": made}, as_json, table=told)
