"""One decoder for every stage: Llama 2/3, SmolLM, Mistral, Qwen 2/3, Gemma 3, by their `config.json`.

Pre-norm blocks of grouped-query attention with rotary positions and a gated feed-forward (Touvron et al. 2023); Gemma's
normalise what they add, too (Gemma Team 2025).
It works on a flat pack of tokens; which token sees which is the `Attend` that the caller hands in, and whose
adapter a token wears is the `Adapters`. It knows nothing of batches, caches, losses or sampling.
"""

# T tokens  D model width  H query heads  K key-value heads  E head width  F feed-forward width  V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from steelyard.kernels.training import gelu_mul, rms_norm, rotate, silu_mul
from steelyard.models.attention import Attend
from steelyard.models.config import Activation, DecoderConfig, rotary_frequencies
from steelyard.models.smoothing import Scales

GATES: dict[Activation, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "silu": silu_mul,
    "gelu_tanh": gelu_mul,
}
Angles = tuple[torch.Tensor, torch.Tensor]
"""Cos and sin, each `[T, 1, E / 2]` float32."""
Rotary = tuple[Angles, Angles]
"""Of layers that see everything, and of those with a window."""


class Adapters(Protocol):
    """Low-rank corrections of a pack's linear layers."""

    def add(self, name: str, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """Inputs `[T, in]` and outputs `[T, out]` of the layer `name` -> corrected outputs `[T, out]`."""
        ...


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight), in float32 inside (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, config: DecoderConfig) -> None:
        super().__init__()
        self.epsilon, self.offset = config.norm_epsilon, config.norm_offset
        self.weight = nn.Parameter(torch.full((size,), 1 - self.offset))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., size]` -> the same shape and dtype."""
        return rms_norm(x, self.weight, self.epsilon, self.offset)

    def factors(self) -> torch.Tensor:
        """`[size]` float32: what it multiplies by."""
        return self.offset + self.weight.detach().float()


class Projections(nn.Module):
    """A module whose linear layers adapters may correct, by their full name."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def project(self, layer: str, x: torch.Tensor, adapters: Adapters | None) -> torch.Tensor:
        """`[T, in]` through the linear layer `layer`, plus its adapters' share."""
        outputs: torch.Tensor = getattr(self, layer)(x)
        return outputs if adapters is None else adapters.add(f"{self.path}.{layer}", x, outputs)


class Attention(Projections):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__(f"model.layers.{layer}.self_attn")
        self.config, self.layer, self.window = config, layer, config.windows[layer]
        query, key = config.heads * config.head_width, config.kv_heads * config.head_width
        self.q_proj = nn.Linear(config.width, query, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, key, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, key, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query, config.width, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_width, config)
            self.k_norm = RMSNorm(config.head_width, config)
        self.stretch = math.sqrt(config.head_width / (config.score_width or config.head_width))
        """Of queries: an `Attend` divides their scores by the root of their width."""

    def forward(self, x: torch.Tensor, rotary: Rotary, attend: Attend, adapters: Adapters | None) -> torch.Tensor:
        """`[T, D]` -> `[T, D]`."""
        tokens, size = x.shape[0], self.config.head_width
        queries = self.project("q_proj", x, adapters).view(tokens, self.config.heads, size)
        keys = self.project("k_proj", x, adapters).view(tokens, self.config.kv_heads, size)
        values = self.project("v_proj", x, adapters).view(tokens, self.config.kv_heads, size)
        if self.config.qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        if self.stretch != 1:
            queries = queries * self.stretch
        angles = rotary[self.window is not None]
        queries, keys = rotate(queries, *angles), rotate(keys, *angles)
        mixed = attend(self.layer, queries, keys, values, self.window)
        return self.project("o_proj", mixed.reshape(tokens, -1), adapters)


class FeedForward(Projections):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__(f"model.layers.{layer}.mlp")
        bias = config.feed_forward_bias
        self.gate = GATES[config.activation]
        self.gate_proj = nn.Linear(config.width, config.feed_forward, bias=bias)
        self.up_proj = nn.Linear(config.width, config.feed_forward, bias=bias)
        self.down_proj = nn.Linear(config.feed_forward, config.width, bias=bias)

    def forward(self, x: torch.Tensor, adapters: Adapters | None) -> torch.Tensor:
        """`[T, D]` -> `[T, D]`."""
        gated = self.gate(self.project("gate_proj", x, adapters), self.project("up_proj", x, adapters))
        return self.project("down_proj", gated, adapters)


class Block(nn.Module):
    """Attention and feed-forward, each on the normalised residual stream."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.post_norms = config.post_norms
        self.input_layernorm = RMSNorm(config.width, config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.width, config)
        if config.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(config.width, config)
            self.post_feedforward_layernorm = RMSNorm(config.width, config)
        self.mlp = FeedForward(config, layer)

    @property
    def feed_forward_norm(self) -> RMSNorm:
        """Of what the feed-forward reads. Hugging Face's name for it is another norm's where there are post-norms."""
        return self.pre_feedforward_layernorm if self.post_norms else self.post_attention_layernorm

    def forward(self, x: torch.Tensor, rotary: Rotary, attend: Attend, adapters: Adapters | None) -> torch.Tensor:
        """`[T, D]` -> `[T, D]`."""
        attended: torch.Tensor = self.self_attn(self.input_layernorm(x), rotary, attend, adapters)
        x = x + (self.post_attention_layernorm(attended) if self.post_norms else attended)
        fed: torch.Tensor = self.mlp(self.feed_forward_norm(x), adapters)
        return x + (self.post_feedforward_layernorm(fed) if self.post_norms else fed)


class Embedding(nn.Embedding):
    """An embedding that is not filled at random before its weights are there: on `meta` that alone takes a second."""

    def reset_parameters(self) -> None:
        """Random rows, unless there is no memory for them."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Stack(nn.Module):
    """Embedding, blocks and the last norm, under Hugging Face's name `model`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config)


class Decoder(nn.Module):
    """A causal language model. Parameter names are Hugging Face's."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Stack(config)
        self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._frequencies: list[tuple[torch.Tensor, float]] | None = None
        self.smoothing: Scales = {}
        """What has moved from its activations into its weights, for adapters of the model before."""
        self.recompute_blocks = False
        """While gradients are taken: keep what goes into each block, and make the rest again (Chen et al. 2016)."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations: that of the norms, which no compression touches."""
        return self.model.norm.weight.dtype

    @property
    def embedding_scale(self) -> float:
        """What rows of the embedding are multiplied by, rounded to `dtype`: so they were when the model learnt."""
        return torch.tensor(self.config.embedding_scale, dtype=self.dtype).item()

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids `[T]` -> what the first block reads, `[T, D]`."""
        x: torch.Tensor = self.model.embed_tokens(token_ids)
        return x if self.config.embedding_scale == 1 else x * self.embedding_scale

    def rotary(self, positions: torch.Tensor) -> Rotary:
        """Positions `[T]` int64 -> their angles."""
        if self._frequencies is None:
            ropes = (self.config.rope, self.config.local_rope)
            self._frequencies = [rotary_frequencies(self.config, rope) for rope in ropes if rope is not None]
        angles = [_angles(positions, *frequencies) for frequencies in self._frequencies]
        return angles[0], angles[-1]

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend, adapters: Adapters | None = None
    ) -> torch.Tensor:
        """Hidden states after the last norm.

        Args:
            token_ids: `[T]` int64, the tokens of all rows one after the other.
            positions: `[T]` int64, each token's place in its own row.
            attend: which token sees which.
            adapters: low-rank corrections, or None for the base model.

        Returns:
            `[T, D]` in the model's dtype.
        """
        x = self.embed(token_ids)
        rotary = self.rotary(positions)
        for block in self.model.layers:
            if self.recompute_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, attend, adapters, use_reentrant=False)
            else:
                x = block(x, rotary, attend, adapters)
        normed: torch.Tensor = self.model.norm(x)
        return normed

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states `[N, D]` -> logits `[N, V]` in the model's dtype. Ask only for the rows you need."""
        logits: torch.Tensor = self.lm_head(hidden_states)
        return logits


def _angles(positions: torch.Tensor, frequencies: torch.Tensor, factor: float) -> Angles:
    angles = positions[:, None].float() * frequencies
    return (angles.cos() * factor)[:, None], (angles.sin() * factor)[:, None]
