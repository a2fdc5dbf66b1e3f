"""A decoder lowered to a flat list of fused steps over packed int8 weights: what an engine runs.

One numeric path per checkpoint: float32 rows, exact integer products, a cache in bfloat16, sums in one stated order.
So a row's result is the same to the bit alone or beside others, whatever the chunks, and with the native kernels or
without. `models/` stays the truth that it is tested against.
"""

# T tokens  N rows that draw  V vocabulary

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import torch

from steelyard.errors import CheckpointError
from steelyard.kernels import memory, steps
from steelyard.kernels.library import Library
from steelyard.kernels.reference import BLOCK
from steelyard.kernels.steps import Batch, Buffers, Epilogue, HeadSizes, PackedWeight, Place, padded
from steelyard.models.config import rotary_frequencies
from steelyard.models.decoder import Attention, Block, Decoder
from steelyard.models.linear import Int8Embedding, Int8Linear
from steelyard.models.lora import Adapter


class PlanCache:
    """Keys and values in blocks of 32 tokens, bfloat16: per layer keys `[blocks, K, E, 32]`, values `[.., 32, E]`.

    Keys stand across, so that one load brings a coordinate of many tokens. E is padded to a multiple of 16.
    """

    def __init__(self, decoder: Decoder, blocks: int) -> None:
        config, size = decoder.config, padded(decoder.config.head_width)
        self.keys = memory.zeros(config.layers, blocks, config.kv_heads, size, BLOCK, dtype=torch.bfloat16)
        self.values = memory.zeros(config.layers, blocks, config.kv_heads, BLOCK, size, dtype=torch.bfloat16)

    @staticmethod
    def bytes_per_token(decoder: Decoder) -> int:
        """Memory of one token's keys and values over all layers."""
        return 4 * decoder.config.layers * decoder.config.kv_heads * padded(decoder.config.head_width)


# As in plan.cpp.
BUFFERS = ("residual", "wide", "normed", "queries", "mixed", "gated", "drawn", "logits", "quantized", "scales", "sums")
BATCH = ("token_ids", "positions", "slots", "spans", "tables", "draws", "adapters")


class _NativeBuffers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in BUFFERS]


class _NativeBatch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("tokens", "span_count", "draw_count", "unused")),
        *((name, ctypes.c_void_p) for name in BATCH),
    ]


FittedAdapter = list[tuple[steps.LowRank, steps.Pair]]
"""An adapter's share of each step that it has one of."""


