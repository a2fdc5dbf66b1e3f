"""The audit log: who changed what, in a hash chain like the ledger's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from steelyard.store import chain, tables


@dataclass(frozen=True)
class Actor:
    """Who changes something, and when."""

    id: str
    """A key's id, or `cli`."""
    now: int
    """Unix seconds."""
    key: bytes
    """Of the chain."""

    def log(
        self, connection: Connection, event: str, target: str, project_id: str | None = None, **detail: Any
    ) -> None:
        """Add an entry, in the transaction of the change itself."""
        head = chain.lock(connection, tables.audit)
        row = {
            "at": self.now,
            "event": event,
            "actor": self.id,
            "project_id": project_id,
            "target": target,
            "detail": detail,
        }
        chain.append(connection, self.key, tables.audit, head, [row])
