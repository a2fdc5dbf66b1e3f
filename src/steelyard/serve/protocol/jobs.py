"""The shapes that every kind of job has."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field

Suffix = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9 _-]+$")]
"""What a customer adds to the name of what a job makes."""

Row = dict[str, Any]


class JobError(msgspec.Struct, frozen=True):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class JobEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened."""

    id: str
    created_at: int
    level: str
    message: str
    type: str
    data: Any
    object: Literal["fine_tuning.job.event", "compression.job.event"]

    @classmethod
    def of(cls, row: Row, kind: Literal["fine_tuning", "compression"]) -> JobEvent:
        """Of a row of the table."""
        values = {name: row[name] for name in ("id", "created_at", "level", "message", "type", "data")}
        return cls(**values, object=f"{kind}.job.event")  # type: ignore[arg-type]
