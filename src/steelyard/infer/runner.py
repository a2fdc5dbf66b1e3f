"""Runs a step's tokens through the decoder and its cache. Knows tensors; nothing of requests' text or time.

Checkpoints in int8 or bfloat16 run by a plan; any other by the reference forward, which promises no bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec
import torch

from steelyard.errors import CheckpointError
from steelyard.infer.kv_cache import KVCache, PagedAttention, Span
from steelyard.infer.packed import PackedWeights
from steelyard.infer.plan import Plan, PlanCache, is_dense
from steelyard.infer.scheduler import Scheduled
from steelyard.kernels.library import Library
from steelyard.kernels.reference import BLOCK
from steelyard.kernels.steps import MOST_HEAD_WIDTH, MOST_INPUTS, Batch
from steelyard.models.decoder import Block, Decoder
from steelyard.models.linear import Int8Embedding, Int8Linear
from steelyard.models.lora import Adapter, AdapterRows


class Runner(Protocol):
    """Computes batches."""

    def run(self, batch: list[Scheduled]) -> torch.Tensor:
        """One forward pass over the batch; the cache holds its tokens afterwards.

        Returns:
            Logits `[N, V]`, a row for each token where they are wanted, in the batch's order; valid until the next
            pass.
        """
        ...


class ReferenceRunner:
    """A decoder as training and evaluation run it, over a paged cache."""

    def __init__(self, decoder: Decoder, cache: KVCache, adapters: Mapping[str, Adapter]) -> None:
        self.decoder, self.cache, self.adapters = decoder, cache, adapters

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


class PlanRunner:
    """A plan and the adapters that it wears."""

    def __init__(self, plan: Plan, adapters: Mapping[str, Adapter]) -> None:
        self.plan = plan
        self.numbers = {name: plan.wear(adapter) for name, adapter in adapters.items()}

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
            adapter = sequence.request.adapter
            worn += [-1 if adapter is None else self.numbers[adapter]] * work.count
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


def _numbers(values: Sequence[object]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def has_plan(decoder: Decoder, native: Library | None) -> bool:
    """Whether all of a decoder's layers are int8 or bfloat16, and of sizes that the kernels take.

    Without native kernels bfloat16 runs faster as PyTorch does it.
    """
    config = decoder.config
    inputs = max(config.width, config.feed_forward, config.heads * config.head_width)
    if config.head_width > MOST_HEAD_WIDTH or inputs > MOST_INPUTS:
        return False
    for block in decoder.model.layers:
        assert isinstance(block, Block)
        for together in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            parent = block.self_attn if together[0] == "q_proj" else block.mlp
            if len({is_dense(getattr(parent, name)) for name in together}) > 1:
                return False
    layers = (layer for name, layer in decoder.named_modules() if name.endswith(("_proj", "lm_head", "embed_tokens")))
    return all(
        isinstance(layer, Int8Linear | Int8Embedding) or (native is not None and is_dense(layer)) for layer in layers
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
    adapters: Mapping[str, Adapter] | None = None,
    packed: PackedWeights | None = None,
) -> Runner:
    """The runner for a decoder: by its plan where it has one.

    Args:
        decoder: the model.
        sizes: of its cache.
        tokens: most of a batch.
        rows: most rows of logits of a batch.
        library: the native kernels.
        adapters: by name.
        packed: packed weights of an earlier start.
    """
    if not has_plan(decoder, library):
        cache = KVCache(decoder.config, sizes.blocks, sizes.block_size, sizes.dtype)
        return ReferenceRunner(decoder, cache, adapters or {})
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
    return PlanRunner(plan, adapters or {})
