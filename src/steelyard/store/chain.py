"""Hash chains over tables that are only added to: who changes, inserts, removes or cuts off a row is found out.

Every row carries HMAC-SHA256(key, mac of the row before || the row). The key is not in the database, so a chain cannot
be made anew by one who has only that. Cutting rows off at the end is found by a head that was kept elsewhere.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, RowMapping, Table, insert, select, update

from steelyard.store import tables

ORIGIN = bytes(32)


class Head(msgspec.Struct, frozen=True):
    """How far a chain goes."""

    sequence: int = 0
    mac: bytes = ORIGIN


def link(key: bytes, before: bytes, row: Mapping[str, Any] | RowMapping, columns: Sequence[str]) -> bytes:
    """The mac of a row after one with the mac `before`."""
    content = msgspec.json.encode([row[column] for column in columns])
    return hmac.digest(key, before + content, hashlib.sha256)


def columns(table: Table) -> list[str]:
    """What a row's mac covers: everything but itself."""
    return [column.name for column in table.columns if column.name != "mac"]


def lock(connection: Connection, table: Table) -> Head:
    """The chain's head; other writers wait until the transaction ends."""
    chains = tables.chains
    row = connection.execute(
        select(chains.c.sequence, chains.c.mac).where(chains.c.name == table.name).with_for_update()
    ).one()  # the first migration made it
    return Head(row.sequence, row.mac)


def append(connection: Connection, key: bytes, table: Table, head: Head, rows: list[dict[str, Any]]) -> Head:
    """Add rows after a locked head; they get `sequence` and `mac`."""
    if not rows:
        return head
    names = columns(table)
    sequence, mac = head.sequence, head.mac
    for row in rows:
        sequence += 1
        row["sequence"] = sequence
        mac = row["mac"] = link(key, mac, row, names)
    connection.execute(insert(table), rows)
    connection.execute(
        update(tables.chains).where(tables.chains.c.name == table.name).values(sequence=sequence, mac=mac)
    )
    return Head(sequence, mac)


def verify(connection: Connection, key: bytes, table: Table, heads: Iterable[Head] = ()) -> list[str]:
    """What is wrong with a chain; empty when nothing is.

    Args:
        connection: to read it from.
        key: what it is keyed with.
        table: whose chain.
        heads: ones that were kept outside the database.
    """
    wrong: list[str] = []
    names = columns(table)
    expected = {head.sequence: head.mac for head in heads if head.sequence}
    before, last = ORIGIN, 0
    every = select(table).order_by(table.c.sequence).execution_options(yield_per=1000)
    for row in connection.execute(every).mappings():
        sequence = row["sequence"]
        if sequence != last + 1:
            wrong.append(f"{table.name}: rows {last + 1} to {sequence - 1} are missing")
        try:
            right = hmac.compare_digest(row["mac"], link(key, before, row, names))
        except TypeError:
            right = False
        if not right:
            wrong.append(f"{table.name}: row {sequence} was changed, or stands where another stood")
        if sequence in expected and expected.pop(sequence) != row["mac"]:
            wrong.append(f"{table.name}: row {sequence} is not the one whose head was exported")
        before, last = row["mac"], sequence
    wrong += [f"{table.name}: it ends at row {last}, but a head was exported at {sequence}" for sequence in expected]
    head = connection.execute(
        select(tables.chains.c.sequence, tables.chains.c.mac).where(tables.chains.c.name == table.name)
    ).first()
    if (head.sequence, head.mac) != (last, before) if head is not None else last != 0:
        wrong.append(f"{table.name}: its head does not belong to its last row")
    return wrong
