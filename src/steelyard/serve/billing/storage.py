"""What is stored costs by the GB and day: one entry for a project and day, whatever happens."""

from __future__ import annotations

import time
from collections import Counter

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
    files, responses = tables.files.c, tables.responses.c
    stored = Counter[str]()
    for project_id, held in (
        (files.project_id, files.bytes),
        (responses.project_id, func.length(responses.content)),
    ):
        for row in connection.execute(select(project_id, func.sum(held)).group_by(project_id)):
            stored[row[0]] += int(row[1])
    wanted = {f"storage {day} {project}": (project, held, held * rate // GIGABYTE) for project, held in stored.items()}
    entries = tables.ledger.c
    there = set(connection.execute(select(entries.reference).where(entries.reference.in_(wanted))).scalars())
    return [
        Charge("storage", reference, project, amount, prices.version, f"{held} bytes")
        for reference, (project, held, amount) in wanted.items()
        if amount and reference not in there
    ]
