"""The database: SQLite by default, PostgreSQL by URL. One thread writes, many operations to a commit.

A commit that is safe against a power cut waits for the disk. So operations that wait at the same time share one
transaction and one wait (group commit): each has its own savepoint, so that one that fails takes no other with it, and
each is answered after the commit. It knows nothing of what is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import queue
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar

import alembic.command
import alembic.config
import sqlalchemy
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from steelyard.errors import ConfigError, StorageError, StorageFullError

MOST_AT_ONCE = 512
"""Operations of one transaction."""
BUSY_SECONDS = 15
"""How long SQLite waits for another process, such as the command line, to finish its transaction."""

Role = Literal["server", "worker", "visitor"]
Result = TypeVar("Result")
Operation = Callable[[Connection], Result]
Apply = Callable[[Connection, list[Any]], list[Any]]
"""Applies items of one kind together; for each its result, or the exception that its asker gets."""


def sqlite_url(path: Path) -> str:
    """The URL of a file."""
    return f"sqlite:///{path}"


@dataclass
class _Work:
    apply: Apply
    item: Any
    answer: Future[Any]


class Database:
    """A database that has been brought to this version's tables.

    Args:
        url: `sqlite:///FILE` or `postgresql+psycopg://...`.
        role: what this process is. Servers and workers hold what they work on until they end; a server is alone on a
            SQLite file.

    Raises:
        ConfigError: the URL is wrong, the database cannot be reached, is newer than this program, or is another
            server's.
    """

    def __init__(self, url: str, *, role: Role = "visitor") -> None:
        self.holder = 0 if role == "visitor" else secrets.randbits(62)
        """Marks what this process works on, as long as it lives."""
        self._locks: list[int] = []
        try:
            self._engine = sqlalchemy.create_engine(url, **_options(url))
        except (SQLAlchemyError, ImportError) as error:
            raise ConfigError(f"--database: {_first_line(error)}") from None
        self.is_sqlite = self._engine.dialect.name == "sqlite"
        if self.is_sqlite:
            self._prepare_file(role)
            event.listen(self._engine, "connect", _pragmas)
            event.listen(self._engine, "begin", _begin)
        try:
            self._migrate()
            self._writing = self._engine.connect()
            if self.holder and not self.is_sqlite:
                self._writing.execute(text("select pg_advisory_lock(:holder)"), {"holder": self.holder})
                self._writing.commit()
        except SQLAlchemyError as error:
            self._release()
            raise ConfigError(f"the database cannot be used: {_first_line(error)}") from None
        except BaseException:
            self._release()
            raise
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_on, name="database writer", daemon=True)
        self._writer.start()

    @property
    def engine(self) -> sqlalchemy.Engine:
        """For reports and tests."""
        return self._engine

    def close(self) -> None:
        """Finish what is queued, then let go of the database."""
        self._queue.put(None)
        self._writer.join()
        self._writing.close()
        self._release()

    def apply(self, apply: Apply, item: Any) -> Future[Any]:
        """Queue an item for a transaction; neighbours of the same kind are applied together.

        The future has the result once it is committed, or the exception that `apply` gave for it, or a `StorageError`.
        """
        work = _Work(apply, item, Future())
        self._queue.put(work)
        return work.answer

    def write_soon(self, operation: Operation[Result]) -> Future[Result]:
        """Queue an operation for a transaction; the future ends after the commit."""
        return self.apply(_one_by_one, operation)

    async def write(self, operation: Operation[Result]) -> Result:
        """Run an operation in a transaction and wait for the commit. Raises what it raises, or `StorageError`."""
        return await asyncio.wrap_future(self.write_soon(operation))

    def write_now(self, operation: Operation[Result]) -> Result:
        """`write` for a thread that may wait."""
        return self.write_soon(operation).result()

    async def read(self, operation: Operation[Result]) -> Result:
        """Run an operation that only reads, in another thread, on a connection of its own."""
        return await asyncio.to_thread(self.read_now, operation)

    def read_now(self, operation: Operation[Result]) -> Result:
        """`read` for a thread that may wait.

        Raises:
            StorageError: the database cannot be reached.
        """
        try:
            with self._engine.connect() as connection:
                return operation(connection)
        except (OperationalError, sqlalchemy.exc.InterfaceError) as error:
            raise _explained(error) from None

    def is_held(self, connection: Connection, holder: int) -> bool:
        """Whether the process of this mark is alive."""
        if holder == self.holder:
            return True
        if self.is_sqlite:
            return _is_locked(self._holders / f"{holder:x}")
        found = connection.execute(text("select pg_try_advisory_xact_lock(:holder)"), {"holder": holder}).scalar()
        return not found

    def is_alone(self, connection: Connection) -> bool:
        """Whether no other server or worker uses it; asked while writing."""
        if self.is_sqlite:
            return not any(_is_locked(file) for file in self._holders.iterdir() if file.name != f"{self.holder:x}")
        others = connection.execute(
            text(
                "select count(*) from pg_locks where locktype = 'advisory' and pid <> pg_backend_pid()"
                " and database = (select oid from pg_database where datname = current_database())"
            )
        ).scalar_one()
        return not others

    def _write_on(self) -> None:
        while (first := self._queue.get()) is not None:
            batch = [first]
            while len(batch) < MOST_AT_ONCE and not self._queue.empty():
                item = self._queue.get()
                if item is None:
                    self._queue.put(None)
                    break
                batch.append(item)
            # Who has gone before it began needs nothing; from here on it is done, wanted or not.
            self._commit([work for work in batch if work.answer.set_running_or_notify_cancel()])

    def _commit(self, batch: list[_Work]) -> None:
        results: list[tuple[_Work, Any]] = []
        try:
            with self._writing.begin():
                groups = [(apply, list(works)) for apply, works in groupby(batch, key=lambda work: work.apply)]
                for apply, works in groups:
                    items = [work.item for work in works]
                    results += zip(works, self._apply(apply, items, alone=len(groups) == 1), strict=True)
        except Exception as error:  # nothing of it is there
            with contextlib.suppress(SQLAlchemyError):
                self._writing.rollback()
            self._mend(error)
            failure = _explained(error) if isinstance(error, SQLAlchemyError) else error
            results = [(work, failure) for work in batch]
        for work, result in results:
            if isinstance(result, Exception):
                work.answer.set_exception(result)
            else:
                work.answer.set_result(result)

    def _apply(self, apply: Apply, items: list[Any], *, alone: bool) -> list[Any]:
        if apply is _one_by_one:
            return _one_by_one(self._writing, items)
        if alone:  # the transaction is its own
            return apply(self._writing, items)
        try:
            with self._writing.begin_nested():
                return apply(self._writing, items)
        except SQLAlchemyError:
            raise  # the connection or the disk: nobody's own fault
        except Exception as error:
            return [error] * len(items)

    def _mend(self, error: Exception) -> None:
        """A connection that was lost is opened again, with the lock that says we live."""
        lost = self._writing.closed or (isinstance(error, DBAPIError) and error.connection_invalidated)
        if not lost or self.is_sqlite:
            return
        with contextlib.suppress(SQLAlchemyError):
            self._writing.close()
            self._writing = self._engine.connect()
            if self.holder:
                self._writing.execute(text("select pg_advisory_lock(:holder)"), {"holder": self.holder})
                self._writing.commit()

    def _prepare_file(self, role: Role) -> None:
        name = self._engine.url.database
        if not name or name == ":memory:":
            raise ConfigError("--database: a SQLite database needs a file, sqlite:///PATH")
        path = Path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._holders = Path(f"{path}.holders")
            self._holders.mkdir(exist_ok=True, mode=0o700)
            wanted = [Path(f"{path}.lock")] if role == "server" else []
            for file in [*wanted, self._holders / f"{self.holder:x}"] if self.holder else []:
                self._locks.append(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
                fcntl.flock(self._locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._release()
            raise ConfigError(
                f"another server uses '{path}': stop it, or give this one its own --database or STEELYARD_HOME"
            ) from None
        except OSError as error:
            raise ConfigError(f"the database '{path}' cannot be opened ({error.strerror}): choose another") from None

    def _migrate(self) -> None:
        config = alembic.config.Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        newest = ScriptDirectory.from_config(config).get_current_head()
        with self._engine.begin() as connection:
            if not self.is_sqlite:  # two servers that start together
                connection.execute(text("select pg_advisory_xact_lock(7311001)"))
            if _version(connection) == newest:
                return
            config.attributes["connection"] = connection
            try:
                alembic.command.upgrade(config, "head")
            except alembic.util.CommandError:
                raise ConfigError(
                    "the database was made by a newer Steelyard: update this one, or use another database"
                ) from None

    def _release(self) -> None:
        self._engine.dispose()
        if self.is_sqlite and self.holder:
            (self._holders / f"{self.holder:x}").unlink(missing_ok=True)
        for lock in self._locks:
            os.close(lock)
        self._locks = []


def _is_locked(file: Path) -> bool:
    """Whether the process that made a holder's file is alive."""
    try:
        descriptor = os.open(file, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _one_by_one(connection: Connection, operations: list[Operation[Any]]) -> list[Any]:
    results: list[Any] = []
    for operation in operations:
        try:
            with connection.begin_nested():
                results.append(operation(connection))
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.DataError) as error:
            results.append(error)
        except SQLAlchemyError:
            raise
        except Exception as error:
            results.append(error)
    return results


