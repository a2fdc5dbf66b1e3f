"""From logits to the next token: biases, penalties and log-probabilities around the draw of `kernels/draw.py`.

A draw is keyed by (seed, choice, position) through a counter-based generator, so it depends on nothing else: not on
the batch, the chunking, nor on what was drawn before. Knows no cache and no text.
"""

# N rows that draw  V vocabulary

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from steelyard.errors import RequestError
from steelyard.infer.request import Sampling
from steelyard.kernels.draw import Draw, draw_tokens
from steelyard.kernels.library import Library

MAX = (1 << 31) - 1
TINY = torch.finfo(torch.float32).tiny  # a lower temperature is greedy
RANGES: dict[str, tuple[float, float]] = {
    "max_tokens": (0, MAX),
    "temperature": (0, MAX),
    "top_p": (0, 1),
    "top_k": (0, MAX),
    "min_p": (0, 1),
    "presence_penalty": (-MAX, MAX),
    "frequency_penalty": (-MAX, MAX),
    "logprobs": (0, MAX),
    "prompt_logprobs": (0, MAX),
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
    ceiling: NDArray[np.float32] | None = None
    """`[V]`: the most that a logit may be, `NEVER` for tokens that may not be drawn; None: all may."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token, its log-probability under the model itself, and the most likely ones at its place."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


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


@torch.inference_mode()
def draw(logits: torch.Tensor, rows: Sequence[Row], library: Library | None = None) -> list[Drawn | None]:
    """Draw one token per row.

    Args:
        logits: `[N, V]`, any float dtype; float32 ones are changed where a row has biases or penalties.
        rows: N.
        library: the native kernels; None draws in PyTorch, the same tokens.

    Returns:
        N; None for a row whose logits are not finite.
    """
    logits = logits.float().contiguous()
    logprobs = [_logprobs(logits[index], row.sampling.logprobs) for index, row in enumerate(rows)]
    for index, row in enumerate(rows):
        adjust(logits[index], row)
    tokens = draw_tokens(logits, [_keyed(row) for row in rows], library)
    return [
        None if token < 0 else Drawn(token, None if own is None else float(own[0][token]), own[1] if own else [])
        for token, own in zip(tokens, logprobs, strict=True)
    ]


def _keyed(row: Row) -> Draw:
    sampling = row.sampling
    return Draw(
        seed=row.seed,
        choice=row.choice,
        position=row.position,
        temperature=sampling.temperature if sampling.temperature >= TINY else 0.0,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        top_k=sampling.top_k,
    )


def _logprobs(logits: torch.Tensor, wanted: int | None) -> tuple[torch.Tensor, list[tuple[int, float]]] | None:
    """Log-probabilities `[V]` of the model itself, and the `wanted` likeliest tokens with theirs."""
    if wanted is None:
        return None
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(min(wanted, len(logits)))
    return logprobs, list(zip(tokens.tolist(), values.tolist(), strict=True))


def adjust(logits: torch.Tensor, row: Row) -> None:
    """Add a row's biases to its logits `[V]`, take off the penalties for what was generated (OpenAI's formula), and
    leave no chance to what is not allowed.
    """
    for token, bias in row.sampling.logit_bias.items():
        logits[token] += bias
    if row.counts and (row.sampling.presence_penalty or row.sampling.frequency_penalty):
        tokens = torch.tensor(list(row.counts))
        counts = torch.tensor(list(row.counts.values()), dtype=torch.float32)
        logits[tokens] -= row.sampling.frequency_penalty * counts + row.sampling.presence_penalty
    if row.ceiling is not None:
        values = logits.numpy()
        np.minimum(values, row.ceiling, out=values)
