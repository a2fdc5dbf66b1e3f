"""`steelyard prices`: what models cost."""

from __future__ import annotations

import time
from typing import Annotated

import msgspec
import typer
from sqlalchemy import Connection

from steelyard.cli import console
from steelyard.cli.state import DatabaseUrl, state
from steelyard.errors import ConfigError
from steelyard.serve.billing.prices import EVERY_MODEL, NANO, Price, PriceList, newest, publish

MILLION = 1_000_000
KINDS = ("input", "cached_input", "output", "training", "explanation")

app = typer.Typer(no_args_is_help=True, help="What models cost, in dollars for a million tokens.")


@app.command(help=console.examples("The prices that hold.", "prices show"))
def show(database: DatabaseUrl = None, as_json: console.Json = False) -> None:
    """See its help."""
    with state(database) as here:
        found = here.database.read_now(newest)
    _tell(found, as_json)


@app.command(
    "set",
    help=console.examples(
        "Set what a model costs; the other models keep their prices.",
        "prices set SmolLM2-135M-Instruct --input 0.05 --output 0.20 --training 1",
        "prices set '*' --input 0.10 --cached-input 0.05 --output 0.40",
    ),
)
def set_price(
    model: Annotated[str, typer.Argument(help="A model, or '*' for every one without a price of its own.")],
    input: Annotated[float, typer.Option(help="A million prompt tokens.", min=0)] = 0,
    cached_input: Annotated[
        float | None, typer.Option(help="A million prompt tokens found in the cache; default: as input.", min=0)
    ] = None,
    output: Annotated[float, typer.Option(help="A million generated tokens.", min=0)] = 0,
    training: Annotated[float, typer.Option(help="A million tokens of training.", min=0)] = 0,
    explanation: Annotated[float, typer.Option(help="A million tokens computed for explanations.", min=0)] = 0,
    database: DatabaseUrl = None,
    as_json: console.Json = False,
) -> None:
    """See its help."""
    figures = (input, input if cached_input is None else cached_input, output, training, explanation)
    price = Price(**{kind: _nano(value, kind) for value, kind in zip(figures, KINDS, strict=True)})
    with state(database) as here:
        actor = here.actor()

        def change(connection: Connection) -> PriceList:
            listed = {**newest(connection).by_model, model: price}
            made = publish(connection, listed, int(time.time()))
            actor.log(connection, "prices.published", str(made.version), models=sorted(listed))
            return made

        made = here.database.write_now(change)
    _tell(made, as_json)


def _nano(dollars: float, kind: str) -> int:
    """Nano-dollars a token, of dollars for a million.

    Raises:
        ConfigError: it is less than a nano-dollar a token exactly.
    """
    exact = dollars * NANO / MILLION
    if abs(exact - round(exact)) > 1e-6:
        raise ConfigError(f"--{kind.replace('_', '-')} {dollars:g}: prices go by $0.001 for a million tokens")
    return round(exact)


def _tell(prices: PriceList, as_json: bool) -> None:
    lines = [
        [model, *(f"{getattr(price, kind) * MILLION / NANO:.3f}" for kind in KINDS)]
        for model, price in sorted(prices.by_model.items(), key=lambda one: (one[0] == EVERY_MODEL, one[0]))
    ]
    table = console.table(["model", *(kind.replace("_", " ") for kind in KINDS)], lines)
    values = {"version": prices.version, "unit": "nano-dollars a token", "prices": msgspec.to_builtins(prices.by_model)}
    console.result(values, as_json, table=table)
