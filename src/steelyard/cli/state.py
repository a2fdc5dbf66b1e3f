"""What the verbs that administer a server share: its database, opened beside it, and who changes something."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from steelyard.errors import ConfigError
from steelyard.serve.billing.prices import NANO
from steelyard.serve.organization import projects
from steelyard.serve.organization.audit import Actor
from steelyard.store.database import Database, opened, sqlite_url
from steelyard.store.secrets import Secrets, home, open_secrets

DatabaseUrl = Annotated[
    str | None, typer.Option("--database", metavar="URL", help="As `serve` has it; default: STEELYARD_HOME.")
]
Project = Annotated[str | None, typer.Option("--project", "-p", help="Its id or name; default: the first.")]


@dataclass(frozen=True)
class State:
    """A server's database and secrets."""

    database: Database
    secrets: Secrets

    def actor(self) -> Actor:
        """The command line, for the audit log."""
        return Actor("cli", int(time.time()), self.secrets.chain)

    def project(self, wanted: str | None) -> dict[str, Any]:
        """The project of this id or name; the first without one.

        Raises:
            ConfigError: there is none, or several have the name.
        """
        rows = self.database.read_now(projects.everyone)
        found = [row for row in rows if wanted is None or wanted in (row["id"], row["name"])]
        if wanted is None and found:
            return found[0]
        if len(found) != 1:
            how = "no project is" if not found else "several projects are"
            raise ConfigError(f"{how} called '{wanted}': see `steelyard projects list`")
        return found[0]


@contextlib.contextmanager
def state(database: str | None) -> Iterator[State]:
    """The state of the server on this machine, whether it runs or not."""
    secrets = open_secrets()
    with opened(database or sqlite_url(home() / "steelyard.db")) as store:
        yield State(store, secrets)


def dollars(nano: int | None) -> str:
    """Money for people."""
    return "-" if nano is None else f"${nano / NANO:.6f}"


def moment(seconds: int | None) -> str:
    """A time for people."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
