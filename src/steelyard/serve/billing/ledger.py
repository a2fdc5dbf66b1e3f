"""The ledger: reserve the worst case, settle what was counted, release the rest. Exactly once, whatever dies.

A reservation and its settlement are one row each, added and never changed; the sum of a project's rows is what it has
spent and holds reserved. Operations that wait at the same time are applied together, in one transaction: a few
statements for all of them. Knows neither HTTP nor engines.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection, bindparam, delete, func, insert, select, tuple_, update

from steelyard.errors import QuotaError
from steelyard.serve.billing.prices import NANO, Counts, Price, Quote
from steelyard.store import chain, tables
from steelyard.store.database import Database

Service = Literal["completions", "embeddings", "audio_transcriptions", "explanations", "fine_tuning", "compression"]
ANSWERS: tuple[Service, ...] = ("completions", "embeddings", "audio_transcriptions", "explanations")
"""What engines are asked for; the others are jobs."""
Clock = Callable[[], float]
"""Unix seconds."""

log = logging.getLogger("steelyard.billing")


class Reservation(msgspec.Struct, frozen=True):
    """What somebody may spend, at most."""

    id: str
    project_id: str
    key_id: str
    model: str
    service: Service
    quote: Quote
    amount: int
    """Nano-dollars."""


class Reserve(msgspec.Struct, frozen=True):
    """Hold a reservation, or refuse it."""

    reservation: Reservation


class Settle(msgspec.Struct, frozen=True):
    """End a reservation; one that is not open is left alone. No counts: those that were persisted last."""

    id: str
    counts: Counts | None
    note: str = ""
    free: bool = False
    """What it came to is counted, and costs nothing."""


class Progress(msgspec.Struct, frozen=True):
    """Remember what an open reservation has come to, for the case that this process dies."""

    id: str
    counts: Counts


class Charge(msgspec.Struct, frozen=True):
    """Something that was not reserved: what is stored, by the day; a credit, if it is negative. Once per reference."""

    kind: Literal["storage", "credit"]
    reference: str
    project_id: str
    amount: int
    price_version: int = 0
    note: str = ""


Item = Reserve | Settle | Progress | Charge


class Ledger:
    """The one door to the ledger.

    Args:
        database: where it is.
        key: of its hash chain.
        clock: Unix seconds.
    """

    def __init__(self, database: Database, key: bytes, clock: Clock = time.time) -> None:
        self._database, self._key, self._clock = database, key, clock
        newest = database.read_now(lambda connection: connection.execute(_NEWEST_MONTH).scalar())
        self._month: str = newest or ""

    async def reserve(self, reservation: Reservation, *, kept: bool = False) -> None:
        """Hold a reservation; returns once that would survive a crash.

        Args:
            reservation: what may be spent.
            kept: it stays when nobody waits for it any more: a job's, which goes on later.

        Raises:
            QuotaError: the project's limit for this month does not cover it.
            StorageError: nothing was reserved.
        """
        answer = self._database.apply(self._apply, Reserve(reservation))
        try:
            await asyncio.wrap_future(answer)
        except asyncio.CancelledError:
            if not kept:
                answer.add_done_callback(lambda done: self._release(done, reservation.id))
            raise

    def settle(
        self, reservation_id: str, counts: Counts | None, note: str = "", *, free: bool = False
    ) -> Future[int | None]:
        """End a reservation: the future has the cost, or None if it had ended before."""
        return self._database.apply(self._apply, Settle(reservation_id, counts, note, free))

    def progress(self, reservation_id: str, counts: Counts) -> Future[None]:
        """Persist what a reservation has come to."""
        return self._database.apply(self._apply, Progress(reservation_id, counts))

    def charge(self, charge: Charge) -> Future[int | None]:
        """Add an entry without a reservation; the future has None if its reference is there already."""
        return self._database.apply(self._apply, charge)

    def settle_abandoned(self, *, services: Sequence[Service] = ANSWERS) -> int:
        """Settle what servers that have died left open, at their last persisted counts; returns how many.

        Training's reservations are the jobs' own, which go on elsewhere.
        """

        def abandoned(connection: Connection) -> list[str]:
            rows = connection.execute(select(_open.c.id, _open.c.holder).where(_open.c.service.in_(services))).all()
            dead = {holder: not self._database.is_held(connection, holder) for holder in {row.holder for row in rows}}
            return [row.id for row in rows if dead[row.holder]]

        found = self._database.read_now(abandoned)
        settled = [self.settle(reservation, None, "its server died") for reservation in found]
        return sum(answer.result() is not None for answer in settled)

    def head(self) -> chain.Head:
        """How far the ledger goes, to be kept elsewhere."""
        return self._database.read_now(self.head_of)

    def head_of(self, connection: Connection) -> chain.Head:
        """`head`, on a connection."""
        row = connection.execute(_HEAD).one()
        return chain.Head(row.sequence, row.mac)

    def month(self) -> str:
        """The month that spending counts for. It never goes back, whatever the clock does."""
        self._month = max(self._month, time.strftime("%Y-%m", time.gmtime(self._clock())))
        return self._month

    def _release(self, done: Future[Any], reservation_id: str) -> None:
        if not done.cancelled() and done.exception() is None:
            self.settle(reservation_id, Counts(), "nobody waited for it")

    def _apply(self, connection: Connection, items: list[Item]) -> list[Any]:
        page = _Page(self, connection, items)
        results = [page.apply(item) for item in items]
        page.write()
        return results


_open = tables.reservations
_NEWEST_MONTH = select(func.max(tables.balances.c.month))
_HEAD = select(tables.chains.c.sequence, tables.chains.c.mac).where(tables.chains.c.name == "ledger")
_PROGRESS = (
    update(_open)
    .where(_open.c.id == bindparam("of"))
    .values(**{name: bindparam(f"new_{name}") for name in Counts.__struct_fields__})
)
_BALANCE = (
    update(tables.balances)
    .where(tables.balances.c.project_id == bindparam("of"), tables.balances.c.month == bindparam("in_month"))
    .values(amount=bindparam("new_amount"))
)


class _Page:
    """What a few operations need to know and what they change: read at once, written at once."""

    def __init__(self, ledger: Ledger, connection: Connection, items: Sequence[Item]) -> None:
        self.ledger, self.connection = ledger, connection
        self.now, self.month = int(ledger._clock()), ledger.month()
        self.head = chain.lock(connection, tables.ledger)
        settled = [item.id for item in items if isinstance(item, Settle)]
        self.open: dict[str, dict[str, Any]] = {}
        if settled:
            rows = connection.execute(select(_open).where(_open.c.id.in_(settled))).mappings()
            self.open = {row["id"]: dict(row) for row in rows}
        charged = [item.reference for item in items if isinstance(item, Charge)]
        self.charged: set[tuple[str, str]] = set()
        if charged:
            entries = tables.ledger.c
            found = connection.execute(select(entries.kind, entries.reference).where(entries.reference.in_(charged)))
            self.charged = {(row.kind, row.reference) for row in found}
        reserving = [item.reservation for item in items if isinstance(item, Reserve)]
        spending = {(one.project_id, self.month) for one in reserving}
        spending |= {(item.project_id, self.month) for item in items if isinstance(item, Charge)}
        spending |= {(row["project_id"], row["month"]) for row in self.open.values()}
        self.balances = self._balances(spending)
        self.before = dict(self.balances)
        self.limits = self._limits({one.project_id for one in reserving})
        self.entries: list[dict[str, Any]] = []
        self.reserved: dict[str, dict[str, Any]] = {}
        self.ended: list[str] = []
        self.progress: dict[str, dict[str, Any]] = {}

    def apply(self, item: Item) -> Any:
        match item:
            case Reserve(reservation):
                return self._reserve(reservation)
            case Settle():
                return self._settle(item)
            case Progress(id=id, counts=counts):
                self.progress[id] = msgspec.structs.asdict(counts)
                return None
            case Charge():
                return self._charge(item)

    def write(self) -> None:
        connection = self.connection
        if self.reserved:
            connection.execute(insert(_open), list(self.reserved.values()))
        if self.progress:
            rows = [
                {"of": id, **{f"new_{name}": value for name, value in counts.items()}}
                for id, counts in self.progress.items()
            ]
            connection.execute(_PROGRESS, rows)
        if self.ended:
            connection.execute(delete(_open).where(_open.c.id.in_(self.ended)))
        made = [
            {"project_id": project, "month": month, "amount": amount}
            for (project, month), amount in self.balances.items()
            if (project, month) not in self.before
        ]
        if made:
            connection.execute(insert(tables.balances), made)
        changed = [
            {"of": project, "in_month": month, "new_amount": amount}
            for (project, month), amount in self.balances.items()
            if self.before.get((project, month), amount) != amount
        ]
        if changed:
            connection.execute(_BALANCE, changed)
        chain.append(connection, self.ledger._key, tables.ledger, self.head, self.entries)

    def _reserve(self, one: Reservation) -> QuotaError | None:
        account = (one.project_id, self.month)
        spent, limit = self.balances.get(account, 0), self.limits.get(one.project_id)
        if limit is not None and spent + one.amount > limit:
            return QuotaError(
                f"this may cost up to ${one.amount / NANO:.6f}, and of this month's ${limit / NANO:.2f}"
                f" ${max(0, limit - spent) / NANO:.6f} are left: ask for fewer tokens, or for a higher limit"
            )
        self.balances[account] = spent + one.amount
        self.reserved[one.id] = {
            "id": one.id,
            "holder": self.ledger._database.holder,
            "project_id": one.project_id,
            "key_id": one.key_id,
            "model": one.model,
            "service": one.service,
            "batch": one.quote.batch,
            "price_version": one.quote.version,
            "price": msgspec.to_builtins(one.quote.price),
            "month": self.month,
            "amount": one.amount,
            **msgspec.structs.asdict(Counts()),
            "created_at": self.now,
        }
        self._enter("reserve", self.reserved[one.id], one.amount, 0, Counts(), "")
        return None

    def _settle(self, item: Settle) -> int | None:
        row = self.reserved.pop(item.id, None)  # reserved and settled in one transaction
        if row is None:
            row = self.open.pop(item.id, None)
            if row is None:
                return None
            self.ended.append(item.id)
        persisted = self.progress.pop(item.id, None) or {name: row[name] for name in Counts.__struct_fields__}
        counts = item.counts or Counts(**persisted)
        quote = Quote(row["price_version"], msgspec.convert(row["price"], Price), row["batch"])
        cost = 0 if item.free else quote.cost(counts)
        if cost > row["amount"]:
            log.error("reservation %s: %d nano-dollars were reserved and %d are due", item.id, row["amount"], cost)
        account = (row["project_id"], row["month"])
        self.balances[account] = self.balances.get(account, 0) + cost - row["amount"]
        self._enter("settle", row, cost - row["amount"], cost, counts, item.note)
        return cost

    def _charge(self, item: Charge) -> int | None:
        if (item.kind, item.reference) in self.charged:
            return None
        self.charged.add((item.kind, item.reference))
        account = (item.project_id, self.month)
        self.balances[account] = self.balances.get(account, 0) + item.amount
        row = {
            "id": item.reference,
            "project_id": item.project_id,
            "key_id": None,
            "model": "",
            "service": item.kind,
            "batch": False,
            "price_version": item.price_version,
            "month": self.month,
        }
        self._enter(item.kind, row, item.amount, item.amount, Counts(), item.note)
        return item.amount

    def _enter(self, kind: str, row: dict[str, Any], amount: int, cost: int, counts: Counts, note: str) -> None:
        same = {name: row[name] for name in ("project_id", "key_id", "model", "service", "batch", "price_version")}
        self.entries.append(
            {
                "at": self.now,
                "kind": kind,
                "reference": row["id"],
                **same,
                "month": row["month"],
                "amount": amount,
                "cost": cost,
                **msgspec.structs.asdict(counts),
                "note": note,
            }
        )

    def _balances(self, accounts: set[tuple[str, str]]) -> dict[tuple[str, str], int]:
        if not accounts:
            return {}
        balances = tables.balances.c
        rows = self.connection.execute(
            select(tables.balances).where(tuple_(balances.project_id, balances.month).in_(sorted(accounts)))
        )
        return {(row.project_id, row.month): row.amount for row in rows}

    def _limits(self, projects: set[str]) -> dict[str, int]:
        if not projects:
            return {}
        columns = tables.projects.c
        rows = self.connection.execute(
            select(columns.id, columns.monthly_limit).where(
                columns.id.in_(projects), columns.monthly_limit.is_not(None)
            )
        )
        return {row.id: row.monthly_limit for row in rows}
