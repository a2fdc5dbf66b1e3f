"""The shapes of usage, costs, prices and the ledger."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field

from steelyard.infer.sound import SOUND_RATE, TOKEN_SAMPLES
from steelyard.serve.billing.prices import MOST, PriceList
from steelyard.serve.protocol.fields import Fields

Row = dict[str, Any]
NanoDollars = Annotated[int, Field(ge=0, le=MOST)]


class PriceRequest(Fields):
    """What a model costs, in nano-dollars; what is not named costs nothing."""

    input: NanoDollars = 0
    cached_input: NanoDollars = 0
    output: NanoDollars = 0
    training: NanoDollars = 0
    storage: NanoDollars = 0
    explanation: NanoDollars = 0


class PricesRequest(Fields):
    """The whole list, by model; `*` is every model that is not named."""

    prices: Annotated[
        dict[Annotated[str, Field(min_length=1, max_length=256)], PriceRequest],
        Field(max_length=1000, json_schema_extra={"minProperties": 1}),
    ]


class Prices(msgspec.Struct, frozen=True):
    """The list that holds."""

    version: int
    created_at: int
    prices: dict[str, Any]
    unit: Literal["nano-dollars"] = "nano-dollars"
    object: Literal["organization.prices"] = "organization.prices"

    @classmethod
    def of(cls, prices: PriceList) -> Prices:
        """Of a version."""
        return cls(prices.version, prices.created_at, dict(prices.by_model))


class CompletionsUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What was used of models that complete texts."""

    input_tokens: int
    output_tokens: int
    input_cached_tokens: int
    input_uncached_tokens: int
    num_model_requests: int
    project_id: str | None = None
    api_key_id: str | None = None
    model: str | None = None
    batch: bool | None = None
    user_id: str | None = None
    service_tier: str | None = None
    object: Literal["organization.usage.completions.result"] = "organization.usage.completions.result"

    @classmethod
    def of(cls, row: Row) -> CompletionsUsage:
        """Of a row of a report."""
        return cls(
            input_tokens=row["input_tokens"],
            output_tokens=row["output_tokens"],
            input_cached_tokens=row["cached_tokens"],
            input_uncached_tokens=row["input_tokens"] - row["cached_tokens"],
            num_model_requests=row["requests"],
            **{name: row[name] for name in ("project_id", "api_key_id", "model", "batch") if name in row},
        )


class EmbeddingsUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What was used of models that embed texts."""

    input_tokens: int
    num_model_requests: int
    project_id: str | None = None
    api_key_id: str | None = None
    model: str | None = None
    user_id: str | None = None
    object: Literal["organization.usage.embeddings.result"] = "organization.usage.embeddings.result"

    @classmethod
    def of(cls, row: Row) -> EmbeddingsUsage:
        """Of a row of a report."""
        groups = {name: row[name] for name in ("project_id", "api_key_id", "model") if name in row}
        return cls(input_tokens=row["input_tokens"], num_model_requests=row["requests"], **groups)


class ExplanationsUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What was computed for explanations."""

    computed_tokens: int
    num_model_requests: int
    project_id: str | None = None
    api_key_id: str | None = None
    model: str | None = None
    object: Literal["organization.usage.explanations.result"] = "organization.usage.explanations.result"

    @classmethod
    def of(cls, row: Row) -> ExplanationsUsage:
        """Of a row of a report."""
        groups = {name: row[name] for name in ("project_id", "api_key_id", "model") if name in row}
        return cls(computed_tokens=row["input_tokens"], num_model_requests=row["requests"], **groups)


class TranscriptionsUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What was used of models that transcribe recordings."""

    seconds: int
    """Of sound, rounded up once."""
    num_model_requests: int
    project_id: str | None = None
    api_key_id: str | None = None
    model: str | None = None
    user_id: str | None = None
    object: Literal["organization.usage.audio_transcriptions.result"] = "organization.usage.audio_transcriptions.result"

    @classmethod
    def of(cls, row: Row) -> TranscriptionsUsage:
        """Of a row of a report."""
        groups = {name: row[name] for name in ("project_id", "api_key_id", "model") if name in row}
        seconds = -(-row["input_tokens"] * TOKEN_SAMPLES // SOUND_RATE)
        return cls(seconds=seconds, num_model_requests=row["requests"], **groups)


class Amount(msgspec.Struct, frozen=True):
    """Money, as OpenAI writes it."""

    value: float
    currency: Literal["usd"] = "usd"


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What was spent."""

    amount: Amount
    nano_dollars: int
    """The same, exactly."""
    project_id: str | None = None
    api_key_id: str | None = None
    line_item: str | None = None
    object: Literal["organization.costs.result"] = "organization.costs.result"

    @classmethod
    def of(cls, row: Row) -> Cost:
        """Of a row of a report."""
        groups = {name: row[name] for name in ("project_id", "api_key_id", "line_item") if name in row}
        return cls(amount=Amount(row["cost"] / 1e9), nano_dollars=row["cost"], **groups)


class Bucket(msgspec.Struct, frozen=True):
    """A span of time."""

    start_time: int
    end_time: int
    results: list[Any]
    object: Literal["bucket"] = "bucket"


class BucketPage(msgspec.Struct, frozen=True):
    """Some spans, and where the next begin."""

    data: list[Bucket]
    has_more: bool
    next_page: str | None
    object: Literal["page"] = "page"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of the ledger, which is its own receipt: with the chain's key anybody can check it."""

    sequence: int
    created_at: int
    kind: str
    reference: str
    project_id: str
    api_key_id: str | None
    model: str
    service: str
    batch: bool
    month: str
    amount: int
    cost: int
    price_version: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    training_tokens: int
    note: str
    mac: str
    object: Literal["organization.ledger.entry"] = "organization.ledger.entry"

    @classmethod
    def of(cls, row: Row) -> Entry:
        """Of a row of the table."""
        same = {name: row[name] for name in cls.__struct_fields__ if name in row and name != "mac"}
        return cls(created_at=row["at"], api_key_id=row["key_id"], mac=row["mac"].hex(), **same)


class Head(msgspec.Struct, frozen=True):
    """How far a chain goes."""

    sequence: int
    mac: str


class LedgerPage(msgspec.Struct, frozen=True):
    """Some entries, newest first; the sum of all amounts is the balance."""

    data: list[Entry]
    has_more: bool
    head: Head
    object: Literal["list"] = "list"
