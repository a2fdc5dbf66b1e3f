"""`steelyard projects`: who a server serves."""

from __future__ import annotations

from typing import Annotated

import typer

from steelyard.cli import console
from steelyard.cli.state import DatabaseUrl, moment, state
from steelyard.serve.organization import projects
from steelyard.serve.protocol.organization import Project

app = typer.Typer(no_args_is_help=True, help="Projects: each has its own keys, files, jobs, models and budget.")


@app.command("list", help=console.examples("List projects.", "projects list", "projects list --archived --json"))
def list_projects(
    archived: Annotated[bool, typer.Option("--archived", help="Archived ones too.")] = False,
    database: DatabaseUrl = None,
    as_json: console.Json = False,
) -> None:
    """See its help."""
    with state(database) as here:
        rows = [Project.of(row) for row in here.database.read_now(projects.everyone)]
    rows = [row for row in rows if archived or row.archived_at is None]
    lines = [[row.id, row.name, row.status, moment(row.created_at)] for row in rows]
    table = console.table(["id", "name", "status", "created"], lines)
    console.result({"projects": [_plain(row) for row in rows]}, as_json, table=table)


@app.command(help=console.examples("Make a project.", "projects create 'search team'"))
def create(
    name: Annotated[str, typer.Argument(help="Its name.")], database: DatabaseUrl = None, as_json: console.Json = False
) -> None:
    """See its help."""
    with state(database) as here:
        actor = here.actor()
        row = here.database.write_now(lambda connection: projects.create(connection, actor, name))
    console.result(_plain(Project.of(row)), as_json, table=f"{row['id']}  {row['name']}")


@app.command(help=console.examples("Close a project for good: its keys stop working.", "projects archive 'old team'"))
def archive(
    project: Annotated[str, typer.Argument(help="Its id or name.")],
    database: DatabaseUrl = None,
    as_json: console.Json = False,
) -> None:
    """See its help."""
    with state(database) as here:
        actor, identity = here.actor(), here.project(project)["id"]
        row = here.database.write_now(lambda connection: projects.archive(connection, actor, identity))
    console.result(_plain(Project.of(row)), as_json, table=f"{row['id']}  archived")


def _plain(project: Project) -> dict[str, object]:
    return {"id": project.id, "name": project.name, "status": project.status, "created_at": project.created_at}
