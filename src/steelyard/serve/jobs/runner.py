"""Works on jobs: checks them, runs each as a subprocess, tells what happens, publishes what comes out.

What a run has learnt is on disk every few steps, so a job whose process, server or machine dies goes on from there,
here or under the next server. Whether to go on is asked of the job's row: pausing and cancelling are changes of its
status. Several run at once where there are slots and memory, those of the project with the fewest first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, select, update

from steelyard import memory
from steelyard.errors import EngineUnavailableError, QuotaError, RequestError, SteelyardError, StorageError
from steelyard.serve.billing.ledger import Ledger, Reservation
from steelyard.serve.billing.prices import Counts, PriceList
from steelyard.serve.jobs import process, records
from steelyard.serve.jobs.kind import Checked, Kind, Made
from steelyard.store import tables
from steelyard.store.database import Database

IDLE_SECONDS = 0.5
SERVE_SECONDS = 60
"""How long a model that was made waits for its engine, which may just be restarting."""
LONGEST_WAIT = 60.0
"""Seconds before something is tried again that is away for long."""
MOST_ATTEMPTS = 5
"""Processes that may die under a job before it fails."""

Row = dict[str, Any]
log = logging.getLogger("steelyard.jobs")


class JobRunner:
    """Works on the jobs of some models.

    Args:
        database: where they are.
        kinds: what can be worked on, by the name of its kind.
        ledger: where they are paid.
        prices: those of now.
        folder: where jobs have their folders.
        clock: Unix seconds.
        knows: whether this process has a model.
        serve: lets requests name a model that a job made.
        drop: forgets one that cannot be served.
        slots: runs at once.
        threads: of a run; None: half of the processor's, for all slots together.
    """

    def __init__(
        self,
        database: Database,
        kinds: Mapping[str, Kind],
        ledger: Ledger,
        prices: Callable[[], PriceList],
        folder: Path,
        clock: Callable[[], float],
        *,
        knows: Callable[[str, str], bool],
        serve: Callable[[Row], Awaitable[None]],
        drop: Callable[[str, str], Awaitable[None]],
        slots: int = 1,
        threads: int | None = None,
    ) -> None:
        self.database, self.kinds, self.ledger, self._prices = database, kinds, ledger, prices
        self.folder, self._clock = folder, clock
        self._knows, self._serve_model, self._drop = knows, serve, drop
        self.slots = slots
        self.threads = threads or max(1, (os.cpu_count() or 2) // 2 // max(1, slots))
        self._wake = asyncio.Event()
        self._working: dict[str, asyncio.Task[None]] = {}
        self.processes: dict[str, Process] = {}
        """The runs that there are, by the job's id."""
        self._put_off_until: dict[str, tuple[float, float]] = {}
        """Of jobs whose files or rows are away: when they are tried again, and how long they waited for it."""
        self._let_in: dict[str, int] = {}
        """By the job's id, the bytes that its run was let in for."""

    def wake(self) -> None:
        """There is something to do."""
        self._wake.set()

    async def work(self) -> None:
        """Work on whatever there is until it is cancelled; runs then save their state, for the next server."""
        try:
            while self.slots:
                try:
                    await self._adopt()
                    if not (await self._check_next() or await self._run_next()):
                        await self._sweep()
                        self._wake.clear()
                        with contextlib.suppress(TimeoutError):
                            await asyncio.wait_for(self._wake.wait(), IDLE_SECONDS)
                except StorageError as error:
                    log.error("jobs wait: %s", error)
                    await asyncio.sleep(IDLE_SECONDS)
                except Exception:  # whatever it is: others' jobs go on
                    log.exception("jobs wait")
                    await asyncio.sleep(IDLE_SECONDS)
        finally:
            for task in self._working.values():
                task.cancel()
            await asyncio.gather(*self._working.values(), return_exceptions=True)

    async def _adopt(self) -> None:
        """Jobs whose server has died, or could not say that it let them go, are queued again."""
        jobs, ours = tables.jobs.c, set(self._working)

        def orphaned(connection: Connection) -> list[str]:
            rows = connection.execute(select(jobs.id, jobs.holder).where(jobs.status == "running")).all()
            return [row.id for row in rows if row.id not in ours and not self._is_held(connection, row.holder)]

        def adopt(connection: Connection, found: list[str]) -> None:
            for job in found:
                records.move(
                    connection,
                    job,
                    ("running",),
                    self._now(),
                    "Its server stopped; it goes on",
                    status="queued",
                    holder=None,
                )

        found = await self.database.read(orphaned)
        if found:
            await self.database.write(partial(adopt, found=found))

    def _is_held(self, connection: Connection, holder: int | None) -> bool:
        """Whether somebody else works on it."""
        return holder is not None and holder != self.database.holder and self.database.is_held(connection, holder)

    @contextlib.asynccontextmanager
    async def _failing(self, job: Row, param: str | None = None) -> AsyncIterator[None]:
        """What goes wrong fails the job, and no other; but where the store is away, it waits.

        Raises:
            StorageError: the database or the artifacts cannot be reached just now.
        """
        try:
            yield
        except StorageError:
            raise
        except SteelyardError as error:
            await self._fail(job, error, getattr(error, "param", None) or param)
        except Exception:
            log.exception("%s", job["id"])
            await self._fail(job, SteelyardError("an internal error: the server's log has it under the job's id"))

    # Checking.

    async def _check_next(self) -> bool:
        for job in await self._waiting("validating_files"):
            if await self.database.write(partial(records.claim, job=job, holder=self.database.holder)):
                try:
                    await self._check(job)
                except StorageError as error:
                    self._put_off(job, error)
                return True
        return False

    def _put_off(self, job: Row, error: StorageError) -> None:
        """What it needs is away: others go first, and it is tried again later and later."""
        last = self._put_off_until.get(job["id"], (0.0, 0.0))[1]
        seconds = min(max(IDLE_SECONDS, 2 * last), LONGEST_WAIT)
        self._put_off_until[job["id"]] = time.monotonic() + seconds, seconds
        log.error("the job %s waits %.1f s: %s", job["id"], seconds, error)

    async def _check(self, job: Row) -> None:
        async with self._failing(job, param="training_file" if job["kind"] == "fine_tuning" else "model"):
            checked = await asyncio.to_thread(self.kinds[job["kind"]].check, job)
            most = memory.total()
            if not memory.fits(checked.memory, (), most):
                raise RequestError(
                    f"it takes about {checked.memory / memory.GIGABYTE:.1f} GB of memory, and this machine has"
                    f" {(most or 0) / memory.GIGABYTE:.1f}: take shorter rows, smaller batches or a smaller model",
                    code="not_enough_memory",
                )
            await self._reserve(job, checked)
            values: Row = {"resolved": checked.resolved, "tokens": checked.tokens, "memory": checked.memory}
            if not await self._move(
                job, ("validating_files",), checked.message, status="queued", holder=None, **values
            ):
                await self._settle(job, 0)  # cancelled meanwhile
        self._put_off_until.pop(job["id"], None)

    async def _reserve(self, job: Row, checked: Checked) -> None:
        """Hold what it may cost; a check that was cut off has held it before."""
        quote = self._prices().quote(job["model"])
        amount = quote.cost(Counts(training_tokens=checked.tokens))
        service = self.kinds[job["kind"]].service
        held = tables.reservations.c
        query = select(held.id).where(held.id == job["id"])
        if await self.database.read(lambda connection: connection.execute(query).first()) is None:
            await self.ledger.reserve(
                Reservation(job["id"], job["project_id"], job["key_id"], job["model"], service, quote, amount),
                kept=True,
            )

    async def _settle(self, job: Row, tokens: int) -> None:
        await asyncio.wrap_future(self.ledger.settle(job["id"], Counts(training_tokens=tokens)))

    # Running.

    async def _run_next(self) -> bool:
        if len(self._working) >= self.slots:
            return False
        for job in await self._waiting("queued"):
            if job["id"] in self._working:  # paused and resumed: its run is still ending
                continue
            if await self._has_memory(job):
                return await self._take(job)
        return False

    async def _has_memory(self, job: Row) -> bool:
        """Whether there is room for a run beside those that there are; says once that it waits for some."""
        taken = {id: memory.resident(run.pid) for id, run in self.processes.items()}
        running = [(estimate, taken.get(id, 0)) for id, estimate in self._let_in.items()]
        free = memory.available()
        if memory.fits(job["memory"] or 0, running, free):
            return True
        wanted, there = (job["memory"] or 0) / memory.GIGABYTE, (free or 0) / memory.GIGABYTE
        await self._say_once(job, f"It waits for memory: it takes about {wanted:.1f} GB", f", {there:.1f} GB are free")
        return False

    async def _take(self, job: Row) -> bool:
        called = self.kinds[job["kind"]].called.capitalize()
        first = job["started_at"] is None
        values: Row = {"status": "running", "holder": self.database.holder}
        if first:
            values["started_at"] = self._now()
        if await self._move(job, ("queued",), f"{called} job {'started' if first else 'goes on'}", **values):
            self._let_in[job["id"]] = job["memory"] or 0
            self._working[job["id"]] = asyncio.create_task(self._work_on(job), name=f"job {job['id']}")
        return True

    async def _work_on(self, job: Row) -> None:
        """Run a job that was taken, as far as it goes; what cannot be done now is done again later."""
        try:
            async with self._failing(job):
                await self._run(job)
            self._put_off_until.pop(job["id"], None)
        except asyncio.CancelledError:
            await asyncio.shield(self._release(job))
            raise
        except StorageError as error:
            self._put_off(job, error)
        finally:
            del self._working[job["id"]], self._let_in[job["id"]]
            self.wake()

    async def _run(self, job: Row) -> None:
        folder, kind = self.folder / job["id"], self.kinds[job["kind"]]
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        arguments = await asyncio.to_thread(kind.prepare, job, folder, self.threads)
        for _ in range(MOST_ATTEMPTS):
            code, complaint = await self._run_once(job, folder, arguments)
            status = await self._status(job)
            if status == "running" and not await self._is_ours(job):
                return
            if code == 0 and status != "cancelled":
                await self._publish(job, folder)
                return
            if status != "running":  # paused or cancelled: it was asked to stop
                await self._leave(job, status)
                return
            if complaint is not None:
                raise complaint
            log.warning("the run of %s died (%s): it goes on from its last state", job["id"], code)
            await self._say(job, f"Its process died ({code}); it goes on from its last checkpoint", level="warn")
        raise SteelyardError(f"its process died {MOST_ATTEMPTS} times")

    async def _run_once(self, job: Row, folder: Path, arguments: list[str]) -> tuple[int, SteelyardError | None]:
        """One life of a run's process; its events are told while it lasts."""
        told = await self._last_told(job)

        async def wanted() -> bool:
            nonlocal told
            told = await self._tell(job, folder, told)
            return await self._is_ours(job)

        run = self.processes[job["id"]] = await process.start(folder, arguments, self.threads)
        try:
            ended = await process.attend(run, folder, wanted)
            await self._tell(job, folder, told, ended=True)
            return ended
        finally:
            del self.processes[job["id"]]

    async def _tell(self, job: Row, folder: Path, told: int, *, ended: bool = False) -> int:
        """Events for the steps that were done since; returns the last step that was told."""
        progress = await asyncio.to_thread(self.kinds[job["kind"]].progress, job, folder, ended=ended)
        fresh = [advance for advance in progress.advances if advance.step > told]
        if not fresh:
            return told
        now, left = self._now(), progress.seconds_left

        def tell(connection: Connection) -> None:
            for advance in fresh:
                records.say(connection, job["id"], advance.message, now, kind="metrics", data=advance.data)
            finish = None if left is None else now + int(left)
            values = {"trained_tokens": progress.tokens, "estimated_finish": finish}
            connection.execute(update(tables.jobs).where(tables.jobs.c.id == job["id"]).values(**values))

        await self.database.write(tell)
        self.ledger.progress(job["id"], Counts(training_tokens=progress.tokens))
        return fresh[-1].step

    async def _last_told(self, job: Row) -> int:
        events = tables.job_events.c
        query = select(events.data).where(events.job_id == job["id"], events.type == "metrics")
        query = query.order_by(events.number.desc()).limit(1)
        data = await self.database.read(lambda connection: connection.execute(query).scalar())
        return 0 if data is None else int(data["step"])

    # Ends.

    async def _publish(self, job: Row, folder: Path) -> None:
        """Keep and serve what was made, then say that the job has succeeded."""
        kind, now = self.kinds[job["kind"]], self._now()
        tokens = (await asyncio.to_thread(kind.progress, job, folder, ended=True)).tokens
        made = await asyncio.to_thread(kind.publish, job, folder, now)
        try:
            for row in made.models:
                await self._serve(row)
        except SteelyardError:
            await self._drop_all(job, made)
            raise
        await self._settle(job, tokens)
        if made.message is not None:
            await self._say(job, made.message)
        succeeded = await self._move(
            job,
            ("running", "paused", "queued"),
            "The job has successfully completed",
            status="succeeded",
            result_model=made.models[0]["id"],
            result_files=made.files,
            trained_tokens=tokens,
            finished_at=now,
            estimated_finish=None,
            holder=None,
        )
        if not succeeded:  # cancelled meanwhile
            await self._drop_all(job, made)
        await asyncio.to_thread(shutil.rmtree, folder, True)

    async def _drop_all(self, job: Row, made: Made) -> None:
        for row in made.models:
            with contextlib.suppress(SteelyardError):
                await self._drop(job["project_id"], row["id"])

    async def _serve(self, row: Row) -> None:
        for attempt in range(SERVE_SECONDS):
            try:
                await self._serve_model(row)
                return
            except EngineUnavailableError:
                if attempt == SERVE_SECONDS - 1:
                    raise
                await asyncio.sleep(1)

    async def _leave(self, job: Row, status: str) -> None:
        """A run that was asked to stop: its state stays for a resumption, or goes."""
        if status != "cancelled":
            return
        folder = self.folder / job["id"]
        progress = await asyncio.to_thread(self.kinds[job["kind"]].progress, job, folder, ended=True)
        row = await self.database.read(lambda connection: records.get(connection, job["project_id"], job["id"]))
        await self._settle(job, max(progress.tokens, row["trained_tokens"]))  # it may have run elsewhere
        await asyncio.to_thread(shutil.rmtree, folder, True)

    async def _fail(self, job: Row, error: SteelyardError, param: str | None = None) -> None:
        code = getattr(error, "code", None) or ("insufficient_quota" if isinstance(error, QuotaError) else "job_failed")
        told = {"code": code, "message": str(error)[:2000], "param": param}
        await self._move(
            job,
            ("validating_files", "queued", "running", "paused"),
            f"The job failed: {told['message']}",
            status="failed",
            error=told,
            finished_at=self._now(),
            estimated_finish=None,
            holder=None,
        )
        row = await self.database.read(lambda connection: records.get(connection, job["project_id"], job["id"]))
        await self._settle(job, row["trained_tokens"])
        await asyncio.to_thread(shutil.rmtree, self.folder / job["id"], True)

    async def _release(self, job: Row) -> None:
        """The server ends: the next one goes on."""
        await self._move(job, ("running",), "Its server stops; it waits", status="queued", holder=None)

    async def _sweep(self) -> None:
        """Settle and forget jobs that are over, while nobody works on them."""

        def cancelled(connection: Connection) -> list[Row]:
            jobs, held = tables.jobs, tables.reservations
            rows = connection.execute(
                select(jobs)
                .join(held, held.c.id == jobs.c.id)
                .where(jobs.c.status.in_(("cancelled", "failed")), jobs.c.kind.in_(self.kinds))
            )
            return [dict(row) for row in rows.mappings() if not self._is_held(connection, row["holder"])]

        for job in await self.database.read(cancelled):
            if job["id"] not in self._working:
                await self._leave(job, "cancelled")

    # Rows.

    async def _waiting(self, status: records.Status) -> list[Row]:
        """Jobs of this status that are this process's to work on, those of projects with the fewest runs first."""

        def ours(connection: Connection) -> list[Row]:
            found = records.waiting(connection, status)
            now, none = time.monotonic(), (0.0, 0.0)
            return [
                job
                for job in found
                if job["kind"] in self.kinds
                and self._put_off_until.get(job["id"], none)[0] <= now
                and not self._is_held(connection, job["holder"])
            ]

        found = await self.database.read(ours)
        return await asyncio.to_thread(lambda: [job for job in found if self._knows(job["project_id"], job["model"])])

    async def _is_ours(self, job: Row) -> bool:
        """Whether it is to go on, and here: a process whose lock was lost may have been followed by another."""
        row = await self.database.read(lambda connection: records.get(connection, job["project_id"], job["id"]))
        return bool(row["status"] == "running" and row["holder"] == self.database.holder)

    async def _status(self, job: Row) -> str:
        row = await self.database.read(lambda connection: records.get(connection, job["project_id"], job["id"]))
        status: str = row["status"]
        return status

    async def _move(self, job: Row, expected: tuple[records.Status, ...], message: str, **values: Any) -> bool:
        now = self._now()
        return await self.database.write(
            lambda connection: records.move(connection, job["id"], expected, now, message, **values)
        )

    async def _say(self, job: Row, message: str, level: str = "info") -> None:
        now = self._now()
        await self.database.write(lambda connection: records.say(connection, job["id"], message, now, level=level))

    async def _say_once(self, job: Row, message: str, detail: str) -> None:
        """Say something, unless it was the last thing that was said."""
        last = await self.database.read(lambda connection: records.events(connection, job["id"], limit=1))
        if not last or not last[0]["message"].startswith(message):
            await self._say(job, message + detail)

    def _now(self) -> int:
        return int(self._clock())
