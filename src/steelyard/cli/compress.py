"""`steelyard compress`: smaller forms of a checkpoint, each with its certificate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer
from rich.markup import escape

from steelyard.checkpoint.sources import resolve
from steelyard.cli import console
from steelyard.compress.prune.decoders import Judge, PruneConfig
from steelyard.compress.prune.structured import Structure
from steelyard.compress.quantize import smoothing
from steelyard.compress.quantize.decoders import GROUPS, Method, QuantizeConfig
from steelyard.errors import ConfigError
from steelyard.evaluate.answers import LEAST_AGREEMENT, AnswersCertificate
from steelyard.evaluate.certificate import Certificate, Thresholds
from steelyard.stages import compress as stage
from steelyard.stages.compress_networks import is_network

app = typer.Typer(no_args_is_help=True, help="Make a checkpoint smaller, and certify what it cost.")
Accept = Annotated[bool, typer.Option("--accept", help="Keep it even past a threshold.")]
MaxBits = Annotated[
    float | None,
    typer.Option(help="Largest relative rise of bits per byte; 0.02 by default, 0.1 with weights of 4 bits."),
]
Agreement = Annotated[
    float | None,
    typer.Option(
        "--min-agreement",
        help=f"Classifiers, encoders: least agreement with the model before; {LEAST_AGREEMENT} by default.",
    ),
]
MaxKl = Annotated[float | None, typer.Option(help="Largest mean KL divergence in nats.")]
HELP = console.examples(
    "Weights and activations as integers, in the compressed-tensors layout, with a fidelity certificate. 8 bits lose "
    "next to nothing; 4 bits are half as large, and want rows of yours to judge by (--data). One scale for all inputs "
    "(--group all) is a little smaller and faster, and loses more. An adapter is merged into its base first. "
    "Classifiers, taggers and encoders are compared with their parent row by row, on yours if there are any.",
    "compress quantize runs/sms/best --output models/sms-int8",
    "compress quantize MODEL --output OUT --group all",
    "compress quantize MODEL --output OUT --bits 4 --data rows.jsonl --max-bits-per-byte 0.1",
    "compress quantize runs/lstm/best --output models/lstm-int8 --data test.jsonl",
    "compress quantize MODEL --output OUT --portable",
)

PRUNE = console.examples(
    "Set weights of the linear layers to 0 and store those that are left, with a fidelity certificate. magnitude "
    "takes the smallest; wanda and sparsegpt judge them by what they read in rows of yours, and lose less. With "
    "--structure blocks, heads or neurons go whole: the model is smaller and faster wherever it runs, and wants to be "
    "trained on.",
    "compress prune MODEL --output OUT --data rows.jsonl --accept",
    "compress prune MODEL --output OUT --data rows.jsonl --pattern 2:4 --max-bits-per-byte 0.2",
    "compress prune MODEL --output OUT --method magnitude --rate 0.2 --scope model",
    "compress prune MODEL --output OUT --structure blocks --rate 0.25 --data rows.jsonl --accept",
)


@app.callback()
def _family() -> None:
    pass


@app.command(help=HELP)
def quantize(
    checkpoint: Annotated[str, typer.Argument(help="A model or adapter: a folder or a source.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the quantised checkpoint goes.")],
    bits: Annotated[int, typer.Option(help="Of the weights, 8 or 4; embedding and head have 8.")] = 8,
    group: Annotated[
        str | None,
        typer.Option(help=f"Inputs that share a scale, or 'all'. Default: {GROUPS[0]}, or what fits."),
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(
            help="How weights are rounded. Default: nearest; with rows, smoothquant, or gptq (4 bits, Gemma)."
        ),
    ] = None,
    portable: Annotated[bool, typer.Option("--portable", help="Leave embedding and head unquantised.")] = False,
    data: Annotated[Path | None, typer.Option(help="Rows to judge by, as train reads them.")] = None,
    tokens: Annotated[
        int | None, typer.Option(help=f"How many of their tokens are read, at most; {stage.SMOOTHING} by default.")
    ] = None,
    strength: Annotated[
        float, typer.Option(help="smoothquant: how much moves into the weights, 0 to 1.")
    ] = smoothing.STRENGTH,
    accept: Accept = False,
    max_bits_per_byte: MaxBits = None,
    max_kl: MaxKl = None,
    min_agreement: Agreement = None,
    as_json: console.Json = False,
) -> None:
    """See HELP."""
    console.logs()
    source = resolve(checkpoint)
    thresholds = _thresholds(source, max_bits_per_byte, max_kl, min_agreement, 0.1 if bits == 4 else 0.02)
    config = QuantizeConfig.chosen(
        bits,
        group,
        method,
        strength=strength,
        portable=portable,
        rows=data is not None,
        decoder=not is_network(source),
        smooth=stage.smooths(source),
    )
    with console.counting("rounding and certifying") as report:
        found = stage.quantize(
            source,
            output,
            config,
            data=data,
            tokens=tokens,
            thresholds=thresholds,
            accept=accept,
            report=report,
        )
    _tell(found, output, as_json)


@app.command(help=PRUNE)
def prune(
    checkpoint: Annotated[str, typer.Argument(help="A model or adapter: a folder or a source.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the pruned checkpoint goes.")],
    method: Annotated[
        Judge | None,
        typer.Option(help="How they are judged. Default: sparsegpt; of structures activation."),
    ] = None,
    structure: Annotated[
        Structure | None, typer.Option(help="Decoders: what goes whole, instead of single weights.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Share that goes; a half by default, of structures a quarter.")
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="Instead: how many of every few stay, such as 2:4.")] = None,
    scope: Annotated[Literal["layer", "model"], typer.Option(help="magnitude: of what the rate is a share.")] = "layer",
    data: Annotated[Path | None, typer.Option(help="Rows to judge by, as train reads them.")] = None,
    tokens: Annotated[
        int | None, typer.Option(help=f"How many of their tokens are read, at most; {stage.CALIBRATION} by default.")
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Store zeros, too: for other readers.")] = False,
    accept: Accept = False,
    max_bits_per_byte: MaxBits = None,
    max_kl: MaxKl = None,
    min_agreement: Agreement = None,
    as_json: console.Json = False,
) -> None:
    """See PRUNE."""
    console.logs()
    judge: Judge = method or ("sparsegpt" if structure is None else "activation")
    source = resolve(checkpoint)
    thresholds = _thresholds(source, max_bits_per_byte, max_kl, min_agreement, 0.02)
    config = PruneConfig(method=judge, structure=structure, rate=rate, pattern=pattern, scope=scope)
    with console.counting("pruning and certifying") as report:
        found = stage.prune(
            source,
            output,
            config,
            data=data,
            tokens=tokens,
            zeros=dense,
            thresholds=thresholds,
            accept=accept,
            report=report,
        )
    _tell(found, output, as_json)


def _thresholds(
    source: Path, bits_per_byte: float | None, kl: float | None, agreement: float | None, usual: float
) -> Thresholds:
    """The bounds that were asked for. Raises ConfigError: one that the model has not."""
    network = is_network(source)
    if network and (bits_per_byte, kl) != (None, None):
        raise ConfigError("--max-bits-per-byte and --max-kl are bounds of language models: here it is --min-agreement")
    if not network and agreement is not None:
        raise ConfigError(
            "--min-agreement is a bound of classifiers and encoders: here it is --max-bits-per-byte or --max-kl"
        )
    least = LEAST_AGREEMENT if agreement is None else agreement
    return Thresholds(bits_per_byte=usual if bits_per_byte is None else bits_per_byte, kl=kl, agreement=least)


def _tell(found: Certificate | AnswersCertificate, output: Path, as_json: bool) -> None:
    verdict = "passed" if found.passed else "accepted past its thresholds"
    values = {"path": str(output), "certificate": msgspec.to_builtins(found)}
    told = f"{found.summary()}\ncertificate {verdict}; checkpoint [bold]{escape(str(output))}[/bold]"
    console.result(values, as_json, table=told)
