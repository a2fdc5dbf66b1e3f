"""`steelyard budgets`: what projects may spend in a month, and have spent."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

import typer
from sqlalchemy import Connection

from steelyard.cli import console
from steelyard.cli.state import DatabaseUrl, Project, dollars, state
from steelyard.errors import ConfigError
from steelyard.serve.billing.prices import NANO
from steelyard.serve.organization import limits, projects

app = typer.Typer(no_args_is_help=True, help="What projects may spend in a month: what may cost more is refused.")


@app.command(help=console.examples("What every project may spend and has spent this month.", "budgets show"))
def show(database: DatabaseUrl = None, as_json: console.Json = False) -> None:
    """See its help."""
    month = time.strftime("%Y-%m", time.gmtime())
    with state(database) as here:
        rows = [row for row in here.database.read_now(projects.everyone) if row["archived_at"] is None]
        spent = {row["id"]: here.database.read_now(_spent(row["id"], month)) for row in rows}
    values = [
        {"id": row["id"], "name": row["name"], "limit": row["monthly_limit"], "spent": spent[row["id"]]} for row in rows
    ]
    lines = [[row["name"], row["id"], dollars(row["monthly_limit"]), dollars(spent[row["id"]])] for row in rows]
    table = console.table(["project", "id", "limit a month", f"{month}, reserved included"], lines)
    console.result({"month": month, "unit": "nano-dollars", "budgets": values}, as_json, table=table)


@app.command("set", help=console.examples("Set a project's limit.", "budgets set 20", "budgets set none -p search"))
def set_limit(
    amount: Annotated[str, typer.Argument(help="Dollars a month, or none.")],
    project: Project = None,
    database: DatabaseUrl = None,
    as_json: console.Json = False,
) -> None:
    """See its help."""
    try:
        nano = None if amount == "none" else round(float(amount) * NANO)
    except (ValueError, OverflowError):
        raise ConfigError(f"'{amount}' is no amount: give dollars, such as 20 or 0.5, or none") from None
    if nano is not None and not 0 <= nano <= limits.MOST_DOLLARS * NANO:
        raise ConfigError(f"a limit is 0 to {limits.MOST_DOLLARS} dollars")
    with state(database) as here:
        actor, row = here.actor(), here.project(project)
        here.database.write_now(lambda connection: limits.set_spend_limit(connection, actor, row["id"], nano))
    console.result({"id": row["id"], "limit": nano}, as_json, table=f"{row['name']}: {dollars(nano)} a month")


def _spent(project: str, month: str) -> Callable[[Connection], int]:
    return lambda connection: limits.spent(connection, project, month)