def _options(url: str) -> dict[str, Any]:
    if url.startswith("sqlite"):
        return {"connect_args": {"timeout": BUSY_SECONDS, "check_same_thread": False}}
    return {"pool_pre_ping": True, "pool_size": 4, "max_overflow": 12}


def _pragmas(connection: Any, record: object) -> None:
    connection.isolation_level = None  # transactions begin where we say
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"pragma {pragma}")


def _begin(connection: Connection) -> None:
    # Who will write says so at once: a reader that becomes a writer may find that others have written meanwhile.
    writer = threading.current_thread().name == "database writer"
    connection.exec_driver_sql("begin immediate" if writer else "begin")


def _version(connection: Connection) -> str | None:
    if not sqlalchemy.inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.execute(text("select version_num from alembic_version")).scalar()
    return found


def _explained(error: Exception) -> StorageError:
    reason = _first_line(error)
    if "disk is full" in reason or "No space left" in reason or "disk I/O error" in reason:
        return StorageFullError("the server's disk is full: nothing was stored; try again later")
    return StorageError(f"the database cannot be used just now: {reason}")


def _first_line(error: Exception) -> str:
    cause = getattr(error, "orig", None) or error
    return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__


@contextlib.contextmanager
def opened(url: str, *, role: Role = "visitor") -> Iterator[Database]:
    """A database that is closed at the end."""
    database = Database(url, role=role)
    try:
        yield database
    finally:
        database.close()
