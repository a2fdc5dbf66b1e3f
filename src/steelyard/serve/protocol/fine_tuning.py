"""The shapes of fine-tuning jobs. Fields of OpenAI's that are not had here are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pydantic
from pydantic import Field

from steelyard.errors import RequestError
from steelyard.serve.protocol.fields import Fields, Metadata
from steelyard.serve.protocol.jobs import JobError, Suffix

Auto = Literal["auto"]

Row = dict[str, Any]


class Hyperparameters(Fields):
    """How to train."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] | None = None
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] | None = None
    learning_rate_multiplier: (
        Auto | Annotated[float, Field(gt=0, le=100)] | Annotated[int, Field(ge=1, le=100)] | None
    ) = None


class Supervised(Fields):
    """Learn the answers of the assistant."""

    hyperparameters: Hyperparameters | None = None


class PreferenceHyperparameters(Hyperparameters):
    """How to train on preferences."""

    beta: Auto | Annotated[float, Field(gt=0, le=10)] | Annotated[int, Field(ge=1, le=10)] | None = None


class Preference(Fields):
    """Learn which of two answers is preferred."""

    hyperparameters: PreferenceHyperparameters | None = None


class Method(Fields):
    """What is learnt, and how."""

    type: Literal["supervised", "dpo"]
    supervised: Supervised | None = None
    dpo: Preference | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind == "reinforcement":
            raise RequestError(
                f"'method.type' {kind} is not supported here: use supervised or dpo",
                param="method.type",
                code="unsupported_parameter",
            )
        return value

    @pydantic.model_validator(mode="after")
    def _its_own(self) -> Method:
        for name in ("supervised", "dpo"):
            if name != self.type and getattr(self, name) is not None:
                raise RequestError(f"'method.{name}' is not of the type '{self.type}'", param=f"method.{name}")
        return self

    @property
    def hyperparameters(self) -> Hyperparameters | None:
        """Those of its type."""
        settings = self.dpo if self.type == "dpo" else self.supervised
        return None if settings is None else settings.hyperparameters


class JobRequest(Fields):
    """Ask for a job."""

    model: str
    training_file: str
    validation_file: str | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    suffix: Suffix | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    metadata: Metadata | None = None
    integrations: list[Any] | None = Field(None, json_schema_extra={"maxItems": 0})

    @pydantic.model_validator(mode="after")
    def _possible(self) -> JobRequest:
        if self.integrations:
            raise RequestError(
                "'integrations' is not supported here: remove it", param="integrations", code="unsupported_parameter"
            )
        if self.method is not None and self.method.hyperparameters and self.hyperparameters:
            raise RequestError(
                f"'hyperparameters' and 'method.{self.method.type}.hyperparameters' exclude each other: use the second",
                param="hyperparameters",
            )
        return self

    @property
    def kind(self) -> str:
        """The method's type."""
        return "supervised" if self.method is None else self.method.type

    @property
    def asked(self) -> Row:
        """The hyperparameters, wherever they stand."""
        nested = self.method.hyperparameters if self.method else None
        empty = PreferenceHyperparameters() if self.kind == "dpo" else Hyperparameters()
        found = nested or self.hyperparameters or empty
        return {name: "auto" if value is None else value for name, value in found.model_dump().items()}


class FineTuningJob(msgspec.Struct, frozen=True, kw_only=True):
    """A job."""

    id: str
    created_at: int
    error: JobError | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: Row
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: str
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    estimated_finish: int | None
    integrations: list[Any]
    metadata: dict[str, str] | None
    method: Row
    started_at: int | None
    user_provided_suffix: str | None
    object: Literal["fine_tuning.job"] = "fine_tuning.job"

    @classmethod
    def of(cls, row: Row) -> FineTuningJob:
        """Of a row of the table."""
        method = row["settings"].get("method", "supervised")
        hyperparameters = {**row["settings"]["hyperparameters"], **row["resolved"]}
        over = row["status"] in ("succeeded", "failed", "cancelled")
        return cls(
            id=row["id"],
            created_at=row["created_at"],
            error=None if row["error"] is None else JobError(**row["error"]),
            fine_tuned_model=row["result_model"],
            finished_at=row["finished_at"],
            hyperparameters=hyperparameters,
            model=row["model"],
            organization_id="org-steelyard",
            result_files=row["result_files"],
            seed=row["seed"],
            status=row["status"],
            trained_tokens=row["trained_tokens"] if over else None,
            training_file=row["training_file"],
            validation_file=row["validation_file"],
            estimated_finish=None if over else row["estimated_finish"],
            integrations=[],
            metadata=row["metadata"],
            method={"type": method, method: {"hyperparameters": hyperparameters}},
            started_at=row["started_at"],
            user_provided_suffix=row["suffix"],
        )


class CheckpointMetrics(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was measured of a checkpoint."""

    step: int | None = None
    full_valid_loss: float | None = None
    validation_accuracy: float | None = None


class JobCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A model as it was at a step, callable by its name."""

    id: str
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"

    @classmethod
    def of(cls, row: Row) -> JobCheckpoint:
        """Of a row of the models' table."""
        found = row["metrics"]
        return cls(
            id=f"ftckpt_{row['job_id'].rpartition('-')[2]}_{row['step']}",
            created_at=row["created_at"],
            fine_tuned_model_checkpoint=row["id"],
            fine_tuning_job_id=row["job_id"],
            step_number=row["step"],
            metrics=CheckpointMetrics(row["step"], found.get("validation_loss"), found.get("validation_accuracy")),
        )
