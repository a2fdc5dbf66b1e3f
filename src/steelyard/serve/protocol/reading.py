"""`/v1/embeddings` in OpenAI's shape, `/v1/classify`, `/v1/score` and `/v1/rerank` in vLLM's, `/v1/tag` in ours."""

from __future__ import annotations

from typing import Annotated, Generic, Literal, TypeVar

import msgspec
import pydantic
from pydantic import Field

from steelyard.errors import RequestError
from steelyard.serve.protocol.examples import MOST_EXAMPLES, Example
from steelyard.serve.protocol.explanations import Explained, Wanted, options
from steelyard.serve.protocol.fields import Fields

MOST_TEXTS = 2048
MOST_PAIRS = 1024
MOST_PATHS = 64
MOST_EXPLAINED = 16
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MOST_TEXTS)]
Pairs = Annotated[list[Text], Field(min_length=1, max_length=MOST_PAIRS)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1)]
Several = Texts | Tokens | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_TEXTS)]
Words = Annotated[list[Text], Field(min_length=1, max_length=4096)]


class ReadingFields(Fields):
    """What all of these have in common."""

    stored = False
    model: str
    user: Annotated[str, Field(max_length=512)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None


class EmbeddingsRequest(ReadingFields):
    """Texts, or their tokens, of which embeddings are wanted."""

    input: Annotated[str, Field(min_length=1)] | Several
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    """Only the first so many, made of length 1 again."""

    @property
    def texts(self) -> list[str | list[int]]:
        """One after the other."""
        if isinstance(self.input, str):
            return [self.input]
        numbers = [one for one in self.input if isinstance(one, int)]
        return [numbers] if numbers else [one for one in self.input if not isinstance(one, int)]


class ClassifyRequest(ReadingFields):
    """Texts, or examples, of which the class is wanted."""

    input: Text | Texts | Example | Annotated[list[Example], Field(min_length=1, max_length=MOST_EXAMPLES)]
    explain: Wanted | None = None
    """Why it is that class."""

    @property
    def given(self) -> list[str | Example]:
        """One after the other."""
        return [*self.input] if isinstance(self.input, list) else [self.input]

    @pydantic.model_validator(mode="after")
    def _few(self) -> ClassifyRequest:
        if self.explain and len(self.given) > MOST_EXPLAINED:
            raise RequestError(f"'explain' is for {MOST_EXPLAINED} inputs at most", param="explain")
        wanted = options(self.explain)
        for field in ("lens", "against"):
            if wanted is not None and getattr(wanted, field):
                raise RequestError(f"'explain.{field}' is for models that write", param=f"explain.{field}")
        return self


class ScoreRequest(ReadingFields):
    """Pairs of texts whose likeness is wanted: one with each of several, or one by one."""

    text_1: Text | Pairs
    text_2: Text | Pairs

    @pydantic.model_validator(mode="after")
    def _pairs(self) -> ScoreRequest:
        first, second = self.first, self.second
        if len(first) not in (1, len(second)):
            reason = f"'text_1' has {len(first)} texts and 'text_2' {len(second)}: give one, or as many"
            raise RequestError(reason, param="text_1")
        return self

    @property
    def first(self) -> list[str]:
        """Texts of `text_1`."""
        return [self.text_1] if isinstance(self.text_1, str) else self.text_1

    @property
    def second(self) -> list[str]:
        """Texts of `text_2`."""
        return [self.text_2] if isinstance(self.text_2, str) else self.text_2


class RerankRequest(ReadingFields):
    """Documents in the order of their likeness to a question."""

    query: Text
    documents: Pairs
    top_n: Annotated[int, Field(ge=0)] | None = None
    """Absent or 0: all."""


class TagRequest(ReadingFields):
    """Sentences whose words are tagged: texts, which are parted into words, or words."""

    input: Text | Texts | Annotated[list[Words], Field(min_length=1, max_length=MOST_TEXTS)]
    n: Annotated[int, Field(ge=1, le=MOST_PATHS)] | None = None
    """Sequences of tags, the likeliest first."""


class ReadingUsage(msgspec.Struct, frozen=True):
    """What was read."""

    prompt_tokens: int
    total_tokens: int
    cost: float
    """Dollars."""


class Embedding(msgspec.Struct, frozen=True):
    """Of one text, of length 1."""

    index: int
    embedding: list[float] | str
    """Or its float32 in base64, little-endian."""
    object: Literal["embedding"] = "embedding"


class Embeddings(msgspec.Struct, frozen=True):
    """Of all texts, in their order."""

    data: list[Embedding]
    model: str
    usage: ReadingUsage
    object: Literal["list"] = "list"


class Class(msgspec.Struct, frozen=True):
    """Of one text."""

    index: int
    label: str
    """The likeliest."""
    probs: list[float]
    """Of every class, in the order of `labels`."""
    num_classes: int
    explanation: Explained | msgspec.UnsetType = msgspec.UNSET
    """There if it was asked for."""
    explanation_error: str | msgspec.UnsetType = msgspec.UNSET
    """Why there is none, though it was asked for: the answer is there, and paid for."""


class Classes(msgspec.Struct, frozen=True):
    """Of all texts, in their order."""

    id: str
    created: int
    model: str
    labels: list[str]
    """The model's classes."""
    data: list[Class]
    usage: ReadingUsage
    object: Literal["list"] = "list"


class Score(msgspec.Struct, frozen=True):
    """Of one pair."""

    index: int
    score: float
    """Cosine of both embeddings."""
    object: Literal["score"] = "score"


class Document(msgspec.Struct, frozen=True):
    """What was given."""

    text: str


class Ranked(msgspec.Struct, frozen=True):
    """A document."""

    index: int
    """Its place among those that were given."""
    document: Document
    relevance_score: float


class Ranking(msgspec.Struct, frozen=True):
    """Documents, the likest first."""

    id: str
    model: str
    results: list[Ranked]
    usage: ReadingUsage


class TaggedWord(msgspec.Struct, frozen=True):
    """A word of the likeliest sequence."""

    word: str
    tag: str
    probability: float
    """Of this tag, whatever the others are."""
    start: int
    """Characters before it in the text; of words, in all of them with spaces between."""
    end: int


class TagSequence(msgspec.Struct, frozen=True):
    """Tags of all words."""

    tags: list[str]
    logprob: float


class TaggedText(msgspec.Struct, frozen=True):
    """Of one text."""

    index: int
    words: list[TaggedWord]
    sequences: list[TagSequence]


Item = TypeVar("Item")


class Readings(msgspec.Struct, Generic[Item], frozen=True):
    """What was found, a row for each text or pair in their order."""

    id: str
    created: int
    model: str
    data: list[Item]
    usage: ReadingUsage
    object: Literal["list"] = "list"
