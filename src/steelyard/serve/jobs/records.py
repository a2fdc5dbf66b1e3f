"""Jobs as rows: made, found, moved from status to status, and the events that tell of it.

validating_files -> queued <-> paused
queued -> running -> succeeded, paused
any of these -> failed, cancelled
"""

from __future__ import annotations

import secrets
from typing import Any, Literal

from sqlalchemy import Connection, func, insert, select, update

from steelyard.errors import ConflictError, NotFoundError
from steelyard.serve.ids import fresh
from steelyard.serve.owned import find
from steelyard.store import tables

Kind = Literal["fine_tuning", "compression"]
Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
OVER: tuple[Status, ...] = ("succeeded", "failed", "cancelled")
VERBS: dict[str, tuple[tuple[Status, ...], Status, str]] = {
    "pause": (("queued", "running"), "paused", "The job is paused"),
    "resume": (("paused",), "queued", "The job goes on"),
    "cancel": (("validating_files", "queued", "running", "paused"), "cancelled", "The job was cancelled"),
}
"""What a customer may do: from which statuses, to which, and what the event says."""

Row = dict[str, Any]
columns = tables.jobs.c


def create(connection: Connection, kind: Kind, asked: Row, now: int) -> Row:
    """A new job, with its first events.

    Args:
        connection: within a transaction.
        kind: of job.
        asked: whose it is, and what was asked for.
        now: Unix seconds.
    """
    row: Row = {
        "id": new_id(kind),
        "kind": kind,
        "training_file": None,
        "validation_file": None,
        "resolved": {},
        "status": "validating_files",
        "error": None,
        "result_model": None,
        "result_files": [],
        "tokens": None,
        "trained_tokens": 0,
        "memory": None,
        "created_at": now,
        "started_at": None,
        "finished_at": None,
        "estimated_finish": None,
        "holder": None,
        **asked,
    }
    connection.execute(insert(tables.jobs), row)
    say(connection, row["id"], f"Created {kind.replace('_', '-')} job: {row['id']}", now)
    checked = f"training file: {row['training_file']}" if kind == "fine_tuning" else f"model: {row['model']}"
    say(connection, row["id"], f"Validating {checked}", now)
    return row


def new_id(kind: Kind) -> str:
    """A job's id."""
    return fresh("ftjob-" if kind == "fine_tuning" else "cmpjob-")


def get(connection: Connection, project: str, job_id: str, kind: Kind | None = None) -> Row:
    """A project's job, of this kind.

    Raises:
        NotFoundError: it has none of this id.
    """
    row = find(connection, tables.jobs, project, job_id, "job", param="fine_tuning_job_id")
    if kind not in (None, row["kind"]):
        raise NotFoundError(f"no {kind} job '{job_id[:80]}' in this project", param="job_id")
    return row


def apply_verb(connection: Connection, project: str, job_id: str, verb: str, now: int, kind: Kind) -> Row:
    """Pause, resume or cancel a job. Whoever works on it sees its new status and acts.

    Raises:
        NotFoundError: the project has no such job.
        ConflictError: the job's status does not allow it.
    """
    row = get(connection, project, job_id, kind)
    allowed, status, message = VERBS[verb]
    if row["status"] not in allowed:
        raise ConflictError(
            f"this job is {row['status']}: it can be {_participle(verb)} while it is {' or '.join(allowed)}",
            param="status",
            code="invalid_status",
        )
    changed: Row = {"status": status}
    if status in OVER:
        changed["finished_at"] = now
    row |= changed
    if not move(connection, job_id, allowed, now, message, **changed):
        raise ConflictError("this job has just changed its status: look again", param="status", code="invalid_status")
    return row


def move(
    connection: Connection, job_id: str, expected: tuple[Status, ...], now: int, message: str | None, **values: Any
) -> bool:
    """Change a job that still has one of the statuses expected; returns whether it had.

    Args:
        connection: within a transaction.
        job_id: which.
        expected: statuses from which it is moved; from another one nothing is changed.
        now: of the event.
        message: of an event, if there is something to say.
        values: what changes.
    """
    result = connection.execute(
        update(tables.jobs).where(columns.id == job_id, columns.status.in_(expected)).values(**values)
    )
    if result.rowcount == 0:
        return False
    if message is not None:
        level = "error" if values.get("status") == "failed" else "info"
        say(connection, job_id, message, now, level=level)
    return True


def claim(connection: Connection, job: Row, holder: int) -> bool:
    """Let a process have a job that nobody works on, as it was read; returns whether it still was so."""
    before = columns.holder.is_(None) if job["holder"] is None else columns.holder == job["holder"]
    result = connection.execute(
        update(tables.jobs)
        .where(columns.id == job["id"], columns.status == job["status"], before)
        .values(holder=holder)
    )
    return result.rowcount == 1


def say(
    connection: Connection,
    job_id: str,
    message: str,
    now: int,
    *,
    level: str = "info",
    kind: str = "message",
    data: Any = None,
) -> None:
    """Add an event."""
    connection.execute(select(columns.id).where(columns.id == job_id).with_for_update())  # one after the other
    events = tables.job_events.c
    last = connection.execute(select(func.max(events.number)).where(events.job_id == job_id)).scalar() or 0
    connection.execute(
        insert(tables.job_events),
        {
            "id": f"ftevent-{secrets.token_hex(12)}",
            "job_id": job_id,
            "number": last + 1,
            "created_at": now,
            "level": level,
            "type": kind,
            "message": message,
            "data": data,
        },
    )


def events(connection: Connection, job_id: str, *, before: int | None = None, limit: int = 20) -> list[Row]:
    """Events, newest first, with one more than `limit` if there are more."""
    found = tables.job_events.c
    rules = [found.job_id == job_id]
    if before is not None:
        rules.append(found.number < before)
    rows = connection.execute(
        select(tables.job_events).where(*rules).order_by(found.number.desc()).limit(limit + 1)
    ).mappings()
    return [dict(row) for row in rows]


def waiting(connection: Connection, status: Status, limit: int = 100) -> list[Row]:
    """The next jobs with this status: those of projects of which fewer run first, then the oldest."""
    running = (
        select(columns.project_id, func.count().label("runs"))
        .where(columns.status == "running")
        .group_by(columns.project_id)
        .subquery()
    )
    rows = connection.execute(
        select(tables.jobs)
        .outerjoin(running, running.c.project_id == columns.project_id)
        .where(columns.status == status)
        .order_by(func.coalesce(running.c.runs, 0), columns.created_at, columns.id)
        .limit(limit)
    ).mappings()
    return [dict(row) for row in rows]


def _participle(verb: str) -> str:
    return {"pause": "paused", "resume": "resumed", "cancel": "cancelled"}[verb]
