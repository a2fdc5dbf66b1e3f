"""Hash chains: every change, insertion, removal and cut is found by who has the key and an exported head."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, delete, insert, select, update

from steelyard.store import chain, tables
from steelyard.store.database import Database, opened

KEY = b"k" * 32
ROWS = 40


def row(number: int) -> dict[str, Any]:
    return {
        "at": 1000 + number,
        "event": "project.updated",
        "actor": f"key_{number % 3}",
        "project_id": None if number % 4 == 0 else "proj",
        "target": "ü",
        "detail": {"number": number},
    }


def append(connection: Connection, *numbers: int) -> chain.Head:
    head = chain.lock(connection, tables.audit)
    return chain.append(connection, KEY, tables.audit, head, [row(number) for number in numbers])


@pytest.fixture
def database(fresh_database: str) -> Iterator[Database]:
    with opened(fresh_database) as database:
        for number in range(0, ROWS, 4):
            database.write_now(lambda connection, number=number: append(connection, *range(number, number + 4)))
        yield database


def wrong(database: Database, *heads: chain.Head) -> list[str]:
    return database.read_now(lambda connection: chain.verify(connection, KEY, tables.audit, heads))


def test_an_untouched_chain_is_right(database: Database) -> None:
    head = database.write_now(lambda connection: chain.lock(connection, tables.audit))
    assert head.sequence == ROWS
    assert wrong(database, head) == []
    assert database.write_now(append) == head
    assert database.read_now(lambda connection: chain.verify(connection, b"x" * 32, tables.audit))


def test_every_kind_of_tampering_is_found(database: Database) -> None:
    head = database.write_now(lambda connection: chain.lock(connection, tables.audit))
    audit, seeded = tables.audit, random.Random(7)
    edits = {"at": 5, "event": "x", "actor": "y", "project_id": "other", "target": "z", "detail": {}, "mac": b"m" * 32}

    def tamper(connection: Connection, number: int) -> str:
        place = seeded.randint(1, ROWS)
        kind = number % 5
        if kind == 0:
            column = seeded.choice(list(edits))
            connection.execute(update(audit).where(audit.c.sequence == place).values({column: edits[column]}))
        elif kind == 1:
            connection.execute(delete(audit).where(audit.c.sequence == place))
        elif kind == 2:  # cut off, and the head set back: only what was exported tells
            connection.execute(delete(audit).where(audit.c.sequence >= place))
            last = connection.execute(select(audit.c.sequence, audit.c.mac).order_by(audit.c.sequence.desc())).first()
            sequence, mac = (0, chain.ORIGIN) if last is None else (last.sequence, last.mac)
            chains = tables.chains
            connection.execute(update(chains).where(chains.c.name == "audit").values(sequence=sequence, mac=mac))
        elif kind == 3:  # a row more at the end, made by one who lacks the key
            forged = {**row(99), "sequence": ROWS + 1}
            forged["mac"] = chain.link(b"guess" * 6, head.mac, forged, chain.columns(audit))
            connection.execute(insert(audit), forged)
        else:  # two rows change places
            other = place % ROWS + 1
            for here, there in ((place, -1), (other, place), (-1, other)):
                connection.execute(update(audit).where(audit.c.sequence == here).values(sequence=there))
        return f"{kind} at {place}"

    for number in range(50):
        with database.engine.connect() as connection, connection.begin() as transaction:
            what = tamper(connection, number)
            assert chain.verify(connection, KEY, audit, [head]), what
            transaction.rollback()
    assert wrong(database, head) == []
