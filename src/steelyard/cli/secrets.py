"""`steelyard secrets`: the server's own secrets."""

from __future__ import annotations

import typer

from steelyard.cli import console
from steelyard.cli.state import DatabaseUrl
from steelyard.serve.rotation import rotate_root
from steelyard.store.database import opened, sqlite_url
from steelyard.store.secrets import home

app = typer.Typer(no_args_is_help=True, help="The server's own secrets, kept in secrets.json beside its database.")


@app.callback()
def _family() -> None:
    pass


@app.command(
    help=console.examples(
        "Take a new root key, which wraps the keys that files and models are encrypted with. Stop the server and its "
        "workers first; back up the new secrets.json afterwards. One that is cut off goes on when it is called again.",
        "secrets rotate",
        "secrets rotate --database postgresql+psycopg://steelyard@db/steelyard",
    )
)
def rotate(database: DatabaseUrl = None, as_json: console.Json = False) -> None:
    """See its help."""
    with opened(database or sqlite_url(home() / "steelyard.db"), role="server") as store:
        count = rotate_root(store)
    told = f"a new root key wraps the keys of {count} projects: back up secrets.json now"
    console.result({"projects": count}, as_json, table=told)
