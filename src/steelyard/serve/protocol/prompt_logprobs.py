"""Log-probabilities of a prompt's tokens, in vLLM's shape: a list that begins with null, then an object per token."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from steelyard.infer.request import PromptLogprob


class RankedToken(msgspec.Struct, frozen=True):
    """A token that stood at a place of the prompt, or was likely there."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[int, RankedToken] | None]
"""By place, then by token id: the prompt's own token first."""


def prompt_logprobs(tokens: Sequence[PromptLogprob], likeliest: int) -> PromptLogprobs:
    """What the engine says of a prompt's tokens from the second on, with the `likeliest` tokens at each place."""
    places: PromptLogprobs = [None]
    for token in tokens:
        found = {token.token: RankedToken(token.logprob, token.rank, token.text)}
        for place, (id, text, value) in enumerate(token.top[:likeliest]):
            found.setdefault(id, RankedToken(value, place + 1, text))
        places.append(found)
    return places
