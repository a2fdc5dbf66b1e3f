"""Every exception that a user can meet, and what it becomes at the two edges.

    SteelyardError
    ├── ConfigError               a setting is unknown, missing or out of range
    ├── DataError                 a row of somebody's data: file, line, field, reason
    ├── SourceError               a source cannot be reached or does not exist
    ├── ArtifactError             bytes that are not what they claim to be
    │   ├── UnsafeArtifactError   a format that runs code when it is read (pickle)
    │   ├── DamagedError          stored bytes that were altered or cut off
    │   ├── LongSoundError        a recording that lasts longer than is taken
    │   └── LargePictureError     an image of more pixels than are taken
    ├── CheckpointError           a checkpoint is missing, incomplete or altered
    ├── TemplateError             a chat template failed or passed its limits
    ├── TrainingError             a run that cannot go on
    ├── FidelityError             a certificate is past its thresholds
    ├── RequestError              a request that is wrong: parameter, code
    │   ├── AuthenticationError   no key, or not ours
    │   ├── PermissionDeniedError a key that may not do this
    │   ├── ModelNotFoundError    no such model here
    │   ├── NotFoundError         no such thing of this project's
    │   ├── PathNotFoundError     no such path or method here
    │   ├── ConflictError         not in the state that this needs
    │   ├── PayloadTooLargeError  a body over the limit
    │   ├── RateLimitError        too much in a minute, or at once
    │   └── QuotaError            the project's budget does not cover it
    ├── EngineUnavailableError    the engine is starting, restarting or full
    └── StorageError              the database or the artifacts cannot be reached
        └── StorageFullError      there is no room left on the disk

A message says what was wrong, where, and what to do next, in one line. Bugs of our own are `assert`s
and plain exceptions: they are not in this tree and become exit code 70 and HTTP 500.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class SteelyardError(Exception):
    """Root of everything that is the user's to see."""


class ConfigError(SteelyardError):
    """A setting is unknown, missing or out of range."""


class DataError(SteelyardError):
    """A row of data is wrong.

    Args:
        reason: what is wrong and what would be right.
        file: the file it stands in, if there is one.
        line: 1-based line number.
        field: path of the field within the row, such as `messages[1].role`.
    """

    def __init__(
        self,
        reason: str,
        *,
        file: Path | str | None = None,
        line: int | None = None,
        field: str | None = None,
    ) -> None:
        self.reason, self.file, self.line, self.field = reason, file, line, field
        where = "" if file is None else f"{file}: "
        where = where if line is None else f"{where[:-2]}:{line}: " if where else f"line {line}: "
        super().__init__(where + ("" if field is None else f"field '{field}': ") + reason)


class SourceError(SteelyardError):
    """A source cannot be reached or does not exist."""


class ArtifactError(SteelyardError):
    """Bytes that are not what they claim to be: truncated, lying about a length, unknown."""


class UnsafeArtifactError(ArtifactError):
    """A format that executes code when it is read. Steelyard never opens one."""


class DamagedError(ArtifactError):
    """What was stored here is not what was stored: altered, cut off, or sealed by another key. It stays so."""


class LargePictureError(ArtifactError):
    """An image of more pixels than are taken."""


class LongSoundError(ArtifactError):
    """A recording that lasts longer than is taken."""


class CheckpointError(SteelyardError):
    """A checkpoint is missing, incomplete or not what its digest says."""


class TemplateError(SteelyardError):
    """A chat template failed, or passed its limits of time, memory or output."""


class TrainingError(SteelyardError):
    """A training run cannot go on."""


class FidelityError(SteelyardError):
    """A certificate is past its thresholds; the measured figures are in the message."""


