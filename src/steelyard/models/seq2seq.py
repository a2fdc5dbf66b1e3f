"""Whisper (Radford et al. 2023): an encoder of sound and a decoder of text that attends to it.

Names of weights are Hugging Face's.
"""

# B rows  M mel bands  F frames  P places after the convolutions, F / 2  L tokens  D width  V vocabulary

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import nn

from steelyard.checkpoint import manifest
from steelyard.errors import CheckpointError
from steelyard.kernels.training import attention
from steelyard.models import weights
from steelyard.models.dropout import Dropout
from steelyard.models.linear import QuantizedEmbedding, QuantizedLinear

ARCHITECTURE = "WhisperForConditionalGeneration"
Pair = tuple[torch.Tensor, torch.Tensor]


class WhisperConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes, under Hugging Face's names."""

    vocab_size: int
    d_model: int
    encoder_layers: int
    decoder_layers: int
    encoder_attention_heads: int
    decoder_attention_heads: int
    encoder_ffn_dim: int
    decoder_ffn_dim: int
    num_mel_bins: int = 80
    max_source_positions: int = 1500
    max_target_positions: int = 448
    dropout: float = 0.0

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> WhisperConfig:
        """Read a `config.json`'s fields.

        Raises:
            CheckpointError: one that is missing, out of range or not known here.
        """
        try:
            config = msgspec.convert({name: raw[name] for name in cls.__struct_fields__ if name in raw}, cls)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"config.json: {error}") from None
        sizes = msgspec.structs.astuple(config)[:-1]
        heads = (config.encoder_attention_heads, config.decoder_attention_heads)
        if min(sizes) < 1 or max(sizes) > 1 << 20 or any(config.d_model % count for count in heads):
            raise CheckpointError("config.json: sizes must be at least 1, and heads must divide d_model")
        if raw.get("activation_function", "gelu") != "gelu" or raw.get("scale_embedding", False):
            raise CheckpointError("config.json: only gelu and embeddings that are not scaled are known here")
        return config


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(3))

    def keys_and_values(self, x: torch.Tensor) -> Pair:
        """`[B, P, D]` -> two of `[B, H, P, E]`."""
        key, value = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.k_proj, self.v_proj))
        return key, value

    def forward(
        self, x: torch.Tensor, seen: Pair, lengths: torch.Tensor | None = None, causal: bool = False
    ) -> torch.Tensor:
        query = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if causal:
            mixed = F.scaled_dot_product_attention(query, *seen, is_causal=True)
        else:
            mixed = attention(query, *seen, lengths)
        attended: torch.Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return attended


