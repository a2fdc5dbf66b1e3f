"""Names that stand for models: moved, tried on a share of users, promoted, rolled back; and the days models end.

A share is sticky: who asks (`user`, or the key) is hashed with the alias, so the same one gets the same model as long
as the share is not made smaller. Knows no HTTP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from steelyard.checkpoint import manifest
from steelyard.errors import CheckpointError, ConflictError, FidelityError, ModelNotFoundError, NotFoundError
from steelyard.serve.models import ServedModel
from steelyard.serve.organization.audit import Actor
from steelyard.store import tables

MOST_HISTORY = 20
STEPS = 10_000
"""Of a share: hundredths of a percent."""

Row = dict[str, Any]
columns = tables.aliases.c


@dataclass(frozen=True)
class Names:
    """What names mean now."""

    aliases: Mapping[str, Row] = field(default_factory=dict)
    shutdowns: Mapping[str, int] = field(default_factory=dict)
    """By model, the second from which it is served no more."""

    def resolve(self, name: str, who: str) -> str:
        """The model that somebody gets by this name."""
        alias = self.aliases.get(name)
        if alias is None:
            return name
        tried = alias["canary"] is not None and share(name, who) < alias["percent"] * STEPS // 100
        found: str = alias["canary"] if tried else alias["model"]
        return found

    def check_open(self, model: str, now: int) -> None:
        """Refuse a model whose day has come.

        Raises:
            ModelNotFoundError: it is served no more.
        """
        end = self.shutdowns.get(model)
        if end is not None and now >= end:
            raise ModelNotFoundError(
                f"the model '{model}' was shut down: use another", param="model", code="model_not_found"
            )


def share(alias: str, who: str) -> int:
    """Where somebody stands in an alias's share, 0 to `STEPS` - 1."""
    return int.from_bytes(hashlib.sha256(f"{alias}\0{who}".encode()).digest()[:8], "big") % STEPS


def read(connection: Connection) -> Names:
    """All of them."""
    aliases = {row["name"]: dict(row) for row in connection.execute(select(tables.aliases)).mappings()}
    ends = {row.model: row.at for row in connection.execute(select(tables.shutdowns))}
    return Names(aliases, ends)


def get(connection: Connection, name: str) -> Row:
    """An alias.

    Raises:
        NotFoundError: there is none of this name.
    """
    row = connection.execute(select(tables.aliases).where(columns.name == name)).mappings().first()
    if row is None:
        raise NotFoundError(f"no alias '{name[:80]}'", param="alias")
    return dict(row)


def point(connection: Connection, actor: Actor, name: str, model: str) -> Row:
    """Let a name stand for a model; what it stood for before can be had back."""
    row = connection.execute(select(tables.aliases).where(columns.name == name)).mappings().first()
    if row is None:
        new: Row = {
            "name": name,
            "model": model,
            "canary": None,
            "percent": 0,
            "history": [],
            "created_at": actor.now,
        }
        connection.execute(insert(tables.aliases), new)
        actor.log(connection, "alias.created", name, model=model)
        return new
    return _change(
        connection, actor, dict(row), "alias.updated", model=model, history=_with(row["history"], row["model"])
    )


def try_out(connection: Connection, actor: Actor, name: str, model: str | None, percent: int) -> Row:
    """Give a share of those who ask another model; None: nobody any more."""
    row = get(connection, name)
    values = {"canary": model, "percent": 0 if model is None else percent}
    return _change(connection, actor, row, "alias.canary", **values)


def promote(connection: Connection, actor: Actor, name: str, models: Mapping[str, ServedModel]) -> Row:
    """Let everybody have the model that is tried out.

    Raises:
        ConflictError: none is tried out, or it is not served any more.
        FidelityError: its certificate is past its thresholds.
    """
    row = get(connection, name)
    if row["canary"] is None:
        raise ConflictError(f"no model is tried out under '{name}': there is nothing to promote", code="no_canary")
    if row["canary"] not in models:
        raise ConflictError(f"'{row['canary']}' is not served any more", code="model_not_served")
    demand_certificate(models[row["canary"]])
    values = {"model": row["canary"], "canary": None, "percent": 0, "history": _with(row["history"], row["model"])}
    return _change(connection, actor, row, "alias.promoted", **values)


def roll_back(connection: Connection, actor: Actor, name: str) -> Row:
    """Let a name stand for what it stood for before; nothing is tried out any more.

    Raises:
        ConflictError: it has never stood for anything else.
    """
    row = get(connection, name)
    if not row["history"]:
        raise ConflictError(f"'{name}' has stood for nothing else: there is no way back", code="no_history")
    *history, model = row["history"]
    return _change(connection, actor, row, "alias.rolled_back", model=model, canary=None, percent=0, history=history)


def remove(connection: Connection, actor: Actor, name: str) -> None:
    """Let a name stand for nothing."""
    get(connection, name)
    connection.execute(delete(tables.aliases).where(columns.name == name))
    actor.log(connection, "alias.deleted", name)


def shut_down(connection: Connection, actor: Actor, model: str, at: int | None) -> None:
    """Serve a model no more from a second on; None: as long as it is there."""
    connection.execute(delete(tables.shutdowns).where(tables.shutdowns.c.model == model))
    if at is not None:
        connection.execute(insert(tables.shutdowns), {"model": model, "at": at})
    actor.log(connection, "model.shutdown_date", model, at=at)


def using(connection: Connection, model: str) -> list[str]:
    """The aliases that stand for a model, or try it out."""
    rule = (columns.model == model) | (columns.canary == model)
    return list(connection.execute(select(columns.name).where(rule).order_by(columns.name)).scalars())


def certificate(served: ServedModel) -> dict[str, Any] | None:
    """What a model's compression cost, if it was compressed."""
    try:
        return manifest.read(served.engine.checkpoint).certificate
    except CheckpointError:
        return None


def demand_certificate(served: ServedModel) -> None:
    """Refuse a model whose certificate is past its thresholds.

    Raises:
        FidelityError: the figures are in its message.
    """
    found = certificate(served)
    if found is not None and not found.get("passed", False):
        change = found.get("bits_per_byte_change")
        raise FidelityError(
            f"the certificate of '{served.id}' is past its thresholds (bits per byte {change:+.2%}): it is not promoted"
            if isinstance(change, float)
            else f"the certificate of '{served.id}' is past its thresholds: it is not promoted"
        )


def _with(history: list[str], model: str) -> list[str]:
    return [*history, model][-MOST_HISTORY:]


def _change(connection: Connection, actor: Actor, row: Row, event: str, **values: Any) -> Row:
    connection.execute(update(tables.aliases).where(columns.name == row["name"]).values(**values))
    actor.log(
        connection,
        event,
        row["name"],
        **{name: values[name] for name in ("model", "canary", "percent") if name in values},
    )
    return {**row, **values}
