"""The ledger: exact, once, never over the limit; on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, func, select, update

from databases import database_url
from steelyard.errors import QuotaError
from steelyard.serve.billing.ledger import Charge, Ledger, Reservation
from steelyard.serve.billing.prices import Counts, Price, Quote
from steelyard.serve.organization import limits, projects
from steelyard.serve.organization.audit import Actor
from steelyard.store import chain, tables
from steelyard.store.database import Database, opened

KEY = b"k" * 32
PRICE = Price(input=150, cached_input=75, output=600, training=3000)
QUOTE = Quote(1, PRICE)


def actor() -> Actor:
    return Actor("test", 1000, KEY)


@pytest.fixture
def database(fresh_database: str) -> Iterator[Database]:
    with opened(fresh_database, role="server") as database:
        yield database


def new_project(database: Database, limit: int | None = None) -> str:
    def make(connection: Connection) -> str:
        row = projects.create(connection, actor(), "test")
        limits.set_spend_limit(connection, actor(), row["id"], limit)
        return str(row["id"])

    return database.write_now(make)


def reservation(id: str, project: str, most: Counts, quote: Quote = QUOTE) -> Reservation:
    return Reservation(id, project, "key_1", "tiny", "completions", quote, quote.most(most))


def reserve(ledger: Ledger, one: Reservation) -> None:
    asyncio.run(ledger.reserve(one))


def total(database: Database, project: str) -> int:
    """The sum of a project's entries, which is what its balance says."""
    entries, balances = tables.ledger.c, tables.balances.c

    def read(connection: Connection) -> tuple[int, int]:
        found = [
            connection.execute(select(func.coalesce(func.sum(columns.amount), 0)).where(columns.project_id == project))
            for columns in (entries, balances)
        ]
        return int(found[0].scalar() or 0), int(found[1].scalar() or 0)

    entered, balance = database.read_now(read)
    assert entered == balance
    return entered


def check_chain(database: Database, ledger: Ledger) -> None:
    head = ledger.head()
    assert database.read_now(lambda connection: chain.verify(connection, KEY, tables.ledger, [head])) == []


def test_what_is_reserved_is_held_and_what_is_settled_is_spent(database: Database) -> None:
    ledger, project = Ledger(database, KEY), new_project(database)
    one = reservation("a", project, Counts(100, 0, 50))
    assert one.amount == 100 * 150 + 50 * 600
    reserve(ledger, one)
    assert total(database, project) == one.amount
    assert ledger.settle("a", Counts(100, 64, 7)).result() == 36 * 150 + 64 * 75 + 7 * 600
    assert total(database, project) == 36 * 150 + 64 * 75 + 7 * 600
    assert ledger.settle("a", Counts(100, 0, 50)).result() is None, "settled once"
    assert total(database, project) == 36 * 150 + 64 * 75 + 7 * 600
    check_chain(database, ledger)


def test_a_batch_costs_half_rounded_up_once(database: Database) -> None:
    quote = Quote(1, Price(input=1, output=1), batch=True)
    assert quote.cost(Counts(3, 0, 4)) == 4
    assert quote.most(Counts(3, 0, 4)) == 4
    assert Quote(1, Price(input=1, cached_input=5)).most(Counts(10)) == 50, "a dear cache is reserved for"


def test_the_price_at_admission_holds(database: Database) -> None:
    ledger, project = Ledger(database, KEY), new_project(database)
    reserve(ledger, reservation("a", project, Counts(10, 0, 10)))
    database.write_now(
        lambda connection: connection.execute(
            update(tables.reservations).values(price={**tables_price(), "output": 601}, price_version=2)
        )
    )
    assert ledger.settle("a", Counts(10, 0, 10)).result() == 10 * 150 + 10 * 601, "the reservation's own, not another"


def tables_price() -> dict[str, int]:
    return {"input": 150, "cached_input": 75, "output": 600, "training": 3000, "storage": 0}


