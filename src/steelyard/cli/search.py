"""`steelyard search`: the settings of a run, found by trials."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.markup import escape

from steelyard import config as configuration
from steelyard.cli import console
from steelyard.stages import search as stage

HELP = console.examples(
    "Run a configuration again and again with other settings, each chosen by what the ones before showed, and say "
    "which did best. The same command goes on after an interruption; --trials counts those that are done.",
    "search run.toml --space optimizer.learning_rate=1e-5..1e-3:log --space lora.rank=4,8,16 --trials 12",
    "search run.toml --space optimizer.name=adamw,lion,muon --metric validation_accuracy",
)


def command(
    file: Annotated[Path, typer.Argument(help="The run's configuration (TOML); its output holds all trials.")],
    space: Annotated[
        list[str] | None,
        typer.Option("--space", "-s", help="key=low..high, key=low..high:log, key=low..high:int or key=one,other"),
    ] = None,
    trials: Annotated[int, typer.Option(help="How many there are to be.", min=1)] = 20,
    metric: Annotated[str, typer.Option(help="What is best.")] = stage.DEFAULT,
    settings: console.Settings = None,
    as_json: console.Json = False,
) -> None:
    """See HELP."""
    console.logs()
    wanted = stage.space(space or [])
    raw = configuration.assigned(configuration.read(file), settings or [])
    with console.counting("trials") as report:
        found = stage.search(raw, wanted, trials, metric=metric, report=report)
    values = msgspec.to_builtins(found)
    best = found.best
    told = "no trial succeeded"
    if best is not None:
        shown = "\n".join(f"  {key} = {value}" for key, value in best.settings.items())
        told = f"best of {len(found.trials)}: {metric} {best.value:.4f}, in {escape(best.output)}\n{escape(shown)}"
    console.result(values, as_json, table=f"{told}\nreport {escape(found.report)}")
