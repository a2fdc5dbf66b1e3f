"""The shapes of compression jobs, in the manner of fine-tuning's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pydantic
from pydantic import Field

from steelyard.compress.search import goals
from steelyard.errors import ConfigError, RequestError
from steelyard.serve.protocol.fields import Fields, Metadata
from steelyard.serve.protocol.jobs import JobError, Suffix

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


class Prune(Fields):
    """Weights, or whole parts, that go; see `steelyard compress prune`."""

    method: Literal["magnitude", "wanda", "sparsegpt", "activation", "gradient", "divergence", "even"] | None = None
    """How they are judged; all but magnitude and even need a calibration file."""
    structure: Literal["blocks", "heads", "neurons"] | None = None
    rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    pattern: Annotated[str, Field(pattern=r"^\d{1,2}:\d{1,2}$")] | None = None
    max_bits_per_byte: Annotated[float, Field(ge=0, le=100)] | None = None
    max_kl: Annotated[float, Field(ge=0, le=100)] | None = None
    calibration_file: str | None = None

    @pydantic.model_validator(mode="after")
    def _whole(self) -> Prune:
        if self.rate is not None and self.pattern is not None:
            raise RequestError("rate and pattern exclude each other: leave one out", param="method.prune.pattern")
        reads = self.method not in ("magnitude", "even")
        if reads and self.calibration_file is None:
            raise RequestError(
                f"'{self.method or 'pruning'}' judges by what layers read: give it a calibration file",
                param="method.prune.calibration_file",
            )
        if not reads and self.calibration_file is not None:
            raise RequestError(f"'{self.method}' reads no calibration file", param="method.prune.calibration_file")
        of_weights = self.method in ("magnitude", "wanda", "sparsegpt")
        if self.method is not None and of_weights == (self.structure is not None):
            raise RequestError("structures and single weights are judged by other methods", param="method.prune.method")
        return self


class Distill(Fields):
    """Fewer blocks, which learn to go on as the model did."""

    training_file: str
    """What they learn from, as fine-tuning takes it."""
    rate: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the blocks that goes."""
    n_epochs: Annotated[int, Field(ge=1, le=50)] = 1
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 3e-4
    weight: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the loss that is the model's; the rest is the rows' own."""
    scheme: Literal["int8", "int4"] | None = "int8"
    """How what is left is quantised; null leaves it as it is."""
    max_bits_per_byte: Annotated[float, Field(ge=0, le=100)] = 0.1
    max_kl: Annotated[float, Field(ge=0, le=100)] | None = None


class CompressionMethod(Fields):
    """How a model is made smaller."""

    type: Literal["quantize", "prune", "distill"]
    quantize: Quantize | None = None
    prune: Prune | None = None
    distill: Distill | None = None

    @pydantic.model_validator(mode="after")
    def _one(self) -> CompressionMethod:
        for name in ("quantize", "prune", "distill"):
            if name != self.type and getattr(self, name) is not None:
                raise RequestError(f"'method.type' is {self.type}: leave '{name}' out", param=f"method.{name}")
        if self.type == "distill" and self.distill is None:
            raise RequestError("a training file is needed", param="method.distill.training_file")
        return self


FILE_OF = {"quantize": "calibration_file", "prune": "calibration_file", "distill": "training_file"}
"""The field of each method that names a file."""


class CompressionRequest(Fields):
    """Ask for a job."""

    model: str
    method: CompressionMethod | None = None
    target: dict[str, Annotated[str, Field(max_length=32)]] | None = None
    """Instead of a method: what is to be met, such as `{"size": "<=0.5x", "max_loss": "1%"}`."""
    calibration_file: str | None = None
    """With a target: rows to judge by; every fourth is held out, to measure on."""
    suffix: Suffix | None = None
    metadata: Metadata | None = None

    @pydantic.model_validator(mode="after")
    def _one(self) -> CompressionRequest:
        if self.target is None:
            if self.calibration_file is not None:
                raise RequestError("a method names its own file", param="calibration_file")
            return self
        if self.method is not None:
            raise RequestError("say 'method' or 'target', not both", param="target")
        if self.calibration_file is None:
            raise RequestError("a search judges and measures by rows: name a file", param="calibration_file")
        try:
            if not goals(self.goals):
                raise RequestError("a target has at least one measure", param="target")
        except ConfigError as error:
            raise RequestError(str(error), param="target") from None
        return self

    @property
    def goals(self) -> str:
        """The target as the command line has it."""
        target = self.target or {}
        return ",".join(f"{name}{'' if value[:1] in '<>=' else '='}{value}" for name, value in target.items())

    @property
    def settings(self) -> Row:
        """What a job's row keeps: the method's name and its settings, or the target."""
        if self.target is not None:
            return {"target": {"goals": self.goals, "asked": self.target, "calibration_file": self.calibration_file}}
        kind = self.method.type if self.method else "quantize"
        found = getattr(self.method, kind, None) or {"quantize": Quantize, "prune": Prune}[kind]()
        return {kind: found.model_dump()}

    @property
    def file(self) -> tuple[str | None, str]:
        """The file that is named, if one is, and by which field."""
        ((kind, asked),) = self.settings.items()
        if kind == "target":
            return self.calibration_file, "calibration_file"
        return asked[FILE_OF[kind]], f"method.{kind}.{FILE_OF[kind]}"


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
    method: Row | None
    target: dict[str, str] | None
    started_at: int | None
    user_provided_suffix: str | None
    object: Literal["compression.job"] = "compression.job"

    @classmethod
    def of(cls, row: Row) -> CompressionJob:
        """Of a row of the table."""
        ((kind, settings),) = row["settings"].items()
        searched = kind == "target"
        same = ("id", "created_at", "finished_at", "model", "status", "metadata", "started_at")
        return cls(
            **{name: row[name] for name in same},
            error=None if row["error"] is None else JobError(**row["error"]),
            compressed_model=row["result_model"],
            method=None if searched else {"type": kind, kind: settings},
            target=settings["asked"] if searched else None,
            user_provided_suffix=row["suffix"],
        )