class _EncoderLayer(nn.Module):
    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        width = config.d_model
        self.self_attn = _Attention(width, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        inner = self.self_attn_layer_norm(x)
        x = x + self.dropout(self.self_attn(inner, self.self_attn.keys_and_values(inner), lengths))
        fed: torch.Tensor = x + self.dropout(self.fc2(F.gelu(self.fc1(self.final_layer_norm(x)))))
        return fed


class WhisperEncoder(nn.Module):
    """Sound to states, 50 a second; a row may be shorter than the 30 seconds that it learnt from."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, 3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_source_positions, config.d_model)
        self.layers = nn.ModuleList(_EncoderLayer(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.dropout = Dropout(config.dropout)

    def forward(self, features: torch.Tensor, frames: torch.Tensor | None = None) -> torch.Tensor:
        """Features `[B, M, F]`, of which each row's first `frames` `[B]` are sound (None: all) -> `[B, P, D]`.

        What stands behind a row's frames must be 0, and changes nothing before it.
        """
        x = F.gelu(self.conv1(features))
        lengths = None
        if frames is not None and bool((frames < features.shape[-1]).any()):
            x = x * (torch.arange(x.shape[-1]) < frames[:, None])[:, None, :]  # as beyond the end, for the next one
            lengths = (frames + 1) // 2
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        x = self.dropout(x + self.embed_positions.weight[: x.shape[1]])
        for layer in self.layers:
            x = layer(x, lengths)
        states: torch.Tensor = self.layer_norm(x)
        return states


class _DecoderLayer(nn.Module):
    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        width = config.d_model
        self.self_attn = _Attention(width, config.decoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.encoder_attn = _Attention(width, config.decoder_attention_heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.decoder_ffn_dim)
        self.fc2 = nn.Linear(config.decoder_ffn_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, heard: Pair, before: Pair | None) -> tuple[torch.Tensor, Pair]:
        inner = self.self_attn_layer_norm(x)
        said = self.self_attn.keys_and_values(inner)
        if before is not None:
            said = torch.cat([before[0], said[0]], 2), torch.cat([before[1], said[1]], 2)
        x = x + self.self_attn(inner, said, causal=x.shape[1] > 1)
        x = x + self.encoder_attn(self.encoder_attn_layer_norm(x), heard)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x)))), said


class _Decoder(nn.Module):
    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.embed_positions = nn.Embedding(config.max_target_positions, config.d_model)
        self.layers = nn.ModuleList(_DecoderLayer(config) for _ in range(config.decoder_layers))
        self.layer_norm = nn.LayerNorm(config.d_model)


class _Model(nn.Module):
    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.encoder, self.decoder = WhisperEncoder(config), _Decoder(config)


class Memory:
    """What a decoder keeps of a batch of rows: what was heard, by layer, and what was said so far."""

    def __init__(self, heard: list[Pair]) -> None:
        self.heard = heard
        self.said: list[Pair | None] = [None] * len(heard)
        self.length = 0
        """Tokens that were said."""

    @classmethod
    def joined(cls, rows: Sequence[Memory]) -> Memory:
        """What several rows, each alone, have heard; nothing was said yet."""
        layers = zip(*(row.heard for row in rows), strict=True)
        return cls([(torch.cat([key for key, _ in own]), torch.cat([value for _, value in own])) for own in layers])

    def keep(self, rows: torch.Tensor) -> None:
        """Only some rows, by number, in this order."""
        self.heard = [(key[rows], value[rows]) for key, value in self.heard]
        self.said = [None if pair is None else (pair[0][rows], pair[1][rows]) for pair in self.said]


class Whisper(nn.Module):
    """See the module."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Model(config)
        self._integers: nn.Module | None = None

    def listen(self, features: torch.Tensor) -> Memory:
        """Features `[B, M, F]` -> what the decoder attends to."""
        states = self.model.encoder(features)
        layers: Any = self.model.decoder.layers
        return Memory([layer.encoder_attn.keys_and_values(states) for layer in layers])

    def forward(self, token_ids: torch.Tensor, memory: Memory, places: int = 0) -> torch.Tensor:
        """The next tokens `[B, L]` of each row (several only at the start) -> logits `[B, L, V]` float32.

        Of the last `places` alone, if that is not 0.
        """
        assert memory.length == 0 or token_ids.shape[1] == 1, "what was said is attended to by one token at a time"
        decoder = self.model.decoder
        here = slice(memory.length, memory.length + token_ids.shape[1])
        x = decoder.embed_tokens(token_ids) + decoder.embed_positions.weight[here]
        for number, layer in enumerate(decoder.layers):
            x, memory.said[number] = layer(x, memory.heard[number], memory.said[number])
        memory.length += token_ids.shape[1]
        return self._head(decoder.layer_norm(x[:, -places:])).float()

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        """The embeddings once more, whatever they are made of."""
        table: nn.Module = self.model.decoder.embed_tokens
        if not isinstance(table, QuantizedEmbedding):
            return F.linear(x, table.weight)  # type: ignore[arg-type]
        if self._integers is None:
            self._integers = QuantizedLinear(table.weight, table.weight_scale, None, x.dtype)
        outputs: torch.Tensor = self._integers(x)
        return outputs


def sines(places: int, width: int) -> torch.Tensor:
    """How an encoder knows its places: `[P, D]`, sines and cosines of rates from 1 to 1/10,000."""
    rates = torch.exp(-math.log(10_000) / max(1, width // 2 - 1) * torch.arange(width // 2))
    angles = torch.arange(places)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Whisper:
    """Open a Whisper checkpoint for evaluation.

    Raises:
        CheckpointError: it is none, or its weights do not fit its config.json.
    """
    raw = manifest.read_json(folder / "config.json")
    if ARCHITECTURE not in (raw.get("architectures") or ()):
        raise CheckpointError(f"'{folder}' is no Whisper: its architecture is {raw.get('architectures')}")
    network = Whisper(WhisperConfig.parse(raw)).to(dtype)
    tensors = weights.read_tensors(folder)
    tensors.pop("proj_out.weight", None)  # the embeddings once more
    weights.fill(network, tensors, folder)
    return network.eval().requires_grad_(False)
