"""`steelyard demo`: the whole lifecycle on real input in some minutes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from steelyard.checkpoint.atomic import write_file
from steelyard.cli import console

HELP = console.examples(
    "Watch a real language model learn to tell spam from 400 labelled messages, shrink to half, and answer over an "
    "OpenAI-compatible API. Writes demo/report.html.",
    "demo",
    "demo --labels 800 --json result.json",
)


def command(
    labels: Annotated[int, typer.Option(help="Labelled messages to learn from.", min=20)] = 400,
    seed: Annotated[int, typer.Option(help="Decides the split, the labels and the start.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file, too.")] = None,
) -> None:
    """See HELP."""
    console.logs()
    from steelyard.demo import lifecycle

    values = lifecycle.run(output, labels=labels, seed=seed, note=console.note, show=console.out.print)
    if json_file is not None:
        write_file(json_file, json.dumps(values, indent=2) + "\n")
