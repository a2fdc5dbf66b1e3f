"""`steelyard compress`: smaller forms of a checkpoint, each with its certificate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer
from rich.markup import escape

from steelyard import config as configuration
from steelyard.checkpoint.sources import resolve
from steelyard.cli import console
from steelyard.cli.train import stop_on_signal
from steelyard.compress.prune.decoders import Judge, PruneConfig
from steelyard.compress.prune.structured import Structure
from steelyard.compress.quantize import smoothing
from steelyard.compress.quantize.decoders import GROUPS, Method, QuantizeConfig
from steelyard.compress.search import MEASURES, shown
from steelyard.errors import ConfigError, FidelityError
from steelyard.evaluate.answers import LEAST_AGREEMENT, AnswersCertificate
from steelyard.evaluate.certificate import Certificate, Thresholds
from steelyard.stages import compress as stage
from steelyard.stages import recipe as recipes
from steelyard.stages.certify import sign_off
from steelyard.stages.compress_networks import is_network
from steelyard.stages.compress_search import Search
from steelyard.stages.draft import DraftConfig
from steelyard.stages.draft import draft as make_draft

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
Tasks = Annotated[
    list[Path] | None,
    typer.Option("--task", help="Decoders: rows of a task that both are compared on; with labels by accuracy."),
]
MaxTask = Annotated[
    float | None,
    typer.Option(
        "--max-task-loss", help="Largest fall of accuracy there, or relative rise of the loss; 0.02 by default."
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
    "compress quantize MODEL --output OUT --bits 4 --data rows.jsonl --int8-layers '*.down_proj'",
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

RECIPE = console.examples(
    "Follow a recipe (TOML): steps that prune, train and quantise, one after the other, the last compared with the "
    "first. A train step goes on with what the step before left, taught by the recipe's model if it has a "
    "[step.distill]. The same command goes on after an interruption; steps that were done are not done again.",
    "compress recipe recipe.toml",
    "compress recipe recipe.toml --set output=models/smaller --accept",
)
DRAFT = console.examples(
    "Make a draft of a decoder: some of its blocks, taught by its own answers to the prompts of a domain, in 8 bits, "
    "with a head for the domain's tokens. `serve --draft` guesses by it; the answers stay what they are, and come "
    "sooner where the domain is asked about.",
    "compress draft MODEL --data chats.jsonl --output models/draft",
    "serve models/int8 --draft models/draft",
)
SIGN = console.examples(
    "Record in a checkpoint's certificate that somebody has looked at it and stands for it: who, when, and why. Its "
    "files are compared with the manifest first.",
    'compress sign models/small --by "Ada Lovelace" --note "1,000 tickets read side by side"',
)
SEARCH = console.examples(
    "Find the form of a decoder that meets a target: the usual ones are measured, then those between, chosen by what "
    "was measured (mixed precision by each layer's own sensitivity; fewer blocks, if nothing else is fast enough). "
    "Ends with a table, a plot of what is lost by size and by speed, the checkpoint that was chosen, and its recipe. "
    f"Measures: {', '.join(f'{name} ({what})' for name, what in MEASURES.items())}. The same command goes on.",
    'compress search MODEL --output searched --data rows.jsonl --held other.jsonl --target "size<=100MB,max_loss=2%"',
    'compress search MODEL -o searched --data a.jsonl --held b.jsonl --target "tokens_per_second>=2x,max_loss=1%"',
    "compress search MODEL -o searched --data a.jsonl --held b.jsonl --explain",
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
    int8_layers: Annotated[
        list[str] | None,
        typer.Option(help="With 4 bits: linear layers that keep 8, a path or a pattern such as '*.down_proj'."),
    ] = None,
    group_layers: Annotated[
        list[str] | None,
        typer.Option(
            help="With 8 bits: linear layers that alone have groups, such as '*.[qkv]_proj'; the others are faster."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Rows to judge by, as train reads them.")] = None,
    tokens: Annotated[
        int | None, typer.Option(help=f"How many of their tokens are read, at most; {stage.SMOOTHING} by default.")
    ] = None,
    strength: Annotated[
        float, typer.Option(help="smoothquant: how much moves into the weights, 0 to 1.")
    ] = smoothing.STRENGTH,
    task: Tasks = None,
    accept: Accept = False,
    max_bits_per_byte: MaxBits = None,
    max_kl: MaxKl = None,
    max_task_loss: MaxTask = None,
    min_agreement: Agreement = None,
    as_json: console.Json = False,
) -> None:
    """See HELP."""
    console.logs()
    source = resolve(checkpoint)
    thresholds = _thresholds(
        source, max_bits_per_byte, max_kl, min_agreement, max_task_loss, 0.1 if bits == 4 else 0.02
    )
    config = QuantizeConfig.chosen(
        bits,
        group,
        method,
        strength=strength,
        portable=portable,
        int8_layers=int8_layers or (),
        group_layers=group_layers or (),
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
            tasks=task or (),
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
    task: Tasks = None,
    accept: Accept = False,
    max_bits_per_byte: MaxBits = None,
    max_kl: MaxKl = None,
    max_task_loss: MaxTask = None,
    min_agreement: Agreement = None,
    as_json: console.Json = False,
) -> None:
    """See PRUNE."""
    console.logs()
    judge: Judge = method or ("sparsegpt" if structure is None else "activation")
    source = resolve(checkpoint)
    thresholds = _thresholds(source, max_bits_per_byte, max_kl, min_agreement, max_task_loss, 0.02)
    config = PruneConfig(method=judge, structure=structure, rate=rate, pattern=pattern, scope=scope)
    with console.counting("pruning and certifying") as report:
        found = stage.prune(
            source,
            output,
            config,
            data=data,
            tokens=tokens,
            tasks=task or (),
            zeros=dense,
            thresholds=thresholds,
            accept=accept,
            report=report,
        )
    _tell(found, output, as_json)


@app.command(help=RECIPE)
def recipe(
    file: Annotated[Path, typer.Argument(help="The recipe (TOML).")],
    settings: console.Settings = None,
    accept: Accept = False,
    as_json: console.Json = False,
) -> None:
    """See RECIPE."""
    console.logs()
    wanted = configuration.load(file, recipes.Recipe, settings or ())
    done = recipes.follow(wanted, accept=accept, showing=console.counting, begun=stop_on_signal)
    if done.certificate is None:
        console.note("interrupted: the same command goes on from there")
        if as_json:
            console.result(msgspec.to_builtins(done), True)
        raise typer.Exit(130)
    _tell(done.certificate, Path(done.path), as_json, steps=done.steps)


@app.command(help=DRAFT)
def draft(
    checkpoint: Annotated[str, typer.Argument(help="A dense decoder: a folder or a source.")],
    data: Annotated[
        Path, typer.Option(help="Rows of the domain, as train reads them: chats, or texts that are gone on from.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the draft goes.")],
    blocks: Annotated[int, typer.Option(help="How many of the model's stay.")] = DraftConfig().blocks,
    head: Annotated[int, typer.Option(help="Tokens that its head has; 0: all.")] = DraftConfig().head,
    prompts: Annotated[int, typer.Option(help="Rows that are asked, at most.")] = DraftConfig().prompts,
    answer: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = DraftConfig().answer,
    epochs: Annotated[int, typer.Option(help="Passes over the answers.")] = DraftConfig().epochs,
    teacher: Annotated[
        float, typer.Option(help="Share of the loss that is what the model holds of every token; takes longer.")
    ] = DraftConfig().teacher,
    as_json: console.Json = False,
) -> None:
    """See DRAFT."""
    console.logs()
    config = DraftConfig(blocks=blocks, head=head, prompts=prompts, answer=answer, epochs=epochs, teacher=teacher)
    done = make_draft(resolve(checkpoint), data, output, config, showing=console.counting, begun=stop_on_signal)
    if not done.finished:
        console.note("interrupted: the same command goes on from there")
    if done.finished or as_json:
        told = (
            f"draft [bold]{escape(done.path)}[/bold], {done.bytes / 1e6:.1f} MB; its likeliest token is the model's at "
            f"{done.agreement:.1%} of places in {done.answers} answers that it has learnt from"
        )
        console.result(msgspec.to_builtins(done), as_json, table=told)
    if not done.finished:
        raise typer.Exit(130)


@app.command(help=SIGN)
def sign(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint with a certificate.")],
    by: Annotated[str, typer.Option(help="Who.")],
    note: Annotated[str, typer.Option(help="Why.")] = "",
    as_json: console.Json = False,
) -> None:
    """See SIGN."""
    signed = sign_off(checkpoint, by, note)
    console.result(msgspec.to_builtins(signed), as_json, table=f"signed by {escape(signed.by)} at {signed.at}")


@app.command(help=SEARCH)
def search(
    checkpoint: Annotated[str, typer.Argument(help="A decoder or an adapter: a folder or a source.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of everything that is made.")],
    data: Annotated[Path, typer.Option(help="Rows to judge by, as train reads them.")],
    held: Annotated[Path, typer.Option(help="Other rows, to measure on; `steelyard data --holdout` cuts some off.")],
    target: Annotated[str, typer.Option(help="What is to be met; without one the usual forms are compared.")] = "",
    minutes: Annotated[float, typer.Option(help="After which nothing is begun that would end later.", min=0)] = 30.0,
    train: Annotated[
        Path | None, typer.Option(help="Settings of a run (TOML) that goes after blocks went, as in a recipe.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say which form is for what, with this model's numbers.")
    ] = False,
    as_json: console.Json = False,
) -> None:
    """See SEARCH."""
    console.logs()
    training = None if train is None else configuration.read(train)
    found = Search(
        resolve(checkpoint), output, target, data, held, minutes=minutes, training=training, showing=console.counting
    ).run()
    names = [name for name in MEASURES if name in found.points[0].measures]
    if not as_json:
        rows = [[p.name, *(shown(name, p.measures[name]) for name in names)] for p in found.points]
        console.out.print(console.table(["form", *(name.replace("_", " ") for name in names)], rows))
    told = [*(found.explained if explain else ()), f"report {found.report}"]
    if found.chosen is not None:
        told.insert(0, f"chosen: {found.chosen}, in {found.path}")
    console.result(msgspec.to_builtins(found), as_json, table=escape("\n".join(told)))
    if target and found.chosen is None:
        raise FidelityError(
            f"none of {len(found.points) - 1} forms meets {target}; {found.nearest} misses it least, by "
            f"{found.missed:.1%} of a bound: ask for less, or give it --minutes, or a run to learn by (--train)"
        )


def _thresholds(
    source: Path,
    bits_per_byte: float | None,
    kl: float | None,
    agreement: float | None,
    task: float | None,
    usual: float,
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
    most = Thresholds().task if task is None else task
    return Thresholds(
        bits_per_byte=usual if bits_per_byte is None else bits_per_byte, kl=kl, agreement=least, task=most
    )


def _tell(found: Certificate | AnswersCertificate, output: Path, as_json: bool, **more: object) -> None:
    verdict = "passed" if found.passed else "accepted past its thresholds"
    values = {"path": str(output), "certificate": msgspec.to_builtins(found), **more}
    told = f"{found.summary()}\ncertificate {verdict}; checkpoint [bold]{escape(str(output))}[/bold]"
    console.result(values, as_json, table=told)
