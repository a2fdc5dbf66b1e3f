"""Works on batches: every line goes the way of a request, with the batch's own priority and price.

A line's answer is a row as soon as it is there, so the next server goes on where this one stopped. A line that was
paid, and whose answer was lost with its server, is answered again for nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from sqlalchemy import Connection, Select, delete, func, insert, select, update

from steelyard.errors import EngineUnavailableError, SteelyardError, StorageError
from steelyard.serve.batches import records
from steelyard.serve.batches.records import Line
from steelyard.serve.files import Files
from steelyard.serve.files import get as get_file
from steelyard.store import tables

BATCHES_AT_ONCE = 4
AT_ONCE = 16
"""Lines of a batch under way together; the engine shares its time between projects."""
IDLE_SECONDS = 0.5
RETRY_SECONDS = 1.0
"""Before a line whose engine is not there is asked again."""

Row = dict[str, Any]
Answer = Callable[[Row, Line, str, bool], Awaitable[tuple[int, str, Row]]]
"""(batch, line, id of the attempt, whether it was paid before) -> status, request id, body."""
log = logging.getLogger("steelyard.batches")


class BatchRunner:
    """Works on one batch of each project, several projects' at once.

    Args:
        files: for inputs and outputs.
        clock: Unix seconds.
    """

    answer: Answer
    """How a line is answered; the application says."""

    def __init__(self, files: Files, clock: Callable[[], float]) -> None:
        self.files, self.database, self._clock = files, files.database, clock
        self._wake = asyncio.Event()
        self._working: dict[str, asyncio.Task[None]] = {}

    def wake(self) -> None:
        """There is something to do."""
        self._wake.set()

    async def work(self) -> None:
        """Work on whatever there is until it is cancelled."""
        try:
            while True:
                self._wake.clear()
                try:
                    await self._begin_some()
                except StorageError as error:
                    log.error("batches wait: %s", error)
                except Exception:  # whatever it is: they go on
                    log.exception("batches wait")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), IDLE_SECONDS)
        finally:
            for task in self._working.values():
                task.cancel()
            await asyncio.gather(*self._working.values(), return_exceptions=True)

    async def _begin_some(self) -> None:
        for batch in await self.database.read(self._waiting):
            if batch["project_id"] in self._working or len(self._working) >= BATCHES_AT_ONCE:
                continue
            if await self.database.write(partial(records.claim, row=batch, holder=self.database.holder)):
                task = asyncio.create_task(self._work_on(batch), name=f"batch {batch['id']}")
                self._working[batch["project_id"]] = task

    def _waiting(self, connection: Connection) -> list[Row]:
        """Of each project the oldest batch, unless another server works on it."""
        held = (self.database.holder, None)
        return [
            batch
            for batch in records.open_batches(connection)
            if batch["holder"] in held or not self.database.is_held(connection, batch["holder"])
        ]

    async def _work_on(self, batch: Row) -> None:
        """Bring a batch a status on. What goes wrong ends it, and no other; but where the store is away, it waits."""
        try:
            await self._advance(batch)
        except StorageError as error:
            log.error("the batch %s waits: %s", batch["id"], error)
            await asyncio.sleep(IDLE_SECONDS)
        except Exception:
            log.exception("%s", batch["id"])
            await self._fail(batch, INTERNAL)
        finally:
            del self._working[batch["project_id"]]
            self.wake()

    async def _advance(self, batch: Row) -> None:
        """Bring a batch as far as it goes now."""
        lines: list[Line] = []
        try:
            lines, errors = await asyncio.to_thread(self._read, batch)
        except StorageError:
            raise
        except SteelyardError as error:
            errors = [_error("invalid_file", str(error), "input_file_id")]
        if batch["status"] == "validating":
            await self._begin(batch, lines, errors)
        elif batch["status"] == "in_progress" and errors:
            await self._fail(batch, errors[0])
        else:
            if batch["status"] == "in_progress":
                await self._run(batch, lines)
            await self._finish(batch, lines)

    async def _fail(self, batch: Row, error: Row) -> None:
        """End a batch that cannot go on; the answers that it has are kept, and its owner is told why."""
        made: Row = {}
        try:
            made = await self._write_files(batch)
        except StorageError as away:  # it is tried again
            log.error("the batch %s waits: %s", batch["id"], away)
            return
        except Exception:
            log.exception("the answers of %s are lost", batch["id"])

        def end(connection: Connection) -> None:
            row = records.get(connection, batch["project_id"], batch["id"])
            records.move(connection, row, "failed", self._now(), errors=[error], **made)
            connection.execute(delete(tables.batch_lines).where(tables.batch_lines.c.batch_id == batch["id"]))

        with contextlib.suppress(StorageError):
            await self.database.write(end)

    def _read(self, batch: Row) -> tuple[list[Line], list[Row]]:
        row = self.database.read_now(
            lambda connection: get_file(connection, batch["project_id"], batch["input_file_id"])
        )
        with self.files.clear(batch["project_id"], row["artifact"], "batch.jsonl") as path:
            return records.read_lines(path, batch["endpoint"])

    async def _begin(self, batch: Row, lines: Sequence[Line], errors: list[Row]) -> None:
        models = {line.body.get("model") for line in lines}
        model = next(iter(models)) if len(models) == 1 else None
        now = self._now()

        def begin(connection: Connection) -> None:
            row = records.get(connection, batch["project_id"], batch["id"])
            if row["status"] == "cancelling":
                records.move(connection, row, "cancelled", now)
            elif errors:
                records.move(connection, row, "failed", now, errors=errors)
            else:
                values = {"total": len(lines), "model": model if isinstance(model, str) else None}
                records.move(connection, row, "in_progress", now, **values)

        await self.database.write(begin)

    async def _run(self, batch: Row, lines: Sequence[Line]) -> None:
        """Answer the lines that have no answer yet, several at once."""
        done, begun, paid = await self.database.read(lambda connection: _progress(connection, batch["id"]))
        waiting = iter([line for line in lines if line.number not in done])

        async def work() -> None:
            for line in waiting:
                if await self._ended(batch):
                    return
                name = line_id(batch, line)
                await self._answer(batch, line, again=name in begun, paid=name in paid)

        workers = [asyncio.create_task(work()) for _ in range(AT_ONCE)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _answer(self, batch: Row, line: Line, *, again: bool, paid: bool) -> None:
        while True:
            attempt = line_id(batch, line) + (f".{secrets.token_hex(4)}" if again else "")
            try:
                status, request_id, body = await self.answer(batch, line, attempt, paid)
                break
            except (EngineUnavailableError, StorageError):
                again = True
                await asyncio.sleep(RETRY_SECONDS)
                if await self._ended(batch):
                    return
            except Exception:  # a fault of ours costs one line
                log.exception("%s", attempt)
                status, request_id, body = 500, f"req_{secrets.token_hex(16)}", {"error": FAULT}
                break
        failed = status != 200
        content = {
            "id": f"batch_req_{line_id(batch, line)}",
            "custom_id": line.custom_id,
            "response": {"status_code": status, "request_id": request_id, "body": body},
            "error": None,
        }
        sealed = await asyncio.to_thread(self._seal, batch, content)

        def keep(connection: Connection) -> None:
            row = {"batch_id": batch["id"], "number": line.number, "failed": failed, "content": sealed}
            connection.execute(insert(tables.batch_lines), row)
            count = tables.batches.c.failed if failed else tables.batches.c.completed
            connection.execute(
                update(tables.batches).where(tables.batches.c.id == batch["id"]).values({count: count + 1})
            )

        await self.database.write(keep)

    async def _finish(self, batch: Row, lines: Sequence[Line]) -> None:
        """Write the files, once every line has its answer or none is begun any more."""
        now = self._now()

        def finalize(connection: Connection) -> Row:
            row = records.get(connection, batch["project_id"], batch["id"])
            return row if row["status"] != "in_progress" else records.move(connection, row, "finalizing", now)

        row = await self.database.write(finalize)
        count = row["completed"] + row["failed"]
        expired = count < row["total"] and row["status"] == "finalizing"
        if expired:
            await self._mark_expired(batch, lines)
        made = await self._write_files(batch)
        end: records.Status = "cancelled" if row["status"] == "cancelling" else "expired" if expired else "completed"

        def end_it(connection: Connection) -> None:
            latest = records.get(connection, batch["project_id"], batch["id"])
            records.move(connection, latest, end, self._now(), **made)
            connection.execute(delete(tables.batch_lines).where(tables.batch_lines.c.batch_id == batch["id"]))

        await self.database.write(end_it)

    async def _mark_expired(self, batch: Row, lines: Sequence[Line]) -> None:
        done, _, _ = await self.database.read(lambda connection: _progress(connection, batch["id"]))
        error = {"code": "batch_expired", "message": "This request was not run within the batch's 24 hours."}
        for line in lines:
            if line.number in done:
                continue
            content = {
                "id": f"batch_req_{line_id(batch, line)}",
                "custom_id": line.custom_id,
                "response": None,
                "error": error,
            }
            row = {"batch_id": batch["id"], "number": line.number, "failed": True}
            row["content"] = await asyncio.to_thread(self._seal, batch, content)
            await self.database.write(partial(_insert_line, row=row))

    async def _write_files(self, batch: Row) -> Row:
        return {
            name: await asyncio.to_thread(self._write_file, batch, failed)
            for name, failed in (("output_file_id", False), ("error_file_id", True))
        }

    def _write_file(self, batch: Row, failed: bool) -> str | None:
        """The answers of one kind as a file of the project, in the order of the input; None where there are none."""
        found = tables.batch_lines.c
        rule = (found.batch_id == batch["id"], found.failed == failed)
        project = batch["project_id"]
        numbers = self.database.read_now(
            lambda connection: list(
                connection.execute(select(found.number).where(*rule).order_by(found.number)).scalars()
            )
        )
        if not numbers:
            return None
        with self.files.artifacts.writing(project) as writer:
            for begin in range(0, len(numbers), 500):
                chosen = found.number.in_(numbers[begin : begin + 500])
                query = select(found.content).where(found.batch_id == batch["id"], chosen).order_by(found.number)
                rows = self.database.read_now(partial(_scalars, query=query))
                for sealed in rows:
                    writer.write(self.files.artifacts.unseal(project, sealed) + b"\n")
        name = f"{batch['id']}_{'error' if failed else 'output'}.jsonl"
        row = self.files.add(project, name, "batch_output", writer.stored, self._now())
        identity: str = row["id"]
        return identity

    async def _ended(self, batch: Row) -> bool:
        """Whether no line is to be begun any more."""
        query = select(tables.batches.c.status).where(tables.batches.c.id == batch["id"])
        status: str = await self.database.read(lambda connection: connection.execute(query).scalar_one())
        return status != "in_progress" or bool(self._now() >= batch["expires_at"])

    def _seal(self, batch: Row, content: Row) -> bytes:
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        return self.files.artifacts.seal(batch["project_id"], text.encode())

    def _now(self) -> int:
        return int(self._clock())


def _error(code: str, message: str, param: str | None = None) -> Row:
    return {"line": None, "code": code, "message": message, "param": param}


OURS = "an internal error: the server's log has it under the batch's id"
INTERNAL = _error("internal_error", OURS)
FAULT: Row = {"message": OURS, "type": "server_error", "param": None, "code": "internal_error"}
"""Of a batch, and of one of its lines."""


def line_id(batch: Row, line: Line) -> str:
    """What a line's first reservation is called; those of later attempts have a dot and something more."""
    return f"{batch['id']}_{line.number}"


def _insert_line(connection: Connection, row: Row) -> None:
    connection.execute(insert(tables.batch_lines), row)


def _scalars(connection: Connection, query: Select[Any]) -> list[Any]:
    return list(connection.execute(query).scalars())


def _progress(connection: Connection, batch_id: str) -> tuple[set[int], set[str], set[str]]:
    """The lines that have an answer, those that were begun, and those that were paid."""
    found, entries = tables.batch_lines.c, tables.ledger.c
    done = set(connection.execute(select(found.number).where(found.batch_id == batch_id)).scalars())
    prefix = f"{batch_id}_"
    rule = func.substr(entries.reference, 1, len(prefix)) == prefix
    rows = connection.execute(select(entries.reference, entries.cost).where(rule)).all()
    names = [(row.reference.partition(".")[0], row.cost) for row in rows]
    return done, {name for name, _ in names}, {name for name, cost in names if cost > 0}
