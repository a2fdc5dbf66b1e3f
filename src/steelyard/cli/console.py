"""What verbs say: notes and progress to stderr for people; results to stdout, for people or, with --json, machines."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on the last line.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as optimizer.name=sgd.")
]

people = Console(stderr=True, highlight=False, emoji=False)
out = Console(highlight=False, emoji=False)


def examples(text: str, *lines: str) -> str:
    """Help text with examples below it."""
    return text + "\n\nExamples:\n\n" + "\n\n".join(f"  [dim]$[/dim] steelyard {line}" for line in lines)


def logs() -> None:
    """Warnings of the library as lines on stderr."""
    handler = RichHandler(console=people, show_time=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])


def result(values: Mapping[str, Any], as_json: bool, *, table: Table | str | None = None) -> None:
    """Print a verb's result: a table for people, one line of JSON for machines (what is not finite is null)."""
    if as_json:
        print(json.dumps(_finite(dict(values)), default=str, allow_nan=False), flush=True)
        return
    if table is None:
        table = rows(values)
    out.print(table, soft_wrap=isinstance(table, str))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rows(values: Mapping[str, Any], title: str | None = None) -> Table:
    """A two-column table of names and values."""
    table = Table(title=title, show_header=False, box=None, padding=(0, 2))
    for name, value in values.items():
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        table.add_row(Text(name.replace("_", " ")), Text(shown))
    return table


def table(headers: Sequence[str], lines: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """A table with headers; all columns but the first are figures."""
    grid = Table(title=title)
    for index, header in enumerate(headers):
        grid.add_column(Text(header), justify="left" if index == 0 else "right")
    for line in lines:
        grid.add_row(*map(Text, line))
    return grid


@contextlib.contextmanager
def downloads() -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar per download; yields `report(what, done, total)` in bytes."""
    named = TextColumn("{task.description}", markup=False)
    columns = (named, BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=people, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield report


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that counts; yields `report(done, of)`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=people, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)


def note(text: str) -> None:
    """A line for people, on stderr; rich's markup is honoured, so escape what is not ours."""
    people.print(text, soft_wrap=True)
