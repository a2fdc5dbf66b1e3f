"""`/v1/fine_tuning/jobs` as OpenAI offered them, and `/v1/compression/jobs` in their manner.

What a job makes is callable the moment it succeeds.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Connection, select
from starlette.requests import Request
from starlette.responses import Response

from steelyard.errors import CheckpointError, NotFoundError, RequestError
from steelyard.serve import files
from steelyard.serve.auth import Caller
from steelyard.serve.connection import DONE, EventStream, event
from steelyard.serve.jobs import records, training
from steelyard.serve.models import ServedModel
from steelyard.serve.protocol.compression import CompressionJob, CompressionRequest
from steelyard.serve.protocol.errors import json_response
from steelyard.serve.protocol.fields import parse
from steelyard.serve.protocol.fine_tuning import FineTuningJob, JobCheckpoint, JobRequest
from steelyard.serve.protocol.jobs import JobEvent
from steelyard.serve.protocol.lists import (
    Page,
    allow,
    boolean,
    integer,
    limit_and_after,
    page_of,
    paged,
    read_page,
    wanted,
)
from steelyard.serve.protocol.parameters import BOOLEAN, TEXT, Parameter
from steelyard.serve.service import Service
from steelyard.store import tables

POLL_SECONDS = 0.5

Row = dict[str, Any]

METADATA = re.compile(r"metadata\[.+\]", re.DOTALL)
LISTED = (
    *paged(),
    Parameter(
        "metadata",
        {"type": "object", "propertyNames": {"minLength": 1}, "additionalProperties": TEXT},
        style="deepObject",
    ),
)
VERBS = tuple(records.VERBS)
EVENTS = (*limit_and_after(), Parameter("stream", BOOLEAN))


async def fine_tune(service: Service, request: Request) -> Response:
    """A new fine-tuning job: its files are checked, it waits its turn, it runs."""
    body = parse(JobRequest, await request.body())
    caller: Caller = request.state.caller
    served = service.find(body.model, caller.project)
    if served.adapter is not None:
        raise RequestError(f"'{body.model}' is an adapter: fine-tune its base, '{served.engine.model}'", param="model")
    _check_no_hearer(served, "fine-tuned")
    try:
        training.base_to_train(served.engine.checkpoint)
    except CheckpointError as error:
        raise RequestError(str(error), param="model", code="model_not_trainable") from None
    asked = {
        **_asked(body, caller, served),
        "training_file": body.training_file,
        "validation_file": body.validation_file,
        "settings": {"method": body.kind, "hyperparameters": body.asked},
        "seed": random.randrange(1 << 31) if body.seed is None else body.seed,
    }

    def make(connection: Connection) -> Row:
        for field in ("training_file", "validation_file"):
            if asked[field] is not None:
                _check_file(connection, caller.project, str(asked[field]), field)
        return records.create(connection, "fine_tuning", asked, service.now())

    made = await service.database.write(make)
    service.jobs.wake()
    return json_response(FineTuningJob.of(made))


async def compress(service: Service, request: Request) -> Response:
    """A new compression job: its model is checked, it waits its turn, it runs."""
    body = parse(CompressionRequest, await request.body())
    caller: Caller = request.state.caller
    served = await service.found(body.model, caller.project)
    _check_no_hearer(served, "compressed")
    file, field = body.file
    asked = {**_asked(body, caller, served), "training_file": file, "settings": body.settings, "seed": 0}

    def make(connection: Connection) -> Row:
        if file is not None:
            _check_file(connection, caller.project, file, field)
        return records.create(connection, "compression", asked, service.now())

    made = await service.database.write(make)
    service.jobs.wake()
    return json_response(CompressionJob.of(made))


def _check_no_hearer(served: ServedModel, done: str) -> None:
    """Recordings are no rows of a file that a job takes."""
    ready = served.engine.ready
    if ready is not None and ready.task == "transcribe":
        reason = f"'{served.id}' transcribes recordings: it is {done} by the command line, not by a job"
        raise RequestError(reason, param="model", code="model_not_supported")


def _asked(body: JobRequest | CompressionRequest, caller: Caller, served: ServedModel) -> Row:
    return {
        "project_id": caller.project,
        "key_id": caller.key_id,
        "model": served.id,
        "suffix": body.suffix,
        "metadata": body.metadata,
    }


@dataclass(frozen=True)
class Jobs:
    """The routes that every kind of job has."""

    kind: records.Kind
    shape: Callable[[Row], Any]
    """Of a job's row."""

    async def listed(self, service: Service, request: Request) -> Response:
        """The project's jobs, newest first; `metadata[key]=value` picks some."""
        keys = [name for name in request.query_params if METADATA.fullmatch(name)]
        asked = wanted(request, *keys)
        rules = [tables.jobs.c.project_id == request.state.caller.project, tables.jobs.c.kind == self.kind]
        rules += [tables.jobs.c.metadata[key[9:-1]].as_string() == request.query_params[key] for key in keys]
        page = await service.database.read(
            lambda connection: read_page(connection, tables.jobs, rules, asked, self.shape)
        )
        return json_response(page)

    async def retrieve(self, service: Service, request: Request) -> Response:
        """One job."""
        allow(request)
        return json_response(self.shape(await service.database.read(self._finder(request))))

    async def change(self, service: Service, request: Request) -> Response:
        """Pause, resume or cancel a job, whichever the path says."""
        allow(request)
        verb = request.url.path.rpartition("/")[2]
        project, job, now = request.state.caller.project, request.path_params["job_id"], service.now()
        row = await service.database.write(
            lambda connection: records.apply_verb(connection, project, job, verb, now, self.kind)
        )
        service.jobs.wake()
        return json_response(self.shape(row))

    async def events(self, service: Service, request: Request) -> Response:
        """What happened, newest first; with `stream=true` what happens, until the job is over."""
        given = allow(request, "limit", "after", "stream")
        limit = integer(given, "limit", 1, 100, 20)
        row = await service.database.read(self._finder(request))
        if boolean(given, "stream"):
            return EventStream(self._follow(service, row), request.state.request_id)

        def read(connection: Connection) -> Page[JobEvent]:
            before = None
            if "after" in given:
                found = tables.job_events.c
                before = connection.execute(
                    select(found.number).where(found.id == given["after"], found.job_id == row["id"])
                ).scalar()
                if before is None:
                    raise NotFoundError("'after' names no event of this job", param="after")
            rows = records.events(connection, row["id"], before=before, limit=limit)
            shapes = [JobEvent.of(one, self.kind) for one in rows[:limit]]
            return page_of(shapes, [one["id"] for one in rows], limit)

        return json_response(await service.database.read(read))

    async def checkpoints(self, service: Service, request: Request) -> Response:
        """The models that a job kept on its way, newest first."""
        asked = wanted(request)
        row = await service.database.read(self._finder(request))
        models = tables.models.c
        rules = [models.job_id == row["id"], models.step.is_not(None)]

        def read(connection: Connection) -> Page[JobCheckpoint]:
            rows = connection.execute(select(tables.models).where(*rules).order_by(models.step.desc())).mappings()
            found = [JobCheckpoint.of(dict(one)) for one in rows]
            ids = [one.id for one in found]
            if asked.after is not None and asked.after not in ids:
                raise NotFoundError("'after' names no checkpoint of this job", param="after")
            begin = 0 if asked.after is None else ids.index(asked.after) + 1
            return page_of(found[begin : begin + asked.limit], ids[begin:], asked.limit)

        return json_response(await service.database.read(read))

    async def _follow(self, service: Service, row: Row) -> AsyncGenerator[bytes, None]:
        """Every event from the first on."""
        told = 0
        while True:
            read = partial(_since, job_id=row["id"], number=told)
            status, fresh = await service.database.read(read)
            for one in fresh:
                told = one["number"]
                yield event(JobEvent.of(one, self.kind))
            if not fresh:
                if status in records.OVER:
                    break
                await asyncio.sleep(POLL_SECONDS)
        yield DONE

    def _finder(self, request: Request) -> partial[Row]:
        project, job = request.state.caller.project, request.path_params["job_id"]
        return partial(records.get, project=project, job_id=job, kind=self.kind)


FINE_TUNING = Jobs("fine_tuning", FineTuningJob.of)
COMPRESSION = Jobs("compression", CompressionJob.of)


def _since(connection: Connection, job_id: str, number: int) -> tuple[str, list[Row]]:
    found = tables.job_events.c
    status: str = connection.execute(select(tables.jobs.c.status).where(tables.jobs.c.id == job_id)).scalar_one()
    rows = connection.execute(
        select(tables.job_events).where(found.job_id == job_id, found.number > number).order_by(found.number).limit(100)
    ).mappings()
    return status, [dict(row) for row in rows]


def _check_file(connection: Connection, project: str, file_id: str, field: str) -> None:
    try:
        row = files.get(connection, project, file_id)
    except NotFoundError as error:
        raise RequestError(str(error), param=field, code="invalid_file") from None
    if row["purpose"] != "fine-tune":
        raise RequestError(
            f"the file '{file_id}' has the purpose '{row['purpose']}': upload it as fine-tune", param=field
        )
