"""`/v1/organization/ledger` and `/v1/organization/prices`: every nano-dollar, and what they are counted by."""

from __future__ import annotations

import msgspec
from sqlalchemy import Connection, select
from starlette.requests import Request
from starlette.responses import Response

from steelyard.serve.billing import prices
from steelyard.serve.billing.prices import Price, PriceList
from steelyard.serve.protocol.billing import Entry, Head, LedgerPage, Prices, PricesRequest
from steelyard.serve.protocol.errors import json_response
from steelyard.serve.protocol.fields import parse
from steelyard.serve.protocol.lists import allow, integer
from steelyard.serve.protocol.parameters import TEXT, Parameter, integer_from
from steelyard.serve.service import Service
from steelyard.store import tables

MOST = 1000
MOST_SEQUENCE = 1 << 62
PARAMETERS = (
    Parameter("limit", integer_from(1, MOST, 100)),
    Parameter("before", integer_from(1, MOST_SEQUENCE)),
    Parameter("project_id", TEXT),
    Parameter("reference", TEXT),
)


async def entries(service: Service, request: Request) -> Response:
    """Entries, newest first: those of a project, of a request (its receipt), or all; `before` a sequence."""
    given = allow(request, "limit", "before", "project_id", "reference")
    limit = integer(given, "limit", 1, MOST, 100)
    before = integer(given, "before", 1, MOST_SEQUENCE, MOST_SEQUENCE)
    columns = tables.ledger.c
    rules = [columns.sequence < before]
    rules += [columns[name] == given[name] for name in ("project_id", "reference") if name in given]

    def read(connection: Connection) -> LedgerPage:
        rows = connection.execute(
            select(tables.ledger).where(*rules).order_by(columns.sequence.desc()).limit(limit + 1)
        ).mappings()
        found = [Entry.of(dict(row)) for row in rows]
        head = service.ledger.head_of(connection)
        return LedgerPage(found[:limit], len(found) > limit, Head(head.sequence, head.mac.hex()))

    return json_response(await service.database.read(read))


async def retrieve_prices(service: Service, request: Request) -> Response:
    """The prices that hold."""
    allow(request)
    return json_response(Prices.of(service.prices))


async def publish_prices(service: Service, request: Request) -> Response:
    """Let a whole list of prices hold from now on; what was admitted before keeps its own."""
    body = parse(PricesRequest, await request.body())
    by_model = {model: msgspec.convert(price.model_dump(), Price) for model, price in body.prices.items()}
    actor = service.actor(request)

    def publish(connection: Connection) -> PriceList:
        made = prices.publish(connection, by_model, actor.now)
        actor.log(connection, "prices.published", str(made.version), models=sorted(by_model))
        return made

    return json_response(Prices.of(await service.change(publish)))