class Plan:
    """The steps of one decoder, its buffers and its cache.

    Args:
        decoder: with int8 layers throughout, embedding and head included; see `runner.has_plan`.
        blocks: of the cache.
        tokens: most tokens of a batch.
        draws: most rows of a batch that draw.
        context: most tokens of a sequence.
        native: the kernels; None runs their twins.

    Raises:
        CheckpointError: a layer is not int8.
    """

    def __init__(
        self, decoder: Decoder, *, blocks: int, tokens: int, draws: int, context: int, native: Library | None
    ) -> None:
        self.library = native
        self.cache = PlanCache(decoder, blocks)
        self.decoder = decoder
        self.most_tokens, self.most_draws = tokens, draws
        self.low_rank: dict[str, list[steps.LowRank]] = {}
        self._free = list(range(steps.MOST_ADAPTERS - 1, -1, -1))
        self._angles = _angles(decoder, context)
        self.steps = list(self._lower())
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
            native = _NativeBatch(*sizes, *pointers)
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
        table = self._packed("model.embed_tokens", decoder.model.embed_tokens)
        yield steps.Embed(table)
        for number, block in enumerate(decoder.model.layers):
            assert isinstance(block, Block)
            yield from self._attention(number, block)
            yield from self._feed_forward(block)
        yield steps.Gather(padded(config.width))
        yield self._norm(decoder.model.norm, drawn=True)
        head = table if config.tied else self._packed("lm_head", decoder.lm_head)
        yield steps.Product(head, Place.LOGITS, Epilogue.STORE)

    def _attention(self, number: int, block: Block) -> Iterable[steps.Step]:
        attention, config = block.self_attn, self.decoder.config
        query, key = config.heads * config.head_width, config.kv_heads * config.head_width
        width, stride = padded(config.width), padded(query + 2 * key)
        parts = [getattr(attention, f"{letter}_proj") for letter in "qkv"]
        yield self._norm(block.input_layernorm)
        yield self._product(f"{attention.path}.qkv", parts, Place.WIDE, Epilogue.STORE)
        for letter, outputs, column in (("q", query, 0), ("k", key, query), ("v", key, query + key)):
            yield self._low_rank(
                f"{attention.path}.{letter}_proj", width, outputs, stride, Place.NORMED, Place.WIDE, column
            )
        heads = HeadSizes(
            config.heads,
            config.kv_heads,
            config.head_width,
            config.windows[number] or 0,
            self.cache.keys[number],
            self.cache.values[number],
        )
        yield self._rotate(attention, heads)
        yield steps.Attend(heads)
        yield steps.Quantize(padded(query), Place.MIXED)
        yield self._product(f"{attention.path}.o_proj", [attention.o_proj], Place.RESIDUAL, Epilogue.ADD)
        yield self._low_rank(
            f"{attention.path}.o_proj", padded(query), config.width, width, Place.MIXED, Place.RESIDUAL
        )

    def _feed_forward(self, block: Block) -> Iterable[steps.Step]:
        layer, config = block.mlp, self.decoder.config
        width, inner = padded(config.width), padded(config.feed_forward)
        yield self._norm(block.post_attention_layernorm)
        gate, up = (self._int8(f"{layer.path}.{name}", getattr(layer, name)) for name in ("gate_proj", "up_proj"))
        bias = None if gate.bias is None or up.bias is None else steps.in_turns(gate.bias, up.bias)
        both = PackedWeight(
            steps.in_turns(gate.weight, up.weight),
            steps.in_turns(gate.weight_scale.flatten(), up.weight_scale.flatten()),
            bias,
            self.library,
        )
        yield steps.Product(both, Place.GATED, Epilogue.GATE)
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
        yield steps.GateRows(inner)
        yield steps.Quantize(inner, Place.GATED)
        yield self._product(f"{layer.path}.down_proj", [layer.down_proj], Place.RESIDUAL, Epilogue.ADD)
        yield self._low_rank(f"{layer.path}.down_proj", inner, config.width, width, Place.GATED, Place.RESIDUAL)

    def _norm(self, norm: torch.nn.Module, drawn: bool = False) -> steps.Norm:
        weight, epsilon = norm.weight, float(norm.epsilon)  # type: ignore[arg-type]
        return steps.Norm(_padded_vector(weight), weight.numel(), epsilon, drawn)  # type: ignore[arg-type,operator]

    def _rotate(self, attention: Attention, heads: HeadSizes) -> steps.Rotate:
        config = self.decoder.config
        if not config.qk_norm:
            return steps.Rotate(heads, *self._angles)
        query, key = _padded_vector(attention.q_norm.weight), _padded_vector(attention.k_norm.weight)
        return steps.Rotate(heads, *self._angles, query, key, config.norm_epsilon)

    def _int8(self, name: str, layer: object) -> Int8Linear:
        if not isinstance(layer, Int8Linear):
            raise CheckpointError(f"'{name}' is not int8: a plan is made of int8 layers")
        return layer

    def _packed(self, name: str, layer: object) -> PackedWeight:
        """Embedding or head."""
        if isinstance(layer, Int8Embedding | Int8Linear):
            return PackedWeight(layer.weight, layer.weight_scale, getattr(layer, "bias", None), self.library)
        raise CheckpointError(f"'{name}' is not int8: a plan is made of int8 layers")

    def _product(self, name: str, layers: Sequence[object], place: Place, epilogue: Epilogue) -> steps.Product:
        """One product for layers that read the same rows."""
        found = [self._int8(name, layer) for layer in layers]
        biases = [layer.bias for layer in found]
        bias = torch.cat([bias.float() for bias in biases if bias is not None]) if biases[0] is not None else None
        weight = torch.cat([layer.weight for layer in found])
        scale = torch.cat([layer.weight_scale.float() for layer in found])
        return steps.Product(PackedWeight(weight, scale, bias, self.library), place, epilogue)

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
            Place.LOGITS: (self.most_draws, config.vocabulary),
            Place.NORMED: (tokens, width),
            Place.MIXED: (tokens, mixed),
            Place.DRAWN: (self.most_draws, width),
        }
        places = {}
        for place, (count, size) in rows.items():
            # A row more than needed: the last vector of a row may reach past it.
            places[place] = torch.zeros(count * size + 2 * padded(1))[: count * size].view(count, size)
        return Buffers(
            places=places,
            queries=torch.zeros(tokens, config.heads, padded(config.head_width)),
            quantized=torch.zeros(max(tokens, self.most_draws) * max(width, inner, mixed), dtype=torch.int8),
            scales=torch.zeros(max(tokens, self.most_draws)),
            sums=torch.zeros(max(tokens, self.most_draws), dtype=torch.int32),
        )

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
        self._native_buffers = _NativeBuffers(*(tensor.data_ptr() for tensor in order))


def _angles(decoder: Decoder, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin `[context, E / 2]` float32."""
    frequencies, factor = rotary_frequencies(decoder.config)
    angles = torch.arange(context)[:, None].float() * frequencies
    return (angles.cos() * factor).contiguous(), (angles.sin() * factor).contiguous()


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
