"""`steelyard compress`: smaller forms of a checkpoint, each with its certificate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.markup import escape

from steelyard.checkpoint.sources import resolve
from steelyard.cli import console
from steelyard.evaluate.certificate import Thresholds
from steelyard.stages import compress as stage

app = typer.Typer(no_args_is_help=True, help="Make a checkpoint smaller, and certify what it cost.")
HELP = console.examples(
    "int8 weights and activations in the compressed-tensors layout, with a fidelity certificate. An adapter is merged "
    "into its base first.",
    "compress quantize runs/sms/best --output models/sms-int8",
    "compress quantize MODEL --output OUT --portable",
    "compress quantize MODEL --output OUT --max-bits-per-byte 0.01 --accept",
)


@app.callback()
def _family() -> None:
    pass


@app.command(help=HELP)
def quantize(
    checkpoint: Annotated[str, typer.Argument(help="A model or adapter: a folder or a source.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the int8 checkpoint goes.")],
    portable: Annotated[bool, typer.Option("--portable", help="Leave embedding and head unquantised.")] = False,
    accept: Annotated[bool, typer.Option("--accept", help="Keep it even past a threshold.")] = False,
    max_bits_per_byte: Annotated[float, typer.Option(help="Largest relative rise of bits per byte.")] = 0.02,
    max_kl: Annotated[float | None, typer.Option(help="Largest mean KL divergence in nats.")] = None,
    as_json: console.Json = False,
) -> None:
    """See HELP."""
    console.logs()
    thresholds = Thresholds(bits_per_byte=max_bits_per_byte, kl=max_kl)
    with console.counting("certifying") as report:
        found = stage.compress(
            resolve(checkpoint), output, portable=portable, thresholds=thresholds, accept=accept, report=report
        )
    verdict = "passed" if found.passed else "accepted past its thresholds"
    values = {"path": str(output), "certificate": msgspec.to_builtins(found)}
    told = f"{found.summary()}\ncertificate {verdict}; checkpoint [bold]{escape(str(output))}[/bold]"
    console.result(values, as_json, table=told)
