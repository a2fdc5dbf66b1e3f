"""Runs a step's tokens through the decoder and the paged cache. Knows tensors; nothing of requests' text or time."""

from __future__ import annotations

import torch

from steelyard.infer.kv_cache import KVCache, PagedAttention, Span
from steelyard.infer.scheduler import Scheduled
from steelyard.models.decoder import Decoder
from steelyard.models.lora import Adapter, AdapterRows


class Runner:
    """A decoder, its cache and its adapters."""

    def __init__(self, decoder: Decoder, cache: KVCache, adapters: dict[str, Adapter]) -> None:
        self.decoder, self.cache, self.adapters = decoder, cache, adapters

    @torch.inference_mode()
    def run(self, batch: list[Scheduled]) -> torch.Tensor:
        """One forward pass over the batch; the cache holds its tokens afterwards.

        Returns:
            Logits `[N, V]`, one row for each of the batch's N sequences that draw, in their order.
        """
        tokens: list[int] = []
        positions: list[torch.Tensor] = []
        last: list[int] = []
        for work in batch:
            start, end = work.sequence.computed, work.sequence.computed + work.count
            tokens += work.sequence.tokens[start:end]
            positions.append(torch.arange(start, end))
            if work.draws:
                last.append(len(tokens) - 1)
        spans = [Span(work.sequence.computed, work.count, work.sequence.block_table) for work in batch]
        hidden_states = self.decoder(
            torch.tensor(tokens), torch.cat(positions), PagedAttention(self.cache, spans), self._adapters(batch)
        )
        return self.decoder.logits(hidden_states[torch.tensor(last, dtype=torch.int64)])

    def _adapters(self, batch: list[Scheduled]) -> Adapter | AdapterRows | None:
        places: dict[str, list[int]] = {}
        start = 0
        for work in batch:
            if work.sequence.request.adapter is not None:
                places.setdefault(work.sequence.request.adapter, []).extend(range(start, start + work.count))
            start += work.count
        if not places:
            return None
        if len(places) == 1 and len(next(iter(places.values()))) == start:
            return self.adapters[next(iter(places))]
        return AdapterRows((self.adapters[name], torch.tensor(where)) for name, where in places.items())
