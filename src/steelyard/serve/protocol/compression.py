"""The shapes of compression jobs, in the manner of fine-tuning's. Methods that are not had here are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pydantic
from pydantic import Field

from steelyard.errors import RequestError
from steelyard.serve.protocol.fields import Fields, Metadata
from steelyard.serve.protocol.jobs import JobError, Suffix

COMING = ("prune", "distill")
"""Methods that are known and not had here."""

Row = dict[str, Any]


class Quantize(Fields):
    """Weights in 8 or 4 bits, activations in 8."""

    scheme: Literal["int8", "int4"] = "int8"
    group: Annotated[int, Field(ge=16, le=65536)] | None = None
    """Inputs that share a scale; see `steelyard compress quantize`, as of all others."""
    method: Literal["nearest", "smoothquant", "awq", "gptq"] | None = None
    """How weights are rounded; all but nearest need a calibration file."""
    portable: bool = False
    """Leave embedding and head as they are, for programs that expect it."""
    max_bits_per_byte: Annotated[float, Field(ge=0, le=1)] | None = None
    """Largest relative rise of bits per byte; past it the job fails."""
    max_kl: Annotated[float, Field(ge=0, le=100)] | None = None
    """Largest mean KL divergence in nats, if any."""
    calibration_file: str | None = None
    """A file of rows, as fine-tuning takes them, to judge by: less is lost."""

    @pydantic.model_validator(mode="after")
    def _whole(self) -> Quantize:
        needed = self.method not in (None, "nearest")
        if needed and self.calibration_file is None:
            raise RequestError(
                f"'{self.method}' judges by what layers read: give it a calibration file",
                param="method.quantize.calibration_file",
            )
        if self.method == "nearest" and self.calibration_file is not None:
            raise RequestError("'nearest' reads no calibration file", param="method.quantize.calibration_file")
        if self.scheme == "int8" and self.portable and self.group is not None:
            raise RequestError(
                "a portable int8 model has a scale per channel: leave out the group", param="method.quantize.group"
            )
        return self


class CompressionMethod(Fields):
    """How a model is made smaller."""

    type: Literal["quantize"]
    quantize: Quantize | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind in COMING:
            raise RequestError(
                f"'method.type' {kind} is not supported here: use quantize",
                param="method.type",
                code="unsupported_parameter",
            )
        return value


class CompressionRequest(Fields):
    """Ask for a job."""

    model: str
    method: CompressionMethod | None = None
    suffix: Suffix | None = None
    metadata: Metadata | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _possible(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("target") is not None:
            raise RequestError(
                "'target' is not supported here: say 'method'", param="target", code="unsupported_parameter"
            )
        return value

    @property
    def quantize(self) -> Quantize:
        """The method, whole."""
        return (self.method.quantize if self.method else None) or Quantize()


class CompressionJob(msgspec.Struct, frozen=True, kw_only=True):
    """A job."""

    id: str
    created_at: int
    error: JobError | None
    compressed_model: str | None
    """A model of its own, with its certificate in `GET /v1/models/{id}`."""
    finished_at: int | None
    model: str
    status: str
    metadata: dict[str, str] | None
    method: Row
    started_at: int | None
    user_provided_suffix: str | None
    object: Literal["compression.job"] = "compression.job"

    @classmethod
    def of(cls, row: Row) -> CompressionJob:
        """Of a row of the table."""
        same = ("id", "created_at", "finished_at", "model", "status", "metadata", "started_at")
        return cls(
            **{name: row[name] for name in same},
            error=None if row["error"] is None else JobError(**row["error"]),
            compressed_model=row["result_model"],
            method={"type": "quantize", **row["settings"]},
            user_provided_suffix=row["suffix"],
        )
