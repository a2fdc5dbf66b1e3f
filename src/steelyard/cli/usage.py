"""`steelyard usage`: what was used and what it cost, from the ledger."""

from __future__ import annotations

import calendar
import re
import time
from typing import Annotated, Any

import typer

from steelyard.cli import console
from steelyard.cli.state import DatabaseUrl, dollars, state
from steelyard.errors import ConfigError
from steelyard.serve.billing.reports import GROUPS, Query, buckets

HELP = console.examples(
    "What was used and what it cost in a month, by project and model.",
    "usage",
    "usage --month 2026-11 --by project_id,api_key_id --json",
)


def command(
    month: Annotated[str | None, typer.Option(help="Such as 2026-11; default: this one.")] = None,
    by: Annotated[str, typer.Option(help=f"Some of {', '.join(GROUPS)}, comma-separated.")] = "project_id,model",
    database: DatabaseUrl = None,
    as_json: console.Json = False,
) -> None:
    """See HELP."""
    groups = [name for name in by.split(",") if name]
    if any(name not in GROUPS for name in groups):
        raise ConfigError(f"--by is some of {', '.join(GROUPS)}, comma-separated")
    begin, end = span(month or time.strftime("%Y-%m", time.gmtime()))
    query = Query(begin, end, "1d", group_by=groups)
    with state(database) as here:
        days = here.database.read_now(lambda connection: buckets(connection, query))
    rows = _together([row for _, found in days for row in found], groups)
    figures = ("requests", "input_tokens", "cached_tokens", "output_tokens", "training_tokens")
    lines = [[*(str(row[name]) for name in (*groups, *figures)), dollars(row["cost"])] for row in rows]
    table = console.table([*groups, *(name.replace("_", " ") for name in figures), "cost"], lines)
    console.result({"begin": begin, "end": end, "unit": "nano-dollars", "usage": rows}, as_json, table=table)


def span(month: str) -> tuple[int, int]:
    """The seconds of a month.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"(\d{4})-(0[1-9]|1[0-2])", month)
    if match is None:
        raise ConfigError(f"'{month}' is no month: write it as 2026-11")
    year, number = int(match[1]), int(match[2])
    following = (year + number // 12, number % 12 + 1)
    begin, end = (calendar.timegm((*when, 1, 0, 0, 0)) for when in ((year, number), following))
    return begin, end


def _together(rows: list[dict[str, Any]], groups: list[str]) -> list[dict[str, Any]]:
    """The days' rows of the same group, added up."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in groups)
        into = found.setdefault(key, dict.fromkeys(row, 0) | {name: row[name] for name in groups})
        for name, value in row.items():
            if name not in groups:
                into[name] += value
    return list(found.values())
