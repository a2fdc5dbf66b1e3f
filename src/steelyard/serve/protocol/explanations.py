"""`explain` of chats and classes: what may be asked, and how an explanation is told. Ours."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pydantic
from pydantic import Field

from steelyard.errors import RequestError
from steelyard.infer.request import Explain, Faithfulness, Method
from steelyard.serve.protocol.fields import Fields

MOST_LENS, MOST_AGAINST = 10, 64


class ExplainOptions(Fields):
    """How something is explained."""

    method: Method | None = None
    """Default: `lrp`, or what the quality says."""
    quality: Literal["standard", "high"] | None = None
    """`high`: by occlusion, a pass for every token."""
    faithfulness: bool | None = None
    """Whether it is measured how far the shares can be believed; default: it is."""
    against: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=1 << 12)]], Field(max_length=MOST_AGAINST)] | None
    ) = None
    """Of a model that writes: what else it could have answered, such as the other labels; why it is none of these."""
    lens: Annotated[int, Field(ge=0, le=MOST_LENS)] | None = None
    """Of a model that writes: how many of the likeliest next tokens each layer tells."""

    @pydantic.model_validator(mode="after")
    def _one_way(self) -> ExplainOptions:
        if self.quality == "high" and self.method not in (None, "occlusion"):
            raise RequestError("'quality' high is by occlusion: leave 'method' out, or 'quality'", param="quality")
        return self

    def asked(self, **more: Any) -> Explain:
        """What the engine is told."""
        method = self.method or ("occlusion" if self.quality == "high" else "lrp")
        return Explain(method=method, faithfulness=self.faithfulness is not False, lens=self.lens or 0, **more)


Wanted = Annotated[ExplainOptions | bool, Field(union_mode="left_to_right")]
"""`explain` of a request: true, or how."""


def options(wanted: bool | ExplainOptions | None) -> ExplainOptions | None:
    """How; None: not at all."""
    if isinstance(wanted, ExplainOptions):
        return wanted
    return ExplainOptions() if wanted else None


class ExplainedToken(msgspec.Struct, frozen=True):
    """A token of what was read."""

    token: str
    start: int
    """Characters of the text before it."""
    end: int
    share: float | None
    """In nats of the value; null: it is no unit, such as a template's."""


class ExplainedUnit(msgspec.Struct, frozen=True):
    """A part of an example that is more than a text."""

    kind: str
    """text, image or audio."""
    unit: str
    """A token; a patch as row,column; when a moment begins."""
    share: float


class ExplainedTarget(msgspec.Struct, frozen=True):
    """What is explained."""

    text: str
    """A class, or an answer."""
    tokens: list[str] | msgspec.UnsetType = msgspec.UNSET
    """Of an answer."""


class Believed(msgspec.Struct, frozen=True):
    """How far the shares can be believed, and the same of orders drawn at random."""

    found: Faithfulness
    random: Faithfulness


class Likely(msgspec.Struct, frozen=True):
    """A token that a layer would say next."""

    token: str
    probability: float


class Neighbour(msgspec.Struct, frozen=True):
    """A row that a model learnt from."""

    file: str
    line: int
    text: str
    cosine: float
    """Of the gradients: above 0 learning it made what is explained likelier."""


class ExplanationUsage(msgspec.Struct, frozen=True):
    """What was computed."""

    computed_tokens: int
    cost: float
    """Dollars."""


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """Each token's share in what the model says."""

    method: Method
    baseline: str
    """What is there instead of a token that is taken away."""
    target: ExplainedTarget
    text: str
    """What offsets refer to."""
    tokens: list[ExplainedToken]
    units: list[ExplainedUnit] | msgspec.UnsetType = msgspec.UNSET
    """Instead of tokens, where more than a text is read."""
    value: float
    """What the shares are of: log-odds of the class, or the answer's centred logits; by occlusion a log-probability."""
    base: float
    """Of nothing, where the method compares with it."""
    rest: float
    """The share of what is no unit."""
    residual: float
    """What the shares do not account for: 0 is complete."""
    faithfulness: Believed | None
    lens: list[list[Likely]] | msgspec.UnsetType = msgspec.UNSET
    """Of the embedding and of each layer."""
    nearest: list[Neighbour] | msgspec.UnsetType = msgspec.UNSET
    """The likest first."""
    usage: ExplanationUsage
