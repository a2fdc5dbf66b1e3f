"""`steelyard demo`: the whole lifecycle on real input in some minutes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn

from steelyard.atomic import write_file
from steelyard.checkpoint.sources.cache import default_cache
from steelyard.cli import console
from steelyard.demo import lifecycle, page
from steelyard.train import trainer as training

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
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"))
    with Progress(*columns, console=console.people, transient=True) as progress:
        task = progress.add_task("", total=None, detail="")

        def show(done: int, of: int | None, detail: str = "") -> None:
            progress.update(task, completed=done, total=of, detail=detail)

        def trained(at: training.Progress) -> None:
            left = f"{int(at.seconds_left) // 60}:{int(at.seconds_left) % 60:02d} left"
            show(at.step, at.steps, f"loss {at.loss:.4f}  {at.tokens_per_second:.0f} tokens/s  {left}")

        def download(what: str, done: int, total: int | None) -> None:
            show(done, total, f"{what} {done / 1e6:.0f} MB")

        def note(text: str) -> None:
            console.note(f"[bold]-[/bold] {text}")
            show(0, None)

        tell = lifecycle.Progressing(
            note=note, download=download, training=trained, counting=lambda done, of: show(done, of, f"{done}/{of}")
        )
        learnt, figures, answers = lifecycle.run(output, default_cache(), labels=labels, seed=seed, tell=tell)
    title = f"{labels} labels, 1,000 held-out messages, {figures['minutes']:.1f} minutes"
    console.out.print(console.table(page.HEADERS, page.table(learnt), title))
    console.out.print(f"certificate: {learnt.certificate.summary()}", soft_wrap=True)
    verdict = "served and answered well" if figures["served_ok"] else "the server did NOT answer as it should"
    console.out.print(f"{verdict}; asked: {answers[-1][0]}\n  {answers[-1][1]}", soft_wrap=True, markup=False)
    report = output / "report.html"
    write_file(report, page.page(learnt, figures, answers).html())
    console.out.print(f"report: [bold]{report}[/bold]")
    if json_file is not None:
        write_file(json_file, json.dumps(figures, indent=2) + "\n")
    if not figures["served_ok"]:
        raise typer.Exit(1)
