"""What was used and what it cost, in buckets of time, grouped: sums over the ledger's settlements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, case, func, select

from steelyard.serve.billing.ledger import Service
from steelyard.store import tables

Width = Literal["1m", "1h", "1d"]
SECONDS: dict[Width, int] = {"1m": 60, "1h": 3600, "1d": 86400}
GROUPS = {
    "project_id": tables.ledger.c.project_id,
    "api_key_id": tables.ledger.c.key_id,
    "model": tables.ledger.c.model,
    "batch": tables.ledger.c.batch,
    "line_item": tables.ledger.c.service,
}
"""What reports may be grouped by."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Query:
    """What a report is about."""

    begin: int
    """Unix seconds; buckets begin at multiples of their width from 1970 on."""
    end: int
    width: Width
    services: Sequence[Service] | None = None
    """None: all."""
    group_by: Sequence[str] = ()
    only: dict[str, Sequence[Any]] = field(default_factory=dict)
    """Values of groups, such as some projects."""


def buckets(connection: Connection, query: Query) -> list[tuple[int, list[Row]]]:
    """The buckets from `begin` to `end`, empty ones included, each with a row per group.

    A row has the groups and `requests`, `input_tokens`, `cached_tokens`, `output_tokens`, `training_tokens` and `cost`
    (nano-dollars).
    """
    entries, seconds = tables.ledger.c, SECONDS[query.width]
    bucket = (entries.at - entries.at % seconds).label("bucket")
    groups = [GROUPS[name].label(name) for name in query.group_by]
    rules: list[ColumnElement[bool]] = [
        entries.at >= query.begin,
        entries.at < query.end,
        entries.kind != "reserve",
        *(GROUPS[name].in_(values) for name, values in query.only.items()),
    ]
    if query.services is not None:
        rules.append(entries.service.in_(query.services))
    sums = [
        func.sum(case((entries.kind == "settle", 1), else_=0)).label("requests"),
        *(
            func.sum(entries[name]).label(name)
            for name in ("input_tokens", "cached_tokens", "output_tokens", "training_tokens", "cost")
        ),
    ]
    rows = connection.execute(
        select(bucket, *groups, *sums).where(*rules).group_by(bucket, *groups).order_by(bucket, *groups)
    )
    found: dict[int, list[Row]] = {
        begin: [] for begin in range(query.begin - query.begin % seconds, query.end, seconds)
    }
    for row in rows.mappings():
        found[row["bucket"]].append({name: _plain(value) for name, value in row.items() if name != "bucket"})
    return list(found.items())


def _plain(value: Any) -> Any:
    """PostgreSQL sums bigints to decimals."""
    return value if value is None or isinstance(value, bool | str) else int(value)
