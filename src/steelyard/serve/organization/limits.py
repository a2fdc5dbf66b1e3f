"""What a project may ask for and spend: rate limits, the month's spend limit, alerts before it is reached."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from sqlalchemy import Connection, delete, insert, or_, select, update

from steelyard.errors import RequestError
from steelyard.serve.billing.prices import NANO
from steelyard.serve.ids import fresh
from steelyard.serve.organization.audit import Actor
from steelyard.serve.organization.projects import active, get
from steelyard.serve.owned import find
from steelyard.serve.rate_limits import RateLimit
from steelyard.store import tables

log = logging.getLogger("steelyard.alerts")

MOST_RATE = 1 << 40
MOST_DOLLARS = 1 << 30
MOST_ALERTS = 20

Row = dict[str, Any]


def set_rate_limit(connection: Connection, actor: Actor, project_id: str, model: str, limit: RateLimit) -> None:
    """Set what a project may ask of a model.

    Raises:
        RequestError: a limit is negative or beyond reason.
    """
    active(connection, project_id)
    for name in RateLimit.__struct_fields__:
        if not 0 <= getattr(limit, name) <= MOST_RATE:
            raise RequestError(f"'{name}' must be 0 to {MOST_RATE}", param=name)
    columns = tables.rate_limits.c
    connection.execute(delete(tables.rate_limits).where(columns.project_id == project_id, columns.model == model))
    row = {"project_id": project_id, "model": model, **msgspec.structs.asdict(limit)}
    connection.execute(insert(tables.rate_limits), row)
    actor.log(connection, "rate_limit.updated", model, project_id, **msgspec.structs.asdict(limit))


def set_spend_limit(connection: Connection, actor: Actor, project_id: str, nano_dollars: int | None) -> None:
    """Set what a project may spend in a month; None: there is no limit."""
    active(connection, project_id)
    connection.execute(
        update(tables.projects).where(tables.projects.c.id == project_id).values(monthly_limit=nano_dollars)
    )
    actor.log(connection, "project.updated", project_id, project_id, monthly_limit=nano_dollars)


def spend_limit(connection: Connection, project_id: str) -> int | None:
    """Nano-dollars a month; None: no limit."""
    limit: int | None = get(connection, project_id)["monthly_limit"]
    return limit


def alerts(connection: Connection, project_id: str) -> list[Row]:
    """A project's alerts, the lowest first."""
    get(connection, project_id)
    columns = tables.spend_alerts.c
    rows = connection.execute(
        select(tables.spend_alerts).where(columns.project_id == project_id).order_by(columns.threshold, columns.id)
    )
    return [dict(row) for row in rows.mappings()]


def put_alert(
    connection: Connection,
    actor: Actor,
    project_id: str,
    threshold: int,
    recipients: list[str],
    subject_prefix: str | None,
    alert_id: str | None = None,
) -> Row:
    """A new alert, or another form of one that is there.

    Raises:
        NotFoundError: there is no such alert.
        RequestError: there are too many.
    """
    active(connection, project_id)
    row: Row = {
        "id": alert_id or fresh("alert_"),
        "project_id": project_id,
        "threshold": threshold,
        "recipients": recipients,
        "subject_prefix": subject_prefix,
        "sounded": None,
    }
    if alert_id is None:
        if len(alerts(connection, project_id)) >= MOST_ALERTS:
            raise RequestError(f"a project has {MOST_ALERTS} alerts at most: remove one", code="too_many_alerts")
        connection.execute(insert(tables.spend_alerts), row)
    else:
        alert(connection, project_id, alert_id)
        connection.execute(update(tables.spend_alerts).where(tables.spend_alerts.c.id == alert_id).values(**row))
    actor.log(connection, "project.updated", row["id"], project_id, alert=threshold)
    return row


def alert(connection: Connection, project_id: str, alert_id: str) -> Row:
    """One alert.

    Raises:
        NotFoundError: the project has none of this id.
    """
    return find(connection, tables.spend_alerts, project_id, alert_id, "alert", param="alert_id")


def delete_alert(connection: Connection, actor: Actor, project_id: str, alert_id: str) -> None:
    """Remove an alert."""
    alert(connection, project_id, alert_id)
    connection.execute(delete(tables.spend_alerts).where(tables.spend_alerts.c.id == alert_id))
    actor.log(connection, "project.updated", alert_id, project_id, alert=None)


def sound(connection: Connection, month: str) -> None:
    """Sound the alerts whose project has reached them this month, each once: in the log, for whoever sends mail."""
    alerts, balances, names = tables.spend_alerts.c, tables.balances.c, tables.projects.c
    reached = connection.execute(
        select(tables.spend_alerts, balances.amount, names.name)
        .join(tables.balances, balances.project_id == alerts.project_id)
        .join(tables.projects, names.id == alerts.project_id)
        .where(
            balances.month == month,
            balances.amount >= alerts.threshold,
            or_(alerts.sounded.is_(None), alerts.sounded != month),
        )
    ).all()
    for row in reached:
        connection.execute(update(tables.spend_alerts).where(alerts.id == row.id).values(sounded=month))
        log.warning(
            "%sthe project '%s' (%s) has spent $%.2f of %s, an alert stands at $%.2f; to: %s",
            f"{row.subject_prefix} " if row.subject_prefix else "",
            row.name,
            row.project_id,
            row.amount / NANO,
            month,
            row.threshold / NANO,
            ", ".join(row.recipients),
        )


def spent(connection: Connection, project_id: str, month: str) -> int:
    """Nano-dollars that a project has spent in a month, and holds reserved."""
    columns = tables.balances.c
    found = connection.execute(
        select(columns.amount).where(columns.project_id == project_id, columns.month == month)
    ).scalar()
    return found or 0
