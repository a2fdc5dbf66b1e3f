"""Drawing tokens from logits: as the native code reads it, and the twin in PyTorch."""

# N rows  V vocabulary

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from steelyard.kernels import reference
from steelyard.kernels.library import Library

NEVER = -1e9
"""A logit that is never drawn; finite, as all have to be."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What a row's draw depends on besides its logits."""

    seed: int
    """0 to 2**64 - 1."""
    choice: int
    position: int
    temperature: float
    """0 is greedy."""
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    """0: all."""


class NativeDraw(ctypes.Structure):
    """As `Draw` in sample.h."""

    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("choice", ctypes.c_uint64),
        ("position", ctypes.c_uint64),
        ("temperature", ctypes.c_float),
        ("top_p", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("top_k", ctypes.c_int32),
    ]


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on its three arguments alone: 53 bits of Philox 4x64 (Salmon et al. 2011)."""
    key, counter = np.array([seed, choice], np.uint64), np.array([position, 0, 0, 0], np.uint64)
    bits = np.random.Philox(key=key, counter=counter).random_raw()
    return int(bits >> 11) * 2.0**-53


def draw_tokens(logits: torch.Tensor, draws: Sequence[Draw], library: Library | None) -> list[int]:
    """One token per row of logits `[N, V]` float32; -1 for a row that is not finite.

    Args:
        logits: contiguous.
        draws: N.
        library: the kernels; None runs the twin.
    """
    if library is None:
        finite = logits.isfinite().all(-1).tolist()
        return [draw_row(row, draw) if whole else -1 for row, draw, whole in zip(logits, draws, finite, strict=True)]
    native = (NativeDraw * len(draws))()
    for place, d in enumerate(draws):
        native[place] = NativeDraw(d.seed, d.choice, d.position, d.temperature, d.top_p, d.min_p, d.top_k)
    tokens = torch.empty(len(draws), dtype=torch.int32)
    library.draw(logits, ctypes.addressof(native), tokens)
    found: list[int] = tokens.tolist()
    return found


def draw_row(logits: torch.Tensor, draw: Draw) -> int:
    """The twin: one row `[V]` float32, all finite."""
    if draw.temperature == 0:
        return int(logits.argmax())
    tokens, weights = candidates(logits, draw)
    cumulative = weights.cumsum(0)
    target = uniform(draw.seed, draw.choice, draw.position) * float(cumulative[-1])
    place = int(torch.searchsorted(cumulative, target, right=True))
    # Rounding can put the target on the last sum: take the last candidate that has any weight.
    return int(tokens[min(place, int(weights.nonzero()[-1]))])


def candidates(logits: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that may be drawn, and their weights in float64 (not normalised).

    Temperature first, then top-k, top-p (Holtzman et al. 2020: the smallest set that reaches p) and min-p
    (Nguyen et al. 2024: at least p times the likeliest). With a filter in falling order of weight, of equals the
    lower token first; without one in the order of the vocabulary.
    """
    temperature = torch.tensor(draw.temperature, dtype=torch.float32)
    # The largest is 0 before the division: the smallest temperature cannot make it overflow.
    weights = reference.exp((logits - logits.max()) / temperature).double()
    tokens = torch.arange(len(logits))
    few = 0 < draw.top_k < len(logits)
    if not (few or draw.top_p < 1 or draw.min_p > 0):
        return tokens, weights
    total = float(weights.cumsum(0)[-1])
    weights, tokens = weights.sort(descending=True, stable=True)
    if few:
        weights, tokens = weights[: draw.top_k], tokens[: draw.top_k]
        total = float(weights.cumsum(0)[-1])
    kept = torch.ones(len(weights), dtype=torch.bool)
    if draw.top_p < 1:
        # Those before which the sum has not reached p yet; the first always stays.
        before = torch.cat([torch.zeros(1, dtype=torch.float64), weights.cumsum(0)[:-1]])
        kept &= before < float(np.float32(draw.top_p)) * total
        kept[0] = True
    if draw.min_p > 0:
        kept &= weights.float() >= torch.tensor(draw.min_p, dtype=torch.float32) * weights[0].float()
    return tokens[kept], weights[kept]
