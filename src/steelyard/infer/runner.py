"""Runs a step's tokens through the decoder and its cache. Knows tensors; nothing of requests' text or time.

Checkpoints in int8, int4 or bfloat16 run by a plan; any other by the reference forward, which promises no bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import msgspec
import torch

from steelyard.errors import CheckpointError
from steelyard.infer.adapters import Version, Wearer
from steelyard.infer.kv_cache import KVCache, PagedAttention, Span
from steelyard.infer.packed import PackedWeights
from steelyard.infer.plan import FittedAdapter, Plan, PlanCache, joint_kind, kind_of
from steelyard.infer.scheduler import Scheduled
from steelyard.kernels.library import Library
from steelyard.kernels.reference import BLOCK, LANES
from steelyard.kernels.steps import MOST_ADAPTERS, MOST_HEAD_WIDTH, MOST_INPUTS, Batch
from steelyard.models.decoder import Block, Decoder
from steelyard.models.linear import QuantizedWeight
from steelyard.models.lora import Adapter, AdapterRows


class Runner(Wearer, Protocol):
    """Computes batches, whose rows may wear adapters that it was given."""

    def run(self, batch: list[Scheduled]) -> torch.Tensor:
        """One forward pass over the batch; the cache holds its tokens afterwards.

        Returns:
            Logits `[N, V]`, a row for each token where they are wanted, in the batch's order; valid until the next
            pass.
        """
        ...

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Let blocks of the cache hold what others do: (from, to); none is both."""
        ...

    def populate(self, wanted: Callable[[], bool]) -> None:
        """Have the cache's memory at hand; may run beside everything else, and ends early if not `wanted`."""
        ...


class ReferenceRunner:
    """A decoder as training and evaluation run it, over a paged cache."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self.decoder, self.cache = decoder, cache
        self._worn: dict[int, Adapter] = {}
        self._places = Places()

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See `Runner`."""
        self.cache.copy(pairs)

    def populate(self, wanted: Callable[[], bool]) -> None:
        """See `Runner`: this cache is written when it is made."""

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
        wanted: list[int] = []
        for work in batch:
            tokens += work.tokens
            positions.append(torch.arange(work.sequence.computed, work.sequence.computed + work.count))
            wanted += range(len(tokens) - work.wanted, len(tokens))
        spans = [Span(work.sequence.computed, work.count, work.sequence.block_table) for work in batch]
        hidden_states = self.decoder(
            torch.tensor(tokens), torch.cat(positions), PagedAttention(self.cache, spans), self._adapters(batch)
        )
        return self.decoder.logits(hidden_states[torch.tensor(wanted, dtype=torch.int64)])

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

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See `Runner`."""
        self.plan.cache.copy(pairs)

    def populate(self, wanted: Callable[[], bool]) -> None:
        """See `Runner`."""
        self.plan.cache.populate(wanted)

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
        wanted: list[int] = []
        worn: list[int] = []
        for work in batch:
            sequence, start = work.sequence, work.sequence.computed
            end = start + work.count
            spans.append((len(tokens), start, work.count, len(tables)))
            tokens += work.tokens
            positions += range(start, end)
            slots += [sequence.block_table[place // BLOCK] for place in range(start, end)]
            tables += sequence.block_table
            worn += [self._places.of(sequence.adapter)] * work.count
            wanted += range(len(tokens) - work.wanted, len(tokens))
        ready = Batch(
            token_ids=_numbers(tokens),
            positions=_numbers(positions),
            slots=_numbers(slots),
            spans=_numbers(spans),
            tables=_numbers(tables),
            draws=_numbers(wanted),
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


def has_plan(decoder: Decoder, native: Library | None) -> bool:
    """Whether all of a decoder's layers are int8, int4 or bfloat16, and of sizes that the kernels take.

    Without native kernels bfloat16 runs faster as PyTorch does it.
    """
    config = decoder.config
    inputs = max(config.width, config.feed_forward, config.heads * config.head_width)
    if config.head_width > MOST_HEAD_WIDTH or inputs > MOST_INPUTS:
        return False
    if config.post_norms and config.width % LANES:  # their rows have no padding that is 0
        return False
    for block in decoder.model.layers:
        assert isinstance(block, Block)
        for together in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            parent = block.self_attn if together[0] == "q_proj" else block.mlp
            if joint_kind([getattr(parent, name) for name in together]) is None:
                return False
    layers = (layer for name, layer in decoder.named_modules() if name.endswith(("_proj", "lm_head", "embed_tokens")))
    return all(
        kind_of(layer) is not None and (native is not None or isinstance(layer, QuantizedWeight)) for layer in layers
    )


class CacheSizes(msgspec.Struct, frozen=True):
    """Of a decoder's cache."""

    blocks: int
    block_size: int
    context: int
    """Most tokens of a sequence."""

    dtype: torch.dtype

    @classmethod
    def fit(
        cls,
        decoder: Decoder,
        kv_bytes: int,
        block_size: int,
        most_running: int,
        library: Library | None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> CacheSizes:
        """What fits into `kv_bytes`, but never more than all running sequences could fill; a plan's blocks hold 32.

        Raises:
            CheckpointError: an int8 cache for a decoder that has no plan.
        """
        if has_plan(decoder, library):
            block_size, per_token = BLOCK, PlanCache.bytes_per_token(decoder, dtype)
        elif dtype == torch.int8:
            raise CheckpointError(
                "an int8 cache needs weights in int8, or in bfloat16 and the native kernels: see `steelyard compress"
                " quantize`"
            )
        else:
            dtype = decoder.dtype
            per_token = KVCache.bytes_per_token(decoder.config, decoder.dtype)
        most = most_running * -(-decoder.config.context // block_size)
        blocks = max(1, min(kv_bytes // (per_token * block_size), most))
        return cls(blocks, block_size, min(decoder.config.context, blocks * block_size), dtype)


def open_runner(
    decoder: Decoder,
    sizes: CacheSizes,
    *,
    tokens: int,
    rows: int,
    library: Library | None,
    packed: PackedWeights | None = None,
) -> Runner:
    """The runner for a decoder: by its plan where it has one.

    Args:
        decoder: the model.
        sizes: of its cache.
        tokens: most of a batch.
        rows: most rows of logits of a batch.
        library: the native kernels.
        packed: packed weights of an earlier start.
    """
    if not has_plan(decoder, library):
        cache = KVCache(decoder.config, sizes.blocks, sizes.block_size, sizes.dtype)
        return ReferenceRunner(decoder, cache)
    plan = Plan(
        decoder,
        blocks=sizes.blocks,
        tokens=tokens,
        draws=rows,
        context=sizes.context,
        native=library,
        cache_dtype=sizes.dtype,
        packed=packed,
    )
    return PlanRunner(plan)