def test_64_at_once_never_pass_the_limit(database: Database) -> None:
    most = Counts(10, 0, 10)
    each = QUOTE.most(most)
    ledger, project = Ledger(database, KEY), new_project(database, 10 * each + each // 2)

    async def race() -> list[Any]:
        asked = [ledger.reserve(reservation(f"r{number}", project, most)) for number in range(64)]
        return await asyncio.gather(*asked, return_exceptions=True)

    results = asyncio.run(race())
    assert sum(result is None for result in results) == 10
    assert all(isinstance(result, QuotaError) for result in results if result is not None)
    assert total(database, project) == 10 * each
    held = [f"r{number}" for number, result in enumerate(results) if result is None]
    assert ledger.settle(held[0], Counts()).result() == 0
    reserve(ledger, reservation("next", project, most))
    with pytest.raises(QuotaError, match="of this month's"):
        reserve(ledger, reservation("another", project, most))


def test_who_leaves_while_it_is_reserved_holds_nothing(database: Database) -> None:
    ledger, project = Ledger(database, KEY), new_project(database)

    async def leave() -> None:
        for number in range(20):
            asking = asyncio.create_task(ledger.reserve(reservation(f"r{number}", project, Counts(10, 0, 10))))
            await asyncio.sleep(number % 4 * 0.0005)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(leave())
    deadline = time.monotonic() + 5
    while database.read_now(lambda connection: connection.execute(select(tables.reservations.c.id)).first()):
        left = [f"r{number}" for number in range(20)]
        assert time.monotonic() < deadline, left
        for one in left:  # those that had been reserved before anybody left
            ledger.settle(one, Counts()).result()
    assert total(database, project) == 0
    check_chain(database, ledger)


def test_a_dead_servers_reservations_are_settled_once_at_what_was_persisted(fresh_database: str) -> None:
    with opened(fresh_database, role="server") as database:
        ledger, project = Ledger(database, KEY), new_project(database)
        for name in ("a", "b", "job"):
            one = reservation(name, project, Counts(100, 0, 50))
            service = "fine_tuning" if name == "job" else "completions"
            reserve(ledger, Reservation(**{**{f: getattr(one, f) for f in one.__struct_fields__}, "service": service}))
        ledger.progress("a", Counts(100, 32, 5)).result()
        assert ledger.settle_abandoned() == 0, "its server lives"
    for expected in (2, 0):
        with opened(fresh_database, role="server") as database:
            ledger = Ledger(database, KEY)
            assert ledger.settle_abandoned() == expected
            spent = QUOTE.cost(Counts(100, 32, 5))
            held = QUOTE.most(Counts(100, 0, 50))
            assert total(database, project) == spent + held, "the job goes on elsewhere"
            check_chain(database, ledger)


def test_charges_come_once_per_reference(database: Database) -> None:
    ledger, project = Ledger(database, KEY), new_project(database)
    charge = Charge("storage", f"{project} 2026-11-25", project, 5000)
    assert ledger.charge(charge).result() == 5000
    assert ledger.charge(charge).result() is None
    assert ledger.charge(Charge("credit", "sorry", project, -2000, note="an outage")).result() == -2000
    assert total(database, project) == 3000


def test_the_month_never_goes_back(database: Database) -> None:
    now = [1_764_000_000.0]  # November 2025
    ledger, project = Ledger(database, KEY, lambda: now[0]), new_project(database, QUOTE.most(Counts(10, 0, 10)))
    reserve(ledger, reservation("november", project, Counts(10, 0, 10)))
    with pytest.raises(QuotaError):
        reserve(ledger, reservation("over", project, Counts(1)))
    now[0] += 8 * 86400  # the clock jumps forth, into December
    reserve(ledger, reservation("december", project, Counts(10, 0, 10)))
    now[0] -= 8 * 86400  # and back: November's limit is not there again, nor is December's doubled
    for clock in (now[0], now[0] + 8 * 86400, now[0] - 86400):
        now[0] = clock
        with pytest.raises(QuotaError):
            reserve(ledger, reservation(f"again {clock}", project, Counts(1)))
    again = Ledger(database, KEY, lambda: 1_764_000_000.0)
    assert again.month() == "2025-12"


counts = st.builds(
    lambda prompt, cached, output: Counts(prompt, min(prompt, cached), output),
    st.integers(0, 64),
    st.integers(0, 64),
    st.integers(0, 32),
)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), st.integers(0, 9)),
        st.tuples(st.just("progress"), st.integers(0, 9), counts),
        st.tuples(st.just("settle"), st.integers(0, 9), counts),
        st.tuples(
            st.just("restart"),
        ),
    ),
    max_size=30,
)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=operations)
def test_whatever_happens_the_sums_are_right(kind: str, plan: list[tuple[Any, ...]], request: Any) -> None:
    """Against a model: what each reservation should have come to."""
    server = request.getfixturevalue("postgres") if kind == "postgresql" else None
    most = Counts(64, 0, 32)
    with database_url(kind, server) as url:
        database = Database(url, role="server")
        ledger, project = Ledger(database, KEY), new_project(database, 4 * QUOTE.most(most))
        open_now: dict[str, Counts] = {}
        spent, made = 0, 0
        names: dict[int, str] = {}
        for step in plan:
            if step[0] == "restart":
                database.close()
                database = Database(url, role="server")
                ledger = Ledger(database, KEY)
                assert ledger.settle_abandoned() == len(open_now)
                spent += sum(QUOTE.cost(persisted) for persisted in open_now.values())
                open_now.clear()
            elif step[0] == "reserve":
                made += 1
                name = names[step[1]] = f"r{made}"
                fits = spent + (len(open_now) + 1) * QUOTE.most(most) <= 4 * QUOTE.most(most)
                try:
                    reserve(ledger, reservation(name, project, most))
                    assert fits
                    open_now[name] = Counts()
                except QuotaError:
                    assert not fits
            elif step[1] in names:
                name = names[step[1]]
                if step[0] == "progress":
                    ledger.progress(name, step[2]).result()
                    if name in open_now:
                        open_now[name] = step[2]
                else:
                    answer: Future[int | None] = ledger.settle(name, step[2])
                    cost = answer.result()
                    assert (cost is not None) == (name in open_now)
                    if cost is not None:
                        assert cost == QUOTE.cost(step[2])
                        spent += cost
                        del open_now[name]
            assert total(database, project) == spent + len(open_now) * QUOTE.most(most)
        check_chain(database, ledger)
        database.close()
