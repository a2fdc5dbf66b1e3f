"""What is stored costs by the GB and day: one entry for a project and day, whatever happens."""

from __future__ import annotations

import time

from sqlalchemy import Connection, func, select

from steelyard.serve.billing.ledger import Charge
from steelyard.serve.billing.prices import PriceList
from steelyard.store import tables

GIGABYTE = 1_000_000_000


def due(connection: Connection, prices: PriceList, now: int) -> list[Charge]:
    """The day's charges that are not in the ledger yet; nothing is charged that comes to no nano-dollar."""
    rate = prices.quote().price.storage
    if not rate:
        return []
    day = time.strftime("%Y-%m-%d", time.gmtime(now))
    files = tables.files.c
    stored = connection.execute(
        select(files.project_id, func.sum(files.bytes).label("held")).group_by(files.project_id)
    )
    wanted = {
        f"storage {day} {row.project_id}": (row.project_id, int(row.held), int(row.held) * rate // GIGABYTE)
        for row in stored
    }
    entries = tables.ledger.c
    there = set(connection.execute(select(entries.reference).where(entries.reference.in_(wanted))).scalars())
    return [
        Charge("storage", reference, project, amount, prices.version, f"{held} bytes")
        for reference, (project, held, amount) in wanted.items()
        if amount and reference not in there
    ]
