"""Lists in pages, as OpenAI's are: `limit` and `after` in the query, `has_more` in the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, TypeVar

import msgspec
from sqlalchemy import ColumnElement, Connection, Table, and_, or_, select
from starlette.requests import Request

from steelyard.errors import NotFoundError, RequestError
from steelyard.serve.protocol.parameters import TEXT, Parameter, integer_from, one_of

Item = TypeVar("Item")
Row = dict[str, Any]

DEFAULT_LIMIT, MOST = 20, 100


def limit_and_after(most: int = MOST, default: int = DEFAULT_LIMIT) -> tuple[Parameter, ...]:
    """The parameters of a list that has one order."""
    return Parameter("limit", integer_from(1, most, default)), Parameter("after", TEXT)


def paged(most: int = MOST) -> tuple[Parameter, ...]:
    """The parameters that `wanted` reads."""
    return *limit_and_after(most), Parameter("order", one_of("asc", "desc"))


class Page(msgspec.Struct, Generic[Item], frozen=True):
    """A part of a list."""

    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class Wanted(msgspec.Struct, frozen=True):
    """Which part of a list is asked for."""

    limit: int = DEFAULT_LIMIT
    after: str | None = None
    order: Literal["asc", "desc"] = "desc"


def allow(request: Request, *names: str) -> dict[str, str]:
    """The query's parameters, which must be among `names`.

    Raises:
        RequestError: another one is there, or one is there twice.
    """
    given: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in names:
            raise RequestError(f"unknown parameter '{name[:80]}': remove it", param=name[:80], code="unknown_parameter")
        if name in given:
            raise RequestError(f"'{name}' is given twice", param=name)
        given[name] = value
    return given


def wanted(request: Request, *more: str, most: int = MOST) -> Wanted:
    """Which part the query asks for; `more` are parameters that the list has besides.

    Raises:
        RequestError: a parameter is unknown or wrong.
    """
    given = allow(request, "limit", "after", "order", *more)
    order = given.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError("'order' must be asc or desc", param="order")
    limit = integer(given, "limit", 1, most, DEFAULT_LIMIT)
    return Wanted(limit, given.get("after"), "asc" if order == "asc" else "desc")


def integer(given: dict[str, str], name: str, least: int, most: int, default: int) -> int:
    """An integer of the query.

    Raises:
        RequestError: it is none, or out of range.
    """
    text = given.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise RequestError(f"'{name}' must be an integer from {least} to {most}", param=name)
    return int(text)


def boolean(given: dict[str, str], name: str) -> bool | None:
    """A boolean of the query, if it is there.

    Raises:
        RequestError: it is none.
    """
    text = given.get(name)
    if text not in (None, "true", "false"):
        raise RequestError(f"'{name}' must be true or false", param=name)
    return None if text is None else text == "true"


def read_page(
    connection: Connection,
    table: Table,
    conditions: Sequence[ColumnElement[bool]],
    asked: Wanted,
    shape: Callable[[Row], Item],
) -> Page[Item]:
    """A page of a table's rows by `created_at` and `id`.

    Raises:
        NotFoundError: `after` is no row of this list.
    """
    columns = table.c
    rules = list(conditions)
    if asked.after is not None:
        last = connection.execute(
            select(columns.created_at, columns.id).where(columns.id == asked.after, *conditions)
        ).first()
        if last is None:
            raise NotFoundError(f"'after' names nothing of this list: '{asked.after[:80]}'", param="after")
        if asked.order == "asc":
            beyond = and_(columns.created_at == last.created_at, columns.id > last.id)
            rules.append(or_(columns.created_at > last.created_at, beyond))
        else:
            beyond = and_(columns.created_at == last.created_at, columns.id < last.id)
            rules.append(or_(columns.created_at < last.created_at, beyond))
    by = (columns.created_at, columns.id)
    order = [column.asc() if asked.order == "asc" else column.desc() for column in by]
    rows = connection.execute(select(table).where(*rules).order_by(*order).limit(asked.limit + 1)).mappings().all()
    return page_of([shape(dict(row)) for row in rows[: asked.limit]], [row["id"] for row in rows], asked.limit)


def page_of(items: list[Item], ids: Sequence[str], limit: int) -> Page[Item]:
    """A page of items; `ids` has one more if there is more."""
    shown = ids[:limit]
    return Page(items, shown[0] if shown else None, shown[-1] if shown else None, len(ids) > limit)
