"""Runs a step's tokens through the decoder and its cache. Knows tensors; nothing of requests' text or time.

An int8 checkpoint runs by its plan; any other by the reference forward, which promises no bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch

from steelyard.infer.adapters import Version, Wearer
from steelyard.infer.kv_cache import KVCache, PagedAttention, Span
from steelyard.infer.plan import FittedAdapter, Plan
from steelyard.infer.scheduler import Scheduled
from steelyard.kernels.reference import BLOCK
from steelyard.kernels.steps import MOST_ADAPTERS, MOST_HEAD_WIDTH, MOST_INPUTS, Batch
from steelyard.models.decoder import Decoder
from steelyard.models.linear import Int8Embedding, Int8Linear
from steelyard.models.lora import Adapter, AdapterRows


class Runner(Wearer, Protocol):
    """Computes batches, whose rows may wear adapters that it was given."""

    def run(self, batch: list[Scheduled]) -> torch.Tensor:
        """One forward pass over the batch; the cache holds its tokens afterwards.

        Returns:
            Logits `[N, V]`, one row for each of the batch's N sequences that draw, in their order; valid until the
            next pass.
        """
        ...


class ReferenceRunner:
    """A decoder as training and evaluation run it, over a paged cache."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self.decoder, self.cache = decoder, cache
        self._worn: dict[int, Adapter] = {}
        self._places = Places()

    def prepare(self, adapter: Adapter) -> Adapter:
        """See `Wearer`."""
        return adapter

    def wear(self, digest: str, weights: object) -> int:
        """See `Wearer`."""
        place = next(number for number in range(MOST_ADAPTERS) if number not in self._worn)
        self._worn[place] = cast(Adapter, weights)
        self._places.take(place, digest)
        return place

    def take_off(self, place: int) -> None:
        """See `Wearer`."""
        del self._worn[place]
        self._places.free(place)

    @torch.inference_mode()
    def run(self, batch: list[Scheduled]) -> torch.Tensor:
        """See `Runner`."""
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
        places: dict[int, list[int]] = {}
        start = 0
        for work in batch:
            place = self._places.of(work.sequence.adapter)
            if place >= 0:
                places.setdefault(place, []).extend(range(start, start + work.count))
            start += work.count
        if not places:
            return None
        if len(places) == 1 and len(next(iter(places.values()))) == start:
            return self._worn[next(iter(places))]
        return AdapterRows((self._worn[place], torch.tensor(where)) for place, where in places.items())


class PlanRunner:
    """A plan and the adapters that it wears."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._places = Places()

    def prepare(self, adapter: Adapter) -> FittedAdapter:
        """See `Wearer`."""
        return self.plan.fit(adapter)

    def wear(self, digest: str, weights: object) -> int:
        """See `Wearer`."""
        place = self.plan.wear(cast(FittedAdapter, weights))
        self._places.take(place, digest)
        return place

    def take_off(self, place: int) -> None:
        """See `Wearer`."""
        self.plan.take_off(place)
        self._places.free(place)

    def run(self, batch: list[Scheduled]) -> torch.Tensor:
        """See `Runner`."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        spans: list[tuple[int, int, int, int]] = []
        tables: list[int] = []
        draws: list[int] = []
        worn: list[int] = []
        for work in batch:
            sequence, start = work.sequence, work.sequence.computed
            end = start + work.count
            spans.append((len(tokens), start, work.count, len(tables)))
            tokens += sequence.tokens[start:end]
            positions += range(start, end)
            slots += [sequence.block_table[place // BLOCK] for place in range(start, end)]
            tables += sequence.block_table
            worn += [self._places.of(sequence.adapter)] * work.count
            if work.draws:
                draws.append(len(tokens) - 1)
        ready = Batch(
            token_ids=_numbers(tokens),
            positions=_numbers(positions),
            slots=_numbers(slots),
            spans=_numbers(spans),
            tables=_numbers(tables),
            draws=_numbers(draws),
            adapters=_numbers(worn) if max(worn) >= 0 else None,
        )
        return self.plan.run(ready)


class Places:
    """The digest of what is worn at each place, checked for every row that names one."""

    def __init__(self) -> None:
        self._digests: dict[int, str] = {}

    def take(self, place: int, digest: str) -> None:
        """It is worn here from now on."""
        assert place not in self._digests, "a place has two adapters"
        self._digests[place] = digest

    def free(self, place: int) -> None:
        """Nothing is worn here any more."""
        del self._digests[place]

    def of(self, version: Version | None) -> int:
        """The place of a row's adapter, -1 for none."""
        if version is None:
            return -1
        assert version.place is not None, "a row runs without its adapter"
        assert self._digests[version.place] == version.digest, "a row would wear another's adapter"
        return version.place


def _numbers(values: Sequence[object]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def has_plan(decoder: Decoder) -> bool:
    """Whether all of a decoder's layers are int8, embedding and head included, and of sizes that the kernels take."""
    config = decoder.config
    inputs = max(config.width, config.feed_forward, config.heads * config.head_width)
    if config.head_width > MOST_HEAD_WIDTH or inputs > MOST_INPUTS:
        return False
    layers = (layer for name, layer in decoder.named_modules() if name.endswith(("_proj", "lm_head")))
    return isinstance(decoder.model.embed_tokens, Int8Embedding) and all(
        isinstance(layer, Int8Linear) for layer in layers
    )
