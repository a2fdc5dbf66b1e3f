"""Keys and values of past tokens in blocks, for the reference forward; and attention over them.

Knows nothing of requests or scheduling. A token's slot is `block * block_size + offset`.
"""

# T tokens of the step  B decoding sequences  L longest context among them  H query heads  K key-value heads
# G = H / K query heads that share a key  E head width  S block size

from __future__ import annotations

from collections.abc import Sequence as Items

import msgspec
import torch
import torch.nn.functional as F

from steelyard.models.config import DecoderConfig


class KVCache:
    """The tensors: per layer, keys and values `[blocks, S, K, E]`."""

    def __init__(self, config: DecoderConfig, blocks: int, block_size: int, dtype: torch.dtype) -> None:
        shape = (config.layers, blocks, block_size, config.kv_heads, config.head_width)
        self.keys, self.values = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        self.block_size = block_size

    def begin(self, blocks: list[int]) -> None:
        """Forget what former holders left in these blocks: a weight of 0 does not hide a value that is not finite."""
        self.values[:, torch.tensor(blocks, dtype=torch.int64)] = 0

    def copy(self, pairs: Items[tuple[int, int]]) -> None:
        """Let blocks hold what others do: (from, to)."""
        for tensor in (self.keys, self.values):
            for source, target in pairs:
                tensor[:, target] = tensor[:, source]

    @staticmethod
    def bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
        """Memory of one token's keys and values over all layers."""
        return 2 * config.layers * config.kv_heads * config.head_width * dtype.itemsize


class Span(msgspec.Struct, frozen=True):
    """Tokens of one sequence in a step: `count` new ones after `computed` cached ones."""

    computed: int
    count: int
    block_table: list[int]


class PagedAttention:
    """Attention of a step's tokens over the cache; writes their keys and values first. An `Attend`.

    Single tokens (decoding) go through one padded product; longer spans (prefill) one by one.
    """

    def __init__(self, cache: KVCache, spans: Items[Span]) -> None:
        self.cache, size = cache, cache.block_size
        slots, start = [], 0
        begun: list[int] = []
        self.prefill: list[tuple[int, Span, torch.Tensor]] = []
        decode: list[tuple[int, Span]] = []
        for span in spans:
            table = torch.tensor(span.block_table)
            place = torch.arange(span.computed, span.computed + span.count)
            slots.append(table[place // size] * size + place % size)
            begun += span.block_table[-(-span.computed // size) : -(-(span.computed + span.count) // size)]
            if span.count == 1:
                decode.append((start, span))
            else:
                self.prefill.append((start, span, table))
            start += span.count
        self.slots = torch.cat(slots)
        if begun:
            cache.begin(begun)
        self.decode_places = torch.tensor([place for place, _ in decode], dtype=torch.int64)
        self.lengths = torch.tensor([span.computed + 1 for _, span in decode], dtype=torch.int64)
        if decode:
            blocks = int((self.lengths.max() + size - 1) // size)
            # Padded with a block of its own: a row touches nobody else's values.
            padded = [(span.block_table + span.block_table[:1] * blocks)[:blocks] for _, span in decode]
            self.tables = torch.tensor(padded)
            self.places = torch.arange(blocks * size)

    def __call__(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """See `steelyard.models.attention.Attend`."""
        cached_keys, cached_values = self.cache.keys[layer], self.cache.values[layer]
        cached_keys.flatten(0, 1)[self.slots] = keys
        cached_values.flatten(0, 1)[self.slots] = values
        mixed = torch.empty_like(queries)
        for start, span, table in self.prefill:
            length = span.computed + span.count
            k, v = (cached[table].flatten(0, 1)[:length] for cached in (cached_keys, cached_values))
            mixed[start : start + span.count] = _attend_span(queries[start : start + span.count], k, v, window)
        if len(self.decode_places):
            k, v = (cached[self.tables].flatten(1, 2) for cached in (cached_keys, cached_values))
            mixed[self.decode_places] = self._attend_single(queries[self.decode_places], k, v, window)
        return mixed

    def _attend_single(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """Queries `[B, H, E]`, keys and values `[B, L, K, E]` -> `[B, H, E]`."""
        batch, heads, size = queries.shape
        grouped = queries.view(batch, keys.shape[2], -1, size)  # [B, K, G, E]
        scores = (grouped @ keys.permute(0, 2, 3, 1)).float() * size**-0.5  # [B, K, G, L]
        visible = self.places < self.lengths[:, None]
        if window is not None:
            visible &= self.places >= self.lengths[:, None] - window
        weights = scores.masked_fill_(~visible[:, None, None], float("-inf")).softmax(-1).to(values.dtype)
        mixed: torch.Tensor = (weights @ values.transpose(1, 2)).reshape(batch, heads, size)
        return mixed


def _attend_span(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None) -> torch.Tensor:
    """The last `n` tokens of one sequence: queries `[n, H, E]`, keys and values `[L, K, E]` -> `[n, H, E]`."""
    count, length, share = queries.shape[0], keys.shape[0], queries.shape[1] // keys.shape[1]
    q = queries.transpose(0, 1)[None]
    k, v = (x.repeat_interleave(share, dim=1).transpose(0, 1)[None] for x in (keys, values))
    mask = None
    if count < length or (window is not None and window < length):
        distance = torch.arange(length - count, length)[:, None] - torch.arange(length)
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return mixed[0].transpose(0, 1)
