"""How many tokens an answer took, and why a choice ended, in OpenAI's words."""

from __future__ import annotations

from typing import Literal

import msgspec

Finish = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Where prompt tokens came from."""

    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """What completion tokens went to."""

    rejected_prediction_tokens: int | msgspec.UnsetType = msgspec.UNSET
    """Of beam search: beginnings that did not come back."""
    reasoning_tokens: int | msgspec.UnsetType = msgspec.UNSET
    """Of thoughts."""


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request: every prompt once, every choice."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()
    cost: float = 0.0
    """Dollars, of the entry in the ledger; whole nano-dollars."""
    completion_tokens_details: CompletionTokensDetails | msgspec.UnsetType = msgspec.UNSET
    """There if beams were searched, or the model thought."""
