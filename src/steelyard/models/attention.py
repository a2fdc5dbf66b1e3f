"""How the tokens of a pack attend to each other: the part of a decoder that its caller chooses.

A decoder computes queries, keys and values and hands them to an `Attend`. Training and evaluation use
`PackedAttention` (rows side by side, none sees another); the engine brings its own over a paged cache.
"""

# T tokens of the pack  B rows of a bucket  L longest row of the bucket  H query heads  K key-value heads  E head width

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from steelyard.kernels.training import LANES, causal_attention


class Attend(Protocol):
    """Attention over whatever a token may see."""

    def __call__(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """Queries `[T, H, E]`, keys and values `[T, K, E]` of one layer -> mixed values `[T, H, E]`."""
        ...


class PackedAttention:
    """Causal attention inside each row of a pack; rows of similar length share one padded product.

    Padding is on the right, where causality hides it, so that no mask is needed.

    Args:
        lengths: tokens of each row, in the order in which they stand in the pack.
        branches: per token of the pack, 0 for the trunk of its row or the number of its branch. A token sees the
            trunk before it and its own branch: several continuations of one prompt in one row, the prompt computed
            once. Its positions are the caller's to set.
    """

    def __init__(self, lengths: Sequence[int], branches: torch.Tensor | None = None) -> None:
        starts, total = [], 0
        for length in lengths:
            starts.append(total)
            total += length
        self.total = total
        self.buckets: list[tuple[torch.Tensor, int, int, torch.Tensor | None]] = []
        inverse = torch.empty(total, dtype=torch.int64)
        offset = 0
        for rows in _buckets(lengths):
            longest = max(lengths[row] for row in rows)
            if torch.is_grad_enabled():  # as the fused kernels want it
                longest = -(-longest // LANES) * LANES
            source = torch.zeros(len(rows), longest, dtype=torch.int64)
            for place, row in enumerate(rows):
                span = torch.arange(lengths[row])
                source[place, : lengths[row]] = starts[row] + span
                inverse[starts[row] + span] = offset + place * longest + span
            mask = None if branches is None else _branch_mask(branches[source])
            self.buckets.append((source.flatten(), len(rows), longest, mask))
            offset += len(rows) * longest
        self.inverse = inverse
        self.whole = len(self.buckets) == 1 and offset == total and bool((inverse == torch.arange(total)).all())
        """Rows of one length, one after the other: nothing is padded or moved."""

    def __call__(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """See `Attend`."""
        heads, kv_heads, size = queries.shape[1], keys.shape[1], queries.shape[2]
        if self.whole and window is None and self.buckets[0][3] is None:
            _, rows, longest, _ = self.buckets[0]
            apart = (tensor.view(rows, longest, -1, size).transpose(1, 2) for tensor in (queries, keys, values))
            return causal_attention(*apart).transpose(1, 2).reshape(self.total, heads, size)
        joint = torch.cat([queries, keys, values], dim=1)  # one gather instead of three
        parts = []
        for source, rows, longest, mask in self.buckets:
            padded = joint if self.whole else joint.index_select(0, source)
            padded = padded.view(rows, longest, heads + 2 * kv_heads, size).transpose(1, 2)
            q, k, v = torch.split(padded, [heads, kv_heads, kv_heads], dim=1)  # [B, H | K | K, L, E]
            if window is not None and window < longest:
                near = _window_mask(longest, window)
                mask = near if mask is None else mask & near
            mixed = causal_attention(q, k, v) if mask is None else _masked(q, k, v, mask)
            parts.append(mixed.transpose(1, 2).reshape(rows * longest, heads, size))
        if self.whole:
            return parts[0]
        return torch.cat(parts).index_select(0, self.inverse)


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if k.shape[1] != q.shape[1]:
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Rows grouped so that none is padded to more than one and a half times its length (or by 16 tokens)."""
    buckets: list[list[int]] = []
    shortest = 0
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if not buckets or lengths[row] > max(1.5 * shortest, shortest + 16):
            buckets.append([])
            shortest = lengths[row]
        buckets[-1].append(row)
    return buckets


def _window_mask(length: int, window: int) -> torch.Tensor:
    """`[L, L]` bool: causal, and at most `window` tokens back, itself included."""
    place = torch.arange(length)
    distance = place[:, None] - place[None, :]
    return (distance >= 0) & (distance < window)


def _branch_mask(branches: torch.Tensor) -> torch.Tensor:
    """`[B, L]` branch numbers -> `[B, 1, L, L]` bool: causal, trunk or own branch."""
    length = branches.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mine = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    return (causal & mine)[:, None]
