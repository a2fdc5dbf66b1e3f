"""A decoder lowered to a flat list of fused steps over packed weights, int8, int4 or bfloat16: what an engine runs.

One numeric path per checkpoint: float32 rows, exact integer products, everything else summed in one stated order.
So a row's result is the same to the bit alone or beside others, whatever the chunks, and with the native kernels or
without. `models/` stays the truth that it is tested against.
"""

# T tokens  N rows that draw  V vocabulary

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence

import torch

from steelyard.errors import CheckpointError
from steelyard.infer.packed import PackedWeights
from steelyard.kernels import memory, steps
from steelyard.kernels.library import Library
from steelyard.kernels.packing import Form, PackedWeight, in_turns
from steelyard.kernels.reference import BLOCK, LANES, padded
from steelyard.kernels.steps import (
    BATCH,
    TILE_ROWS,
    Batch,
    Buffers,
    Epilogue,
    HeadSizes,
    NativeBatch,
    NativeBuffers,
    Place,
)
from steelyard.models.config import Activation
from steelyard.models.decoder import Attention, Block, Decoder, RMSNorm
from steelyard.models.linear import QuantizedWeight
from steelyard.models.lora import Adapter

GATES: dict[Activation, Epilogue] = {"silu": Epilogue.SILU_GATE, "gelu_tanh": Epilogue.GELU_GATE}


