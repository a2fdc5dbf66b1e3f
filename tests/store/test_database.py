"""The database: migrations, group commit, who is alive; on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, event, insert, select

from databases import database_url
from steelyard.errors import ConfigError, StorageError
from steelyard.store import tables
from steelyard.store.database import Database, opened, sqlite_url


def project(name: str) -> dict[str, Any]:
    return {"id": name, "name": name, "created_at": 1}


def add(name: str) -> Any:
    return lambda connection: connection.execute(insert(tables.projects), project(name))


def names(connection: Connection) -> list[str]:
    return list(connection.execute(select(tables.projects.c.id).order_by(tables.projects.c.id)).scalars())


def test_migrations_make_the_tables(fresh_database: str) -> None:
    for _ in range(2):  # the second finds them
        with opened(fresh_database) as database, database.engine.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []


def test_a_newer_database_is_left_alone(fresh_database: str) -> None:
    with opened(fresh_database) as database:
        database.write_now(
            lambda connection: connection.execute(sqlalchemy.text("update alembic_version set version_num = '9999'"))
        )
    with pytest.raises(ConfigError, match="newer Steelyard"):
        Database(fresh_database)


@pytest.mark.parametrize(
    "url",
    ["nonsense", "sqlite://", "mysql://x/y", "postgresql+psycopg://nobody@127.0.0.1:1/none", "sqlite:////proc/x/y"],
)
def test_a_database_that_cannot_be_used_is_said(url: str) -> None:
    with pytest.raises(ConfigError, match=r"database"):
        Database(url)


def test_one_commit_for_what_waits_at_the_same_time(fresh_database: str) -> None:
    with opened(fresh_database) as database:
        commits: list[object] = []
        event.listen(database.engine, "commit", commits.append)
        entered, go = threading.Event(), threading.Event()

        def hold(connection: Connection) -> None:
            entered.set()
            go.wait()

        first = database.write_soon(hold)
        entered.wait()
        answers = [database.write_soon(add(f"p{number:02}")) for number in range(50)]
        go.set()
        for answer in [first, *answers]:
            answer.result()
        assert len(commits) == 2
        assert len(database.read_now(names)) == 50


def test_an_operation_that_fails_takes_no_other_with_it(fresh_database: str) -> None:
    with opened(fresh_database) as database:
        go = threading.Event()
        held = database.write_soon(lambda connection: go.wait())

        def half(connection: Connection) -> None:
            add("half")(connection)
            raise ValueError("no")

        answers: list[Future[Any]] = [database.write_soon(work) for work in (add("a"), half, add("a"), add("b"))]
        gone = database.write_soon(add("gone"))
        assert gone.cancel()
        go.set()
        held.result()
        answers[0].result()
        answers[3].result()
        with pytest.raises(ValueError, match="no"):
            answers[1].result()
        with pytest.raises(sqlalchemy.exc.IntegrityError):
            answers[2].result()
        assert database.read_now(names) == ["a", "b"]


def test_a_value_that_no_text_can_be_takes_no_other_with_it(postgres: str) -> None:
    with database_url("postgresql", postgres) as url, opened(url, role="server") as database:
        go = threading.Event()
        held = database.write_soon(lambda connection: go.wait())
        answers: list[Future[Any]] = [database.write_soon(add(name)) for name in ("a", "b\0", "c")]
        go.set()
        held.result(5)
        answers[0].result(5)
        answers[2].result(5)
        with pytest.raises(sqlalchemy.exc.DataError):
            answers[1].result(5)
        assert database.read_now(names) == ["a", "c"]


def test_items_of_one_kind_are_applied_together(fresh_database: str) -> None:
    with opened(fresh_database) as database:
        go = threading.Event()
        held = database.write_soon(lambda connection: go.wait())

        def count(connection: Connection, items: list[int]) -> list[Any]:
            return [len(items) if item >= 0 else ValueError("negative") for item in items]

        answers = [database.apply(count, item) for item in (1, 2, -1)]
        go.set()
        held.result()
        assert [answers[0].result(), answers[1].result()] == [3, 3]
        with pytest.raises(ValueError, match="negative"):
            answers[2].result()


def test_answers_reach_an_event_loop(fresh_database: str) -> None:
    async def main(database: Database) -> list[str]:
        await asyncio.gather(*(database.write(add(f"p{number}")) for number in range(5)))
        return await database.read(names)

    with opened(fresh_database) as database:
        assert asyncio.run(main(database)) == [f"p{number}" for number in range(5)]


def test_a_file_has_one_server_and_any_number_of_visitors(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "db")
    with opened(url, role="server"):
        with opened(url) as visitor:
            visitor.write_now(add("visitor"))
        with pytest.raises(ConfigError, match="another server uses"):
            Database(url, role="server")
    with opened(url, role="server") as database:
        assert database.read_now(names) == ["visitor"]
        assert (tmp_path / "db").stat().st_mode & 0o077 == 0


def test_a_server_is_known_to_be_alive(fresh_database: str) -> None:
    with opened(fresh_database, role="server") as database:
        holder = database.holder
        assert database.read_now(lambda connection: database.is_held(connection, holder))
        assert not database.read_now(lambda connection: database.is_held(connection, 12345))
        if not database.is_sqlite:
            with opened(fresh_database, role="server") as other:
                assert other.read_now(lambda connection: other.is_held(connection, holder))
    with opened(fresh_database, role="server") as next_one:
        assert not next_one.read_now(lambda connection: next_one.is_held(connection, holder))


def test_a_lost_connection_is_said_and_opened_again(postgres: str) -> None:
    from databases import database_url

    with database_url("postgresql", postgres) as url, opened(url, role="server") as database:
        database.write_now(add("before"))
        with database.engine.connect() as connection:
            connection.execute(
                sqlalchemy.text(
                    "select pg_terminate_backend(pid) from pg_stat_activity"
                    " where datname = current_database() and pid <> pg_backend_pid()"
                )
            )
        with pytest.raises(StorageError, match="cannot be used just now"):
            database.write_now(add("lost"))
        database.write_now(add("after"))
        assert database.read_now(names) == ["after", "before"]
        assert database.read_now(lambda connection: database.is_held(connection, database.holder))
