"""Prices by model, in versions that never change: the one at admission holds until the settlement."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from sqlalchemy import Connection, func, insert, select

from steelyard.errors import RequestError
from steelyard.store import tables

NANO = 1_000_000_000
"""Nano-dollars of a dollar. A price of one dollar for a million tokens is 1,000 of them a token."""
EVERY_MODEL = "*"
MOST = 1 << 40
"""The highest price, about a thousand dollars a token."""


class Price(msgspec.Struct, frozen=True):
    """What a model costs, in nano-dollars."""

    input: int = 0
    """A prompt token."""
    cached_input: int = 0
    """A prompt token that was found in the cache."""
    output: int = 0
    """A generated token."""
    training: int = 0
    """A token of a training run."""
    storage: int = 0
    """A GB and day of what is stored."""
    explanation: int = 0
    """A token that goes through the network for an explanation; through its backward pass it counts as two more."""


class Counts(msgspec.Struct, frozen=True):
    """What is paid for, as the engine or the trainer counts it."""

    input_tokens: int = 0
    """Prompt tokens, those found in the cache included."""
    cached_tokens: int = 0
    output_tokens: int = 0
    training_tokens: int = 0


class Quote(msgspec.Struct, frozen=True):
    """A price that was agreed on."""

    version: int
    price: Price
    batch: bool = False
    """Half of it, rounded up to a nano-dollar once for the whole."""

    @property
    def of_explanations(self) -> Quote:
        """The same where the tokens that are counted as input are those that an explanation computes."""
        price = Price(input=self.price.explanation, cached_input=self.price.explanation)
        return msgspec.structs.replace(self, price=price)

    def cost(self, counts: Counts) -> int:
        """Nano-dollars for these counts."""
        price = self.price
        whole = (
            (counts.input_tokens - counts.cached_tokens) * price.input
            + counts.cached_tokens * price.cached_input
            + counts.output_tokens * price.output
            + counts.training_tokens * price.training
        )
        return (whole + 1) // 2 if self.batch else whole

    def most(self, counts: Counts) -> int:
        """The most that these counts may cost, however many prompt tokens turn out to be cached."""
        return max(self.cost(counts), self.cost(msgspec.structs.replace(counts, cached_tokens=counts.input_tokens)))


class PriceList(msgspec.Struct, frozen=True):
    """A version of all prices."""

    version: int = 0
    by_model: Mapping[str, Price] = {}
    created_at: int = 0

    def quote(self, *names: str, batch: bool = False) -> Quote:
        """The price of the first of these names that has one of its own (a model, then its base), else of every model.

        Without any price it is 0.
        """
        found = next((self.by_model[name] for name in names if name in self.by_model), None)
        return Quote(self.version, found or self.by_model.get(EVERY_MODEL, Price()), batch)


def newest(connection: Connection) -> PriceList:
    """The prices that hold now."""
    return of_version(connection, connection.execute(select(func.max(tables.prices.c.version))).scalar() or 0)


def of_version(connection: Connection, version: int) -> PriceList:
    """The prices of a version; none at all if there is no such version."""
    rows = connection.execute(select(tables.prices).where(tables.prices.c.version == version)).mappings().all()
    by_model = {row["model"]: Price(**{field: row[field] for field in Price.__struct_fields__}) for row in rows}
    return PriceList(version, by_model, rows[0]["created_at"] if rows else 0)


def publish(connection: Connection, by_model: Mapping[str, Price], now: int) -> PriceList:
    """Let these prices hold from now on; they replace the whole list.

    Raises:
        RequestError: a price is negative or beyond reason; the model and the kind are named.
    """
    for model, price in by_model.items():
        for kind in Price.__struct_fields__:
            if not 0 <= getattr(price, kind) <= MOST:
                raise RequestError(f"the price '{kind}' of '{model}' must be 0 to {MOST} nano-dollars", param=kind)
    if not by_model:
        raise RequestError("a price list names at least one model, or '*' for every model", param="prices")
    version = (connection.execute(select(func.max(tables.prices.c.version))).scalar() or 0) + 1
    rows = [
        {"version": version, "model": model, "created_at": now, **msgspec.structs.asdict(price)}
        for model, price in by_model.items()
    ]
    connection.execute(insert(tables.prices), rows)
    return PriceList(version, dict(by_model), now)