class PlanCache:
    """Keys and values in blocks of 32 tokens: per layer keys `[blocks, K, E / 2, 32, 2]`, values `[.., 16, E, 2]`.

    Pairs of coordinates of a key, and of tokens of a value, stand side by side: see `cache.h`. E is padded to a
    multiple of 32. bfloat16, or int8 with a float32 scale per token and head, which takes little more than half of
    the memory and is a numeric path of its own.

    Args:
        decoder: whose.
        blocks: how many.
        dtype: `torch.bfloat16` or `torch.int8`.
    """

    def __init__(self, decoder: Decoder, blocks: int, dtype: torch.dtype = torch.bfloat16) -> None:
        config, size = decoder.config, padded(decoder.config.head_width, BLOCK)
        shape = (config.layers, blocks, config.kv_heads)
        self.keys = memory.zeros(*shape, size // 2, BLOCK, 2, dtype=dtype)
        self.values = memory.zeros(*shape, BLOCK // 2, size, 2, dtype=dtype)
        self.scales: tuple[torch.Tensor, torch.Tensor] | None = None
        if dtype == torch.int8:
            key_scales, value_scales = (memory.zeros(*shape, BLOCK, dtype=torch.float32) for _ in range(2))
            self.scales = key_scales, value_scales

    def populate(self, wanted: Callable[[], bool]) -> None:
        """Have all of its memory at hand: prompts would wait for it block by block. Ends early if not `wanted`."""
        memory.populate(self.keys, wanted)
        memory.populate(self.values, wanted)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Let blocks hold what others do: (from, to)."""
        for tensor in (self.keys, self.values, *(self.scales or ())):
            for source, target in pairs:
                tensor[:, target] = tensor[:, source]

    def layer(self, number: int) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Keys, values and scales of a layer."""
        scales = None if self.scales is None else (self.scales[0][number], self.scales[1][number])
        return self.keys[number], self.values[number], scales

    @staticmethod
    def bytes_per_token(decoder: Decoder, dtype: torch.dtype = torch.bfloat16) -> int:
        """Memory of one token's keys and values over all layers."""
        config = decoder.config
        per_head = padded(config.head_width, BLOCK) * dtype.itemsize + (4 if dtype == torch.int8 else 0)
        return 2 * config.layers * config.kv_heads * per_head


FittedAdapter = list[tuple[steps.LowRank, steps.Pair]]
"""An adapter's share of each step that it has one of."""


class Plan:
    """The steps of one decoder, its buffers and its cache.

    Args:
        decoder: each layer int8, int4 or bfloat16; see `runner.has_plan`.
        blocks: of the cache.
        tokens: most tokens of a batch.
        draws: most rows of a batch that draw.
        context: most tokens of a sequence.
        native: the kernels; None runs their twins.
        cache_dtype: of keys and values, `torch.bfloat16` or `torch.int8`.
        packed: packed weights of an earlier start, by name; those that are not there are packed, and put there.

    Raises:
        CheckpointError: a layer is of another kind.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        blocks: int,
        tokens: int,
        draws: int,
        context: int,
        native: Library | None,
        cache_dtype: torch.dtype = torch.bfloat16,
        packed: PackedWeights | None = None,
    ) -> None:
        self.library = native
        self._weights = packed or PackedWeights()
        self.cache = PlanCache(decoder, blocks, cache_dtype)
        self.decoder = decoder
        self.most_tokens, self.most_draws = tokens, draws
        self.low_rank: dict[str, list[steps.LowRank]] = {}
        self._free = list(range(steps.MOST_ADAPTERS - 1, -1, -1))
        self._angles = [
            (cos[:, 0].contiguous(), sin[:, 0].contiguous()) for cos, sin in decoder.rotary(torch.arange(context))
        ]
        self.steps = list(self._lower())
        self._weights.keep()
        self.buffers = self._allocate()
        self._lower_natively()

    def run(self, batch: Batch, seconds: torch.Tensor | None = None) -> torch.Tensor:
        """Run the steps over a batch; the cache holds its tokens afterwards.

        Args:
            batch: what to compute.
            seconds: `[steps]` float64, gets each step's time added (native kernels only).

        Returns:
            Logits `[N, V]` float32, valid until the next run.
        """
        assert len(batch.token_ids) <= self.most_tokens
        assert len(batch.draws) <= self.most_draws
        if self.library is None:
            for step in self.steps:
                step.run(self.buffers, batch)
        else:
            tensors = (getattr(batch, name) for name in BATCH)
            pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
            sizes = len(batch.token_ids), len(batch.spans), len(batch.draws), 0
            native = NativeBatch(*sizes, *pointers)
            self.library.run(
                ctypes.addressof(self._native_steps),
                len(self.steps),
                ctypes.addressof(self._native_buffers),
                ctypes.addressof(native),
                None if seconds is None else seconds.data_ptr(),
            )
        return self.buffers.places[Place.LOGITS][: len(batch.draws)]

    def fit(self, adapter: Adapter) -> FittedAdapter:
        """An adapter as the steps read it. Changes nothing: any thread may call this while the plan runs."""
        parts = [(step, adapter.pairs[name]) for name in adapter.pairs for step in self.low_rank[name]]
        return [(step, _padded_pair(*pair, adapter.alpha, step)) for step, pair in parts]

    def wear(self, adapter: FittedAdapter) -> int:
        """Take an adapter in; returns the number by which a batch's tokens name it, below `MOST_ADAPTERS`."""
        place = self._free.pop()
        for step, pair in adapter:
            step.wear(place, pair)
        return place

    def take_off(self, place: int) -> None:
        """Forget an adapter; its number may be given to another."""
        for parts in self.low_rank.values():
            for step in parts:
                step.take_off(place)
        self._free.append(place)

    def _lower(self) -> Iterable[steps.Step]:
        decoder, config = self.decoder, self.decoder.config
        table = self._weight("model.embed_tokens", [decoder.model.embed_tokens])
        columns: torch.Tensor | None = getattr(decoder.model.embed_tokens, "column_scale", None)
        if config.embedding_scale != 1:
            columns = (torch.ones(config.width) if columns is None else columns) * decoder.embedding_scale
        yield steps.Embed(table, None if columns is None else _padded_vector(columns))
        for number, block in enumerate(decoder.model.layers):
            assert isinstance(block, Block)
            yield from self._attention(number, block)
            yield from self._feed_forward(block)
        head = table if config.tied else self._weight("lm_head", [decoder.lm_head])
        yield steps.Gather(padded(config.width))
        yield self._norm(decoder.model.norm, head, drawn=True)
        yield steps.Product(head, Place.LOGITS, Epilogue.STORE)

    def _attention(self, number: int, block: Block) -> Iterable[steps.Step]:
        attention, config = block.self_attn, self.decoder.config
        query, key = config.heads * config.head_width, config.kv_heads * config.head_width
        width, stride = padded(config.width), padded(query + 2 * key)
        parts = [getattr(attention, f"{letter}_proj") for letter in "qkv"]
        joint = self._weight(f"{attention.path}.qkv", parts)
        output = self._weight(f"{attention.path}.o_proj", [attention.o_proj])
        yield self._norm(block.input_layernorm, joint)
        yield steps.Product(joint, Place.WIDE, Epilogue.STORE)
        for letter, outputs, column in (("q", query, 0), ("k", key, query), ("v", key, query + key)):
            yield self._low_rank(
                f"{attention.path}.{letter}_proj", width, outputs, stride, Place.NORMED, Place.WIDE, column
            )
        heads = HeadSizes(
            config.heads,
            config.kv_heads,
            config.head_width,
            config.windows[number] or 0,
            *self.cache.layer(number),
        )
        yield self._rotate(attention, heads)
        yield steps.Attend(heads)
        yield steps.Quantize(padded(query), Place.MIXED, output.form.group)
        after = block.post_attention_layernorm if config.post_norms else None
        yield from self._add(f"{attention.path}.o_proj", output, Place.MIXED, after)

    def _feed_forward(self, block: Block) -> Iterable[steps.Step]:
        layer, config = block.mlp, self.decoder.config
        width, inner = padded(config.width), padded(config.feed_forward)
        both = self._weight(f"{layer.path}.gate_up", [layer.gate_proj, layer.up_proj], turns=True)
        down = self._weight(f"{layer.path}.down_proj", [layer.down_proj])
        epilogue = GATES[config.activation]
        yield self._norm(block.feed_forward_norm, both)
        yield steps.Product(both, Place.GATED, epilogue)
        for name, column in (("gate_proj", 0), ("up_proj", 16)):
            yield self._low_rank(
                f"{layer.path}.{name}",
                width,
                config.feed_forward,
                2 * inner,
                Place.NORMED,
                Place.WIDE,
                column,
                turns=True,
            )
        yield steps.GateRows(inner, epilogue)
        yield steps.Quantize(inner, Place.GATED, down.form.group)
        after = block.post_feedforward_layernorm if config.post_norms else None
        yield from self._add(f"{layer.path}.down_proj", down, Place.GATED, after)

    def _add(self, name: str, weight: PackedWeight, source: Place, after: RMSNorm | None) -> Iterable[steps.Step]:
        """A product that is added to the residual rows; before that it is normalised, if there is a norm."""
        width, inputs = self.decoder.config.width, weight.form.inputs
        place = Place.RESIDUAL if after is None else Place.WIDE
        yield steps.Product(weight, place, Epilogue.ADD if after is None else Epilogue.STORE)
        yield self._low_rank(name, inputs, width, padded(width), source, place)
        if after is not None:
            yield steps.AddNorm(after.factors(), after.epsilon)

    def _norm(self, norm: RMSNorm, reader: PackedWeight, drawn: bool = False) -> steps.Norm:
        """Rounded as the product that reads it wants."""
        weight = norm.factors()
        return steps.Norm(_padded_vector(weight), len(weight), norm.epsilon, reader.form.group, drawn)

    def _rotate(self, attention: Attention, heads: HeadSizes) -> steps.Rotate:
        config, angles = self.decoder.config, self._angles[attention.window is not None]
        if not config.qk_norm:
            return steps.Rotate(heads, *angles)
        query = _padded_vector(attention.q_norm.factors() * attention.stretch)
        return steps.Rotate(heads, *angles, query, _padded_vector(attention.k_norm.factors()), config.norm_epsilon)

    def _weight(self, name: str, layers: Sequence[torch.nn.Module], *, turns: bool = False) -> PackedWeight:
        """One packed weight for layers that read the same rows; their outputs one after the other or in turns.

        Raises:
            CheckpointError: they are not all bfloat16, nor all integers of one kind.
        """
        inputs, bits, group = self._kind(name, layers)
        sizes: list[int] = [layer.state_dict()["weight"].shape[0] for layer in layers]
        outputs = sum(padded(size) if turns else size for size in sizes)

        def joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
            there = [part for part in parts if part is not None]
            if not there:
                return None
            return in_turns(*there) if turns else torch.cat(there)

        def pack() -> PackedWeight:
            quantized = [layer for layer in layers if isinstance(layer, QuantizedWeight)]
            whole = [layer.values() for layer in quantized] or [layer.get_parameter("weight") for layer in layers]
            weight, scale = joined(whole), joined([layer.weight_scale for layer in quantized])
            bias = joined([getattr(layer, "bias", None) for layer in layers])
            assert weight is not None
            return PackedWeight.pack(weight, scale, bias, self.library, self._weights.arena, bits)

        return self._weights.find(name, Form(outputs, padded(inputs), bits, group), pack)

    def _kind(self, name: str, layers: Sequence[torch.nn.Module]) -> tuple[int, int, int]:
        """Inputs of layers, bits of their weights, and inputs that share a scale; see `Form`."""
        kind = joint_kind(layers)
        if kind is None:
            raise CheckpointError(
                f"'{name}' is neither bfloat16 nor integers in the same groups: a plan is made of such layers"
            )
        return kind

    def _low_rank(
        self,
        name: str,
        inputs: int,
        outputs: int,
        stride: int,
        source: Place,
        destination: Place,
        column: int = 0,
        turns: bool = False,
    ) -> steps.LowRank:
        step = steps.LowRank(inputs, padded(outputs), stride, source, destination, column, turns)
        self.low_rank.setdefault(name, []).append(step)
        return step

    def _allocate(self) -> Buffers:
        config, tokens = self.decoder.config, self.most_tokens
        width, inner = padded(config.width), padded(config.feed_forward)
        mixed = padded(config.heads * config.head_width)
        wide = max(padded((config.heads + 2 * config.kv_heads) * config.head_width), 2 * inner)
        rows = {
            Place.WIDE: (tokens, wide),
            Place.RESIDUAL: (tokens, width),
            Place.GATED: (tokens, inner),
            Place.LOGITS: (self.most_draws, self.decoder.lm_head.out_features),
            Place.NORMED: (tokens, width),
            Place.MIXED: (tokens, mixed),
            Place.DRAWN: (self.most_draws, width),
        }
        most = max(tokens, self.most_draws)
        groups = max(self._groups())
        places = {}
        for place, (count, size) in rows.items():
            # A row more than needed: the last vector of a row may reach past it.
            places[place] = torch.zeros(count * size + 2 * padded(1))[: count * size].view(count, size)
        return Buffers(
            places=places,
            queries=torch.zeros(tokens, config.heads, padded(config.head_width, BLOCK), dtype=torch.bfloat16),
            quantized=torch.zeros((most + TILE_ROWS) * max(width, inner, mixed) * 2, dtype=torch.int8),
            scales=torch.zeros(most * groups),
            sums=torch.zeros(most * groups, dtype=torch.int32),
        )

    def _groups(self) -> Iterable[int]:
        """Of what each product reads."""
        for step in self.steps:
            if isinstance(step, steps.Product):
                yield 1 if step.weight.form.dense else step.weight.form.groups

    def _lower_natively(self) -> None:
        if self.library is None:
            return
        self._native_steps = (steps.NativeStep * len(self.steps))(*(step.native() for step in self.steps))
        places, buffers = self.buffers.places, self.buffers
        order = (
            places[Place.RESIDUAL],
            places[Place.WIDE],
            places[Place.NORMED],
            buffers.queries,
            places[Place.MIXED],
            places[Place.GATED],
            places[Place.DRAWN],
            places[Place.LOGITS],
            buffers.quantized,
            buffers.scales,
            buffers.sums,
        )
        self._native_buffers = NativeBuffers(*(tensor.data_ptr() for tensor in order))


def kind_of(layer: torch.nn.Module) -> tuple[int, int, int] | None:
    """A layer's inputs, bits of its weights, and inputs that share a scale, as a `Form` has them.

    None of one that no product computes: neither bfloat16 of a width that they take, nor integers in such groups.
    """
    if isinstance(layer, QuantizedWeight):
        whole = layer.group == layer.in_features
        group = padded(layer.in_features) if whole else layer.group
        return (layer.in_features, layer.bits, group) if whole or group % LANES == 0 else None
    weight = getattr(layer, "weight", None)
    if isinstance(weight, torch.nn.Parameter) and weight.dtype == torch.bfloat16 and weight.shape[-1] % BLOCK == 0:
        return weight.shape[-1], 16, 0
    return None


def joint_kind(layers: Sequence[torch.nn.Module]) -> tuple[int, int, int] | None:
    """Of layers that read the same rows, as one product; see `kind_of`. Where some have 8 bits, all are kept in 8."""
    kinds = {kind_of(layer) for layer in layers}
    if None in kinds or len({(inputs, group) for inputs, _, group in filter(None, kinds)}) > 1:
        return None
    bits = {kind[1] for kind in kinds if kind is not None}
    inputs, _, group = next(filter(None, kinds))
    return None if len(bits) > 1 and 16 in bits else (inputs, max(bits), group)


def _padded_vector(weight: torch.Tensor) -> torch.Tensor:
    whole = torch.zeros(padded(weight.numel()))
    whole[: weight.numel()] = weight.float()
    return whole


def _padded_pair(
    a: torch.Tensor, b: torch.Tensor, alpha: float, step: steps.LowRank
) -> tuple[torch.Tensor, torch.Tensor, float]:
    rank = a.shape[0]
    wide_a = torch.zeros(rank, step.inputs, dtype=torch.bfloat16)
    wide_a[:, : a.shape[1]] = a
    wide_b = torch.zeros(rank, step.outputs, dtype=torch.bfloat16)
    wide_b[:, : b.shape[0]] = b.T
    return wide_a, wide_b, alpha / rank
