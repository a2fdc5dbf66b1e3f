"""`steelyard ledger`: is it whole, and what it says of a month as an invoice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from sqlalchemy import Connection, func, select

from steelyard.atomic import write_file
from steelyard.cli import console
from steelyard.cli.state import DatabaseUrl, Project, dollars, state
from steelyard.cli.usage import span
from steelyard.errors import ArtifactError, ConfigError
from steelyard.serve.billing.invoices import as_csv, as_html, lines_of
from steelyard.serve.billing.reports import Query, buckets
from steelyard.store import chain, tables
from steelyard.store.secrets import home

app = typer.Typer(no_args_is_help=True, help="The ledger and the audit log: whether they are whole; invoices.")


@app.command(
    help=console.examples(
        "Check both hash chains, the balances, and the heads that were written down; exit code 5 if anything is wrong.",
        "ledger verify",
        "ledger verify --heads /backup/ledger-heads.jsonl",
    )
)
def verify(
    heads: Annotated[Path | None, typer.Option(help="Heads that were kept; default: those in STEELYARD_HOME.")] = None,
    database: DatabaseUrl = None,
    as_json: console.Json = False,
) -> None:
    """See its help."""
    kept = _heads(heads or home() / "ledger-heads.jsonl", heads is not None)
    with state(database) as here:
        key = here.secrets.chain
        wrong = here.database.read_now(lambda connection: chain.verify(connection, key, tables.ledger, kept))
        wrong += here.database.read_now(lambda connection: chain.verify(connection, key, tables.audit))
        wrong += here.database.read_now(_balances)
        rows = here.database.read_now(
            lambda connection: connection.execute(select(func.count()).select_from(tables.ledger)).scalar_one()
        )
    if wrong:
        raise ArtifactError(f"{len(wrong)} faults: {'; '.join(wrong[:20])}")
    text = f"whole: {rows} entries, {len(kept)} heads that were kept"
    console.result({"entries": rows, "heads": len(kept), "wrong": wrong}, as_json, table=text)


@app.command(
    help=console.examples(
        "A project's month as an invoice, CSV or HTML by its ending.",
        "ledger invoice 2026-11 -o november.html",
        "ledger invoice 2026-11 -p search -o november.csv",
    )
)
def invoice(
    month: Annotated[str, typer.Argument(help="Such as 2026-11.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .csv or .html file.")],
    project: Project = None,
    database: DatabaseUrl = None,
    as_json: console.Json = False,
) -> None:
    """See its help."""
    if output.suffix not in (".csv", ".html"):
        raise ConfigError(f"'{output}': an invoice is a .csv or a .html file")
    begin, end = span(month)
    with state(database) as here:
        row = here.project(project)
        query = Query(begin, end, "1d", group_by=["line_item", "model", "batch"], only={"project_id": [row["id"]]})
        days = here.database.read_now(lambda connection: buckets(connection, query))
    lines = lines_of([found for _, rows in days for found in rows])
    total = sum(line["cost"] for line in lines)
    write_file(output, as_csv(lines, total) if output.suffix == ".csv" else as_html(row, month, lines, total))
    values = {"path": str(output), "project": row["id"], "month": month, "nano_dollars": total}
    console.result(values, as_json, table=f"{output}: {row['name']}, {month}, {dollars(total)}")


def _heads(path: Path, wanted: bool) -> list[chain.Head]:
    if not path.exists():
        if wanted:
            raise ConfigError(f"there is no file '{path}'")
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
            found.append(chain.Head(int(values["sequence"]), bytes.fromhex(values["mac"])))
        except (ValueError, KeyError, TypeError):
            continue  # one that a crash cut short
    return found


def _balances(connection: Connection) -> list[str]:
    """Balances that are not the sum of their entries."""
    entries, balances = tables.ledger.c, tables.balances.c
    sums = {
        (row.project_id, row.month): int(row.total)
        for row in connection.execute(
            select(entries.project_id, entries.month, func.sum(entries.amount).label("total")).group_by(
                entries.project_id, entries.month
            )
        )
    }
    kept = {
        (row.project_id, row.month): row.amount
        for row in connection.execute(select(balances.project_id, balances.month, balances.amount))
    }
    return [
        f"balances: {project} {month} is {kept.get((project, month))}, its entries sum to {sums.get((project, month))}"
        for project, month in sorted(sums.keys() | kept.keys())
        if sums.get((project, month), 0) != kept.get((project, month), 0)
    ]
