"""`steelyard serve`: checkpoints over an OpenAI-compatible API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steelyard import app
from steelyard.cli import console

HELP = console.examples(
    "Serve one or more checkpoints over an OpenAI-compatible API. The key comes from STEELYARD_API_KEY, or is made at "
    "the first start and printed once.",
    "serve ~/.cache/steelyard/checkpoints/.../SmolLM2-135M-Instruct",
    "serve models/sms-int8 --port 8001",
    "serve BASE --adapter spam=runs/sms/best",
)


def command(
    checkpoints: Annotated[list[Path], typer.Argument(help="Model folders; a model's id is its folder's name.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Serve an adapter as model NAME; NAME=PATH@MODEL with several bases."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free one.", min=0, max=65535)] = 8000,
    as_json: console.Json = False,
) -> None:
    """See HELP."""

    def announce(url: str, models: list[str]) -> None:
        text = f"Steelyard serves {', '.join(models)} on {url}"
        console.result({"url": url, "models": models}, as_json, table=text)

    app.run(checkpoints, adapter or [], host, port, announce=announce)
