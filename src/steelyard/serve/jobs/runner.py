"""Works on jobs: checks their files, runs their training as a subprocess, tells what happens, publishes what comes out.

The subprocess knows a folder and nothing else: no database, no secret, no key; it has the lowest priority and a share
of the processor's threads. What it has learnt is on disk every few steps, so a job whose process, server or machine
dies goes on from there, here or under the next server. Whether to go on is asked of the job's row: pausing and
cancelling are changes of its status.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection, select, update

from steelyard.errors import (
    DataError,
    EngineUnavailableError,
    QuotaError,
    RequestError,
    SteelyardError,
    StorageError,
)
from steelyard.runs import read_metrics
from steelyard.serve.billing.ledger import Reservation
from steelyard.serve.billing.prices import Counts, PriceList
from steelyard.serve.files import Files
from steelyard.serve.files import get as get_file
from steelyard.serve.jobs import records, training
from steelyard.serve.models import ServedModel
from steelyard.serve.tuned import TunedModels, model_name
from steelyard.store import tables

POLL_SECONDS = 0.3
IDLE_SECONDS = 0.5
GRACE_SECONDS = 30
"""Between SIGTERM, at which a run saves its state, and SIGKILL."""
MOST_ATTEMPTS = 5
"""Processes that may die under a job before it fails."""
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "STEELYARD_CACHE", "STEELYARD_KERNELS", "LD_LIBRARY_PATH")
INTERRUPTED = 130

Row = dict[str, Any]
log = logging.getLogger("steelyard.jobs")


class JobRunner:
    """Works on one job at a time.

    Args:
        files: for training files and result files.
        tuned: takes what jobs make.
        money: the ledger and the prices of now.
        folder: where jobs have their folders.
        clock: Unix seconds.
        threads: of a run; None: half of the processor's.
    """

    def __init__(
        self,
        files: Files,
        tuned: TunedModels,
        money: Callable[[], tuple[Any, PriceList]],
        folder: Path,
        clock: Callable[[], float],
        threads: int | None = None,
    ) -> None:
        self.files, self.tuned, self.money = files, tuned, money
        self.database, self.folder, self._clock = files.database, folder, clock
        self.threads = threads or max(1, (os.cpu_count() or 2) // 2)
        self._wake = asyncio.Event()
        self.process: asyncio.subprocess.Process | None = None

    def wake(self) -> None:
        """There is something to do."""
        self._wake.set()

    async def work(self) -> None:
        """Work on whatever there is until it is cancelled; a run then saves its state, for the next server."""
        await self._adopt()
        while True:
            try:
                if not (await self._check_next() or await self._run_next()):
                    await self._sweep()
                    self._wake.clear()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._wake.wait(), IDLE_SECONDS)
            except StorageError as error:
                log.error("jobs wait: %s", error)
                await asyncio.sleep(IDLE_SECONDS)

    async def _adopt(self) -> None:
        """Jobs whose server has died are queued again."""

        def adopt(connection: Connection) -> int:
            rows = connection.execute(
                select(tables.jobs.c.id, tables.jobs.c.holder).where(tables.jobs.c.status == "running")
            ).all()
            dead = [row.id for row in rows if row.holder is None or not self.database.is_held(connection, row.holder)]
            for job in dead:
                records.move(
                    connection, job, ("running",), self._now(), "Its server stopped; it goes on", status="queued"
                )
            return len(dead)

        await self.database.write(adopt)

    # Checking.

    async def _check_next(self) -> bool:
        job = await self.database.read(partial(records.next_job, status="validating_files"))
        if job is None:
            return False
        try:
            checked = await asyncio.to_thread(self._check, job)
            await self._reserve(job, checked)
        except SteelyardError as error:
            await self._fail(job, error, param=getattr(error, "param", None) or "training_file")
            return True
        values = {
            "status": "queued",
            "resolved": msgspec.to_builtins(checked.resolved),
            "tokens": checked.tokens * checked.resolved.n_epochs,
        }
        message = f"Files validated, moving job to queued state: {checked.rows} rows, {checked.tokens} tokens an epoch"
        moved = await self.database.write(
            lambda connection: records.move(
                connection, job["id"], ("validating_files",), self._now(), message, **values
            )
        )
        if not moved:  # cancelled meanwhile
            await self._settle(job, 0)
        return True

    def _check(self, job: Row) -> training.Checked:
        base = training.base_to_train(self._served(job).engine.checkpoint)
        with contextlib.ExitStack() as stack:
            paths = [
                None if file is None else stack.enter_context(self._clear(job["project_id"], file, f"{kind}.jsonl"))
                for kind, file in (("training", job["training_file"]), ("validation", job["validation_file"]))
            ]
            assert paths[0] is not None
            try:
                return training.check_files(base, paths[0], paths[1], job["settings"]["hyperparameters"])
            except DataError as error:
                raise self._named(job, error) from None

    def _named(self, job: Row, error: DataError) -> RequestError:
        """What is wrong with a file, under the name that its owner knows."""
        kind = "validation" if error.file == "validation.jsonl" else "training"
        find = partial(get_file, project=job["project_id"], file_id=job[f"{kind}_file"])
        shown = self.database.read_now(find)["filename"]
        message = str(DataError(error.reason, file=shown, line=error.line, field=error.field))
        return RequestError(message, param=f"{kind}_file", code=f"invalid_{kind}_file")

    def _clear(self, project: str, file_id: str, name: str) -> Any:
        row = self.database.read_now(partial(get_file, project=project, file_id=file_id))
        return self.files.clear(project, row["artifact"], name)

    def _served(self, job: Row) -> ServedModel:
        served = self.tuned.served.get(job["model"])
        if served is None:
            raise EngineUnavailableError(f"the model '{job['model']}' is not served any more")
        return served

    async def _reserve(self, job: Row, checked: training.Checked) -> None:
        ledger, prices = self.money()
        quote = prices.quote(job["model"])
        amount = quote.cost(Counts(training_tokens=checked.tokens * checked.resolved.n_epochs))
        await ledger.reserve(
            Reservation(job["id"], job["project_id"], job["key_id"], job["model"], "fine_tuning", quote, amount)
        )

    async def _settle(self, job: Row, tokens: int) -> None:
        ledger, _ = self.money()
        await asyncio.wrap_future(ledger.settle(job["id"], Counts(training_tokens=tokens)))

    # Running.

    async def _run_next(self) -> bool:
        job = await self.database.read(partial(records.next_job, status="queued"))
        if job is None:
            return False
        if job["model"] in self.tuned.served and self._served(job).engine.ready is None:
            return False  # its engine is coming
        values: Row = {"status": "running", "holder": self.database.holder}
        if job["started_at"] is None:
            values["started_at"] = self._now()
        message = "Fine-tuning job started" if job["started_at"] is None else "Fine-tuning job goes on"
        taken = await self.database.write(
            lambda connection: records.move(connection, job["id"], ("queued",), self._now(), message, **values)
        )
        if not taken:
            return True
        try:
            await self._run(job)
        except StorageError:
            await self._release(job)
            raise
        except SteelyardError as error:
            await self._fail(job, error)
        except asyncio.CancelledError:
            await asyncio.shield(self._release(job))
            raise
        except Exception:
            log.exception("%s", job["id"])
            await self._fail(job, SteelyardError("an internal error: the server's log has it under the job's id"))
        return True

    async def _run(self, job: Row) -> None:
        folder = self.folder / job["id"]
        await asyncio.to_thread(self._prepare, job, folder)
        for _ in range(MOST_ATTEMPTS):
            code, complaint = await self._train(job, folder)
            status = await self._status(job)
            if code == 0 and status != "cancelled":
                await self._publish(job, folder)
                return
            if status != "running":  # paused or cancelled: it was asked to stop
                await self._leave(job, folder, status)
                return
            if complaint is not None:
                await self._fail(job, complaint)
                return
            log.warning("the run of %s died (%s): it goes on from its last state", job["id"], code)
            await self._say(job, f"Its process died ({code}); it goes on from its last checkpoint", level="warn")
        await self._fail(job, SteelyardError(f"its process died {MOST_ATTEMPTS} times"))

    def _prepare(self, job: Row, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        paths: dict[str, Path | None] = {}
        for kind in ("training", "validation"):
            file_id = job[f"{kind}_file"]
            paths[kind] = None if file_id is None else folder / f"{kind}.jsonl"
            if file_id is not None and not (folder / f"{kind}.jsonl").exists():
                row = self.database.read_now(partial(get_file, project=job["project_id"], file_id=file_id))
                self.files.write_clear(job["project_id"], row["artifact"], folder / f"{kind}.part")
                (folder / f"{kind}.part").replace(folder / f"{kind}.jsonl")
        assert paths["training"] is not None
        training.write_configuration(
            folder / "run.toml",
            base=training.base_to_train(self._served(job).engine.checkpoint),
            run=folder / "run",
            training=paths["training"],
            validation=paths["validation"],
            resolved=msgspec.convert(job["resolved"], training.Resolved),
            seed=job["seed"],
            threads=self.threads,
        )

    async def _train(self, job: Row, folder: Path) -> tuple[int, SteelyardError | None]:
        """One life of the run's process: its exit code, and what it complains of, where it is its own doing."""
        environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        with (folder / "process.log").open("ab") as complaints:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "steelyard", "train", str(folder / "run.toml"), "--json"),
                cwd=folder,
                env={**environment, "OMP_NUM_THREADS": str(self.threads)},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=complaints,
                start_new_session=True,
                preexec_fn=_humble,
            )
        process = self.process
        assert process.stdout is not None
        output = asyncio.create_task(process.stdout.read())
        ended = asyncio.create_task(process.wait())
        told = await self._last_told(job)
        try:
            stopping = False
            while not ended.done():
                await asyncio.wait({ended}, timeout=POLL_SECONDS)
                told = await self._tell(job, folder, told)
                if not stopping and await self._status(job) != "running":
                    stopping = True
                    asyncio.get_running_loop().create_task(_end(process))
        except BaseException:
            await asyncio.shield(_end(process))
            raise
        finally:
            self.process = None
        await self._tell(job, folder, told, ended=True)
        code = await ended
        return code, _complaint(await output) if code > 0 and code != INTERRUPTED else None

    async def _tell(self, job: Row, folder: Path, told: int, *, ended: bool = False) -> int:
        """Events for the steps that were measured since; returns the last step that was told.

        The newest step may still be evaluated: it waits for the next one, or until the run has `ended`.
        """
        measured = await asyncio.to_thread(read_metrics, folder / "run")
        steps: dict[int, Row] = {}
        for values in measured:
            steps.setdefault(values["step"], {}).update(values)
        whole = max(steps, default=0) - (not ended)
        fresh = {step: values for step, values in steps.items() if told < step <= whole}
        if not fresh:
            return told
        tokens = sum(values.get("tokens", 0) for values in steps.values())
        per_step = max(1.0, tokens / len(steps))
        total = max(max(steps), round((job["tokens"] or tokens) / per_step))
        left = max(steps.items())[1].get("seconds_left")
        now = self._now()

        def tell(connection: Connection) -> None:
            for step, values in sorted(fresh.items()):
                message = training.described({**values, "step": step}, total)
                data = training.event_data({**values, "step": step}, total)
                records.say(connection, job["id"], message, now, kind="metrics", data=data)
            finish = None if left is None else now + int(left)
            connection.execute(
                update(tables.jobs)
                .where(tables.jobs.c.id == job["id"])
                .values(trained_tokens=tokens, estimated_finish=finish)
            )

        await self.database.write(tell)
        ledger, _ = self.money()
        ledger.progress(job["id"], Counts(training_tokens=tokens))
        return max(fresh)

    async def _last_told(self, job: Row) -> int:
        events = tables.job_events.c
        rows = await self.database.read(
            lambda connection: (
                connection.execute(
                    select(events.data)
                    .where(events.job_id == job["id"], events.type == "metrics")
                    .order_by(events.number.desc())
                    .limit(1)
                )
                .scalars()
                .all()
            )
        )
        return int(rows[0]["step"]) if rows else 0

    # Ends.

    async def _publish(self, job: Row, folder: Path) -> None:
        """Keep and serve what was learnt, then say that the job has succeeded."""
        project = await self.database.read(partial(_project_name, project=job["project_id"]))
        name = model_name(job["model"], project, job["suffix"], job["id"])
        run = folder / "run"
        measured = await asyncio.to_thread(read_metrics, run)
        tokens = sum(values.get("tokens", 0) for values in measured)
        checkpoints = sorted((run / "checkpoints").glob("step-*"))
        now = self._now()
        keep = partial(self.tuned.keep, job["project_id"], job["model"], now=now, job_id=job["id"])
        made = [await asyncio.to_thread(keep, name=name, source=run / "best")]
        for checkpoint in checkpoints:
            step = int(checkpoint.name.rpartition("-")[2])
            made.append(await asyncio.to_thread(keep, name=f"{name}:ckpt-step-{step}", source=checkpoint, step=step))
        for row in made:
            await self._serve(row)
        stored = await asyncio.to_thread(self.files.artifacts.put, job["project_id"], [training.metrics_csv(measured)])
        result = await asyncio.to_thread(
            self.files.add, job["project_id"], "step_metrics.csv", "fine-tune-results", stored, now
        )
        await self._settle(job, tokens)

        def finish(connection: Connection) -> bool:
            records.say(connection, job["id"], f"New fine-tuned model created: {name}", now)
            return records.move(
                connection,
                job["id"],
                ("running", "paused"),
                now,
                "The job has successfully completed",
                status="succeeded",
                result_model=name,
                result_files=[result["id"]],
                trained_tokens=tokens,
                finished_at=now,
                estimated_finish=None,
                holder=None,
            )

        await self.database.write(finish)
        await asyncio.to_thread(shutil.rmtree, folder, True)

    async def _serve(self, row: Row) -> None:
        """Have it served, once its engine is there: it may just be restarting."""
        for attempt in range(60):
            try:
                await self.tuned.serve(row)
                return
            except EngineUnavailableError:
                if attempt == 59:
                    raise
                await asyncio.sleep(1)

    async def _leave(self, job: Row, folder: Path, status: str) -> None:
        """A run that was asked to stop: its state stays for a resumption, or goes."""
        if status == "cancelled":
            measured = await asyncio.to_thread(read_metrics, folder / "run")
            await self._settle(job, sum(values.get("tokens", 0) for values in measured))
            await asyncio.to_thread(shutil.rmtree, folder, True)

    async def _fail(self, job: Row, error: SteelyardError, param: str | None = None) -> None:
        code = getattr(error, "code", None) or ("insufficient_quota" if isinstance(error, QuotaError) else "job_failed")
        told = {"code": code, "message": str(error)[:2000], "param": param}
        now = self._now()
        await self.database.write(
            lambda connection: records.move(
                connection,
                job["id"],
                ("validating_files", "queued", "running"),
                now,
                f"The job failed: {told['message']}",
                status="failed",
                error=told,
                finished_at=now,
                estimated_finish=None,
                holder=None,
            )
        )
        row = await self.database.read(lambda connection: records.get(connection, job["project_id"], job["id"]))
        await self._settle(job, row["trained_tokens"])
        await asyncio.to_thread(shutil.rmtree, self.folder / job["id"], True)

    async def _release(self, job: Row) -> None:
        """The server ends: the next one goes on."""
        await self.database.write(
            lambda connection: records.move(
                connection,
                job["id"],
                ("running",),
                self._now(),
                "Its server stops; it waits",
                status="queued",
                holder=None,
            )
        )

    async def _sweep(self) -> None:
        """Settle and forget jobs that were cancelled while nobody worked on them."""

        def cancelled(connection: Connection) -> list[Row]:
            jobs, held = tables.jobs, tables.reservations
            rows = connection.execute(
                select(jobs).join(held, held.c.id == jobs.c.id).where(jobs.c.status.in_(records.OVER))
            )
            return [dict(row) for row in rows.mappings()]

        for job in await self.database.read(cancelled):
            if job["status"] == "cancelled":
                await self._leave(job, self.folder / job["id"], "cancelled")

    async def _status(self, job: Row) -> str:
        row = await self.database.read(lambda connection: records.get(connection, job["project_id"], job["id"]))
        status: str = row["status"]
        return status

    async def _say(self, job: Row, message: str, level: str = "info") -> None:
        now = self._now()
        await self.database.write(lambda connection: records.say(connection, job["id"], message, now, level=level))

    def _now(self) -> int:
        return int(self._clock())


async def _end(process: asyncio.subprocess.Process) -> None:
    """A run saves its state at SIGTERM."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), GRACE_SECONDS)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _humble() -> None:
    """In the run's process, before it becomes one: everything else goes first."""
    os.nice(19)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _complaint(output: bytes) -> SteelyardError:
    """What the command line said of an error, in its last line."""
    with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):
        message = json.loads(output.splitlines()[-1])["error"]["message"]
        return SteelyardError(str(message))
    return SteelyardError("the run ended with an error that it did not explain: the server's log says more")


def _project_name(connection: Connection, project: str) -> str:
    name = connection.execute(select(tables.projects.c.name).where(tables.projects.c.id == project)).scalar()
    return name or project
