"""`steelyard keys`: API keys, of projects and of administrators."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from sqlalchemy import Connection, select

from steelyard.cli import console
from steelyard.cli.state import DatabaseUrl, Project, moment, state
from steelyard.serve.auth import ADMIN_SCOPES, PROJECT_SCOPES
from steelyard.serve.organization import keys
from steelyard.store import tables

app = typer.Typer(no_args_is_help=True, help="API keys: shown when they are made, and never again.")
Admin = Annotated[bool, typer.Option("--admin", help="Of administrators, not of a project.")]


@app.command("list", help=console.examples("List keys, without their values.", "keys list", "keys list --admin"))
def list_keys(
    project: Project = None, admin: Admin = False, database: DatabaseUrl = None, as_json: console.Json = False
) -> None:
    """See its help."""
    columns = tables.api_keys.c
    with state(database) as here:
        rule = columns.project_id.is_(None) if admin else columns.project_id == here.project(project)["id"]

        def read(connection: Connection) -> list[dict[str, Any]]:
            rows = connection.execute(select(tables.api_keys).where(rule).order_by(columns.created_at))
            return [dict(row) for row in rows.mappings()]

        rows = here.database.read_now(read)
    shown = ("id", "name", "redacted", "scopes", "created_at", "expires_at", "last_used_at")
    lines = [
        [row["id"], row["name"], row["redacted"], " ".join(row["scopes"]), moment(row["last_used_at"])] for row in rows
    ]
    table = console.table(["id", "name", "key", "scopes", "last used"], lines)
    console.result({"keys": [{name: row[name] for name in shown} for row in rows]}, as_json, table=table)


@app.command(
    help=console.examples(
        "Make a key, and show it this once.",
        "keys create laptop",
        "keys create ci --scope inference",
        "keys create ops --admin",
    )
)
def create(
    name: Annotated[str, typer.Argument(help="What it is for.")],
    project: Project = None,
    admin: Admin = False,
    scope: Annotated[list[str] | None, typer.Option(help="What it may do; default: all that such a key can.")] = None,
    database: DatabaseUrl = None,
    as_json: console.Json = False,
) -> None:
    """See its help."""
    with state(database) as here:
        owner = None if admin else here.project(project)["id"]
        actor, pepper = here.actor(), here.secrets.pepper
        scopes = scope or (ADMIN_SCOPES if admin else PROJECT_SCOPES)
        key = here.database.write_now(
            lambda connection: keys.create_key(connection, actor, pepper, name, scopes, project_id=owner)
        )
    values = {"id": key.row["id"], "name": name, "scopes": key.row["scopes"], "value": key.value}
    console.result(values, as_json, table=f"{key.value}  (shown this once; its id is {key.row['id']})")


@app.command(
    help=console.examples("Take a key back; a server that runs knows within 2 s.", "keys delete key_0123456789abcdef")
)
def delete(
    key: Annotated[str, typer.Argument(help="Its id.")],
    project: Project = None,
    admin: Admin = False,
    database: DatabaseUrl = None,
    as_json: console.Json = False,
) -> None:
    """See its help."""
    with state(database) as here:
        actor, owner = here.actor(), None if admin else here.project(project)["id"]
        here.database.write_now(lambda connection: keys.delete_key(connection, actor, key, owner))
    console.result({"id": key, "deleted": True}, as_json, table=f"{key} is taken back")