class RequestError(SteelyardError):
    """A request that is wrong.

    Args:
        message: what is wrong.
        param: the field at fault, in OpenAI's sense.
        code: a stable machine-readable code.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        self.param, self.code = param, code
        super().__init__(message)


class AuthenticationError(RequestError):
    """No key, or a key that is not ours."""


class ModelNotFoundError(RequestError):
    """No such model is served here."""


class PermissionDeniedError(RequestError):
    """The key is known, and its scopes do not allow this."""


class NotFoundError(RequestError):
    """No such thing, or another project's: nobody can tell which."""


class ConflictError(RequestError):
    """The thing is not in the state that this needs."""


class RateLimitError(RequestError):
    """Too much in a minute, or at once: again after `retry_after` seconds.

    Args:
        message: which limit.
        retry_after: seconds until there is room.
    """

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        self.retry_after = retry_after
        super().__init__(message, code="rate_limit_exceeded")


class QuotaError(RequestError):
    """The project's budget does not cover what this may cost."""


class PathNotFoundError(RequestError):
    """No such path, or not with this method."""


class PayloadTooLargeError(RequestError):
    """The body is over the limit."""


class EngineUnavailableError(SteelyardError):
    """The engine is starting, restarting or full: try again after `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class StorageError(SteelyardError):
    """The database or the artifacts cannot be reached; nothing was changed."""

    retry_after = 1


class StorageFullError(StorageError):
    """There is no room left on the disk; nothing was changed."""


@dataclass(frozen=True, slots=True)
class Edge:
    """What an error becomes: a process exit code, and OpenAI's status, type and default code."""

    exit_code: int
    status: int
    type: str
    code: str | None = None


# One table for both edges; the nearest class in the error's MRO wins.
EDGES: dict[type[BaseException], Edge] = {
    SteelyardError: Edge(1, 500, "server_error"),
    ConfigError: Edge(2, 400, "invalid_request_error", "invalid_config"),
    DataError: Edge(3, 400, "invalid_request_error", "invalid_data"),
    SourceError: Edge(4, 400, "invalid_request_error", "source_unavailable"),
    ArtifactError: Edge(5, 400, "invalid_request_error", "invalid_artifact"),
    DamagedError: Edge(5, 500, "server_error", "storage_damaged"),
    LongSoundError: Edge(5, 413, "invalid_request_error", "audio_too_long"),
    LargePictureError: Edge(5, 413, "invalid_request_error", "image_too_large"),
    CheckpointError: Edge(6, 500, "server_error", "checkpoint_invalid"),
    TemplateError: Edge(7, 400, "invalid_request_error", "template_failed"),
    TrainingError: Edge(8, 500, "server_error", "training_failed"),
    FidelityError: Edge(9, 409, "invalid_request_error", "certificate_failed"),
    RequestError: Edge(10, 400, "invalid_request_error"),
    AuthenticationError: Edge(10, 401, "invalid_request_error", "invalid_api_key"),
    ModelNotFoundError: Edge(10, 404, "invalid_request_error", "model_not_found"),
    PermissionDeniedError: Edge(10, 403, "invalid_request_error", "insufficient_permissions"),
    NotFoundError: Edge(10, 404, "invalid_request_error", "not_found"),
    PathNotFoundError: Edge(10, 404, "invalid_request_error", "not_found"),
    ConflictError: Edge(10, 409, "invalid_request_error", "conflict"),
    RateLimitError: Edge(10, 429, "rate_limit_error", "rate_limit_exceeded"),
    QuotaError: Edge(10, 429, "insufficient_quota", "insufficient_quota"),
    PayloadTooLargeError: Edge(10, 413, "invalid_request_error", "payload_too_large"),
    EngineUnavailableError: Edge(11, 503, "server_error", "engine_unavailable"),
    StorageError: Edge(12, 503, "server_error", "storage_unavailable"),
    StorageFullError: Edge(12, 507, "server_error", "storage_full"),
}
BUG = Edge(70, 500, "server_error", "internal_error")


def edge(error: BaseException) -> Edge:
    """What `error` becomes at the command line and over HTTP."""
    return next((EDGES[kind] for kind in type(error).__mro__ if kind in EDGES), BUG)
