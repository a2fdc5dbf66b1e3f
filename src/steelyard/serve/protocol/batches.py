"""The shapes of batches."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from steelyard.serve.protocol.fields import Fields, Metadata

Row = dict[str, Any]
MOMENTS = (
    "in_progress_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)


class BatchRequest(Fields):
    """Ask for a batch."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/responses", "/v1/completions", "/v1/embeddings"]
    completion_window: Literal["24h"]
    metadata: Metadata | None = None


class BatchError(msgspec.Struct, frozen=True):
    """What is wrong with the input."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(msgspec.Struct, frozen=True):
    """All of it."""

    data: list[BatchError]
    object: Literal["list"] = "list"


class Counts(msgspec.Struct, frozen=True):
    """How far it is."""

    total: int
    completed: int
    failed: int


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch."""

    id: str
    endpoint: str
    input_file_id: str
    status: str
    errors: BatchErrors | None
    output_file_id: str | None
    error_file_id: str | None
    model: str | None
    request_counts: Counts
    metadata: dict[str, str] | None
    created_at: int
    expires_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    completion_window: Literal["24h"] = "24h"
    object: Literal["batch"] = "batch"

    @classmethod
    def of(cls, row: Row) -> Batch:
        """Of a row of the table."""
        same = ("id", "endpoint", "input_file_id", "status", "output_file_id", "error_file_id", "model", "metadata")
        errors = [BatchError(**error) for error in row["errors"]]
        return cls(
            **{name: row[name] for name in (*same, "created_at", "expires_at")},
            **{name: row["moments"].get(name) for name in MOMENTS},
            errors=BatchErrors(errors) if errors else None,
            request_counts=Counts(row["total"], row["completed"], row["failed"]),
        )
