"""`steelyard train`: a run by its configuration."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Annotated

import msgspec
import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from steelyard import config as configuration
from steelyard.cli import console
from steelyard.stages import rate
from steelyard.stages import train as stage
from steelyard.train import trainer as training
from steelyard.train.config import TrainConfig

HELP = console.examples(
    "Train a model by a configuration file: LoRA or all weights. The same command goes on after an interruption.",
    "train run.toml",
    "train run.toml --set optimizer.learning_rate=2e-4 --set epochs=1",
    "train run.toml --fresh",
    "train run.toml --find-rate",
)


def command(
    file: Annotated[Path, typer.Argument(help="The run's configuration (TOML).")],
    settings: console.Settings = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away what an earlier run left there.")] = False,
    find_rate: Annotated[
        bool, typer.Option("--find-rate", help="Instead of the run: which learning rate it should have.")
    ] = False,
    as_json: console.Json = False,
) -> None:
    """See HELP."""
    console.logs()
    config = configuration.load(file, TrainConfig, settings or ())
    if find_rate:
        _find_rate(config, as_json)
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.0f} tokens/s  {task.fields[left]} left"),
    )
    with Progress(*columns, console=console.people, transient=True) as progress:
        task = progress.add_task("", total=None, loss=float("nan"), speed=0.0, left="?")

        def begun(trainer: training.Trainer, counts: dict[str, int]) -> None:
            progress.console.print(", ".join(f"{value} {key.replace('_', ' ')}" for key, value in counts.items()))
            stop_on_signal(trainer)

        def report(at: training.Progress) -> None:
            left = f"{int(at.seconds_left) // 60}:{int(at.seconds_left) % 60:02d}"
            progress.update(
                task, completed=at.step, total=at.steps, loss=at.loss, speed=at.tokens_per_second, left=left
            )

        done = stage.train(config, fresh=fresh, report=report, begun=begun)
    if not done.finished:
        console.note(f"interrupted at step {done.steps}: the same command goes on from there")
    if done.finished or as_json:
        console.result(msgspec.to_builtins(done), as_json, table=_summary(done))
    if not done.finished:
        raise typer.Exit(130)


def _find_rate(config: TrainConfig, as_json: bool) -> None:
    with console.counting("raising the learning rate") as report:
        found = rate.find(config, report=report)
    told = f"optimizer.learning_rate = {found.learning_rate:g}\nreport {escape(found.report)}"
    console.result(msgspec.to_builtins(found), as_json, table=told)


def stop_on_signal(trainer: training.Trainer) -> None:
    """The first SIGINT or SIGTERM ends the run after its step, with its state saved; the second at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        trainer.stopping = True
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def _summary(done: stage.Trained) -> str:
    figures = ", ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in done.metrics.items() if key != "step")
    what = "steps done" if done.learnt else "steps were done already; --fresh starts over"
    return (
        f"{done.steps} {what}{': ' + figures if figures else ''}\n"
        f"checkpoint [bold]{escape(done.path or '-')}[/bold]\nreport     {escape(done.report)}"
    )
