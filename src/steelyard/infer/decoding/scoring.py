"""How likely given tokens are: the log-probabilities of a prompt. Knows no cache and no text."""

# N tokens that are scored  V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Scored:
    """A token's log-probability, its place among all tokens (1: the likeliest), and the likeliest ones."""

    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


@torch.inference_mode()
def score(logits: torch.Tensor, tokens: Sequence[int], likeliest: int) -> list[Scored] | None:
    """Score tokens under the model itself.

    Args:
        logits: `[N, V]`, any float dtype: what the model expected at each token's place.
        tokens: N.
        likeliest: how many of the likeliest tokens to name at each place.

    Returns:
        N; None if any log-probability of them is not finite.
    """
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(tokens, dtype=torch.int64)[:, None])
    if not own.isfinite().all():
        return None
    ranks = (logprobs > own).sum(-1) + 1
    values, places = logprobs.topk(min(likeliest, logprobs.shape[1]), dim=-1)
    tops = [list(zip(*pair, strict=True)) for pair in zip(places.tolist(), values.tolist(), strict=True)]
    return [Scored(*found) for found in zip(tokens, own[:, 0].tolist(), ranks.tolist(), tops, strict=True)]
