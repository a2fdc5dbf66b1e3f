"""From logits to the next token: greedy, temperature, top-k, top-p, min-p; penalties, biases and log-probabilities.

A draw is keyed by (seed, choice, position) through a counter-based generator (Philox; Salmon et al. 2011), so it
depends on nothing else: not on the batch, the chunking, nor on what was drawn before. Knows no cache and no text.
"""

# N rows that draw  V vocabulary

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from steelyard.errors import RequestError
from steelyard.infer.request import Sampling

MAX = (1 << 31) - 1
RANGES: dict[str, tuple[float, float]] = {
    "max_tokens": (1, MAX),
    "temperature": (0, MAX),
    "top_p": (0, 1),
    "top_k": (0, MAX),
    "min_p": (0, 1),
    "presence_penalty": (-MAX, MAX),
    "frequency_penalty": (-MAX, MAX),
    "logprobs": (0, MAX),
}
"""What each field may be, both ends included."""


@dataclass(frozen=True, slots=True)
class Row:
    """What a row's draw depends on besides its logits."""

    sampling: Sampling
    seed: int
    choice: int
    position: int
    counts: Mapping[int, int]
    """How often each token was generated in this choice."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token, its log-probability under the model itself, and the most likely ones at its place."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on its three arguments alone: 53 bits of Philox 4x64."""
    key, counter = np.array([seed, choice], np.uint64), np.array([position, 0, 0, 0], np.uint64)
    bits = np.random.Philox(key=key, counter=counter).random_raw()
    return int(bits >> 11) * 2.0**-53


def check(sampling: Sampling) -> None:
    """Refuse what `draw` cannot compute.

    Raises:
        RequestError: the field is named.
    """
    for field, (least, most) in RANGES.items():
        value = getattr(sampling, field)
        if value is not None and not least <= value <= most:  # written so that NaN fails it, too
            raise RequestError(f"{field} must be {least} to {most}, not {value}", param=field)
    if not all(math.isfinite(bias) for bias in sampling.logit_bias.values()):
        raise RequestError("logit_bias must be finite", param="logit_bias")


def draw(logits: torch.Tensor, rows: list[Row]) -> list[Drawn | None]:
    """Draw one token per row.

    Args:
        logits: `[N, V]`, any float dtype.
        rows: N.

    Returns:
        N; None for a row whose logits are not finite.
    """
    logits = logits.float()
    finite = logits.isfinite().all(-1).tolist()
    greedy = logits.argmax(-1).tolist()
    drawn: list[Drawn | None] = []
    for index, row in enumerate(rows):
        if not finite[index]:
            drawn.append(None)
            continue
        plain = not (row.sampling.logit_bias or row.sampling.presence_penalty or row.sampling.frequency_penalty)
        if row.sampling.temperature == 0 and plain:
            token = greedy[index]
        else:
            token = _draw_row(logits[index] if plain else adjust(logits[index], row), row)
        drawn.append(_with_logprobs(token, logits[index], row.sampling.logprobs))
    return drawn


def adjust(logits: torch.Tensor, row: Row) -> torch.Tensor:
    """Logits `[V]` with biases added and penalties for what was generated taken off (OpenAI's formula)."""
    logits = logits.clone()
    for token, bias in row.sampling.logit_bias.items():
        logits[token] += bias
    if row.counts and (row.sampling.presence_penalty or row.sampling.frequency_penalty):
        tokens = torch.tensor(list(row.counts))
        counts = torch.tensor(list(row.counts.values()), dtype=torch.float32)
        logits[tokens] -= row.sampling.frequency_penalty * counts + row.sampling.presence_penalty
    return logits


def _draw_row(logits: torch.Tensor, row: Row) -> int:
    if row.sampling.temperature == 0:
        return int(logits.argmax())
    tokens, probabilities = candidates(logits, row.sampling)
    cumulative = probabilities.cumsum(0)
    target = uniform(row.seed, row.choice, row.position) * float(cumulative[-1])
    place = int(torch.searchsorted(cumulative, target, right=True))
    # Rounding can put the target on the last sum: take the last candidate that has any weight.
    place = min(place, int(probabilities.nonzero()[-1]))
    return place if tokens is None else int(tokens[place])


def candidates(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The tokens that may be drawn, and their weights in float64 (not renormalised).

    Temperature first, then top-k, top-p (Holtzman et al. 2020: the smallest set that reaches p) and min-p
    (Nguyen et al. 2024: at least p times the most likely).

    Returns:
        Token ids in falling order of probability, or None for all of them in their own order; and the weights.
    """
    # The largest is 0 before the division: the smallest temperature cannot make it overflow.
    probabilities = ((logits.double() - logits.max().double()) / sampling.temperature).softmax(-1)
    tokens = None
    if 0 < sampling.top_k < len(logits):
        probabilities, tokens = probabilities.topk(sampling.top_k)
    elif sampling.top_p < 1 or sampling.min_p > 0:
        probabilities, tokens = probabilities.sort(descending=True, stable=True)
    if sampling.top_p < 1:
        # Those before which the sum has not reached p yet; the first always stays.
        total = probabilities.sum()
        before = probabilities.cumsum(0) - probabilities
        beyond = before >= sampling.top_p * total
        beyond[0] = False
        probabilities = probabilities.masked_fill(beyond, 0.0)
    if sampling.min_p > 0:
        probabilities = torch.where(probabilities >= sampling.min_p * probabilities[0], probabilities, 0.0)
    return tokens, probabilities


def _with_logprobs(token: int, logits: torch.Tensor, wanted: int | None) -> Drawn:
    if wanted is None:
        return Drawn(token, None, [])
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(min(wanted, len(logits)))
    top = list(zip(tokens.tolist(), values.tolist(), strict=True))
    return Drawn(token, float(logprobs[token]), top)
