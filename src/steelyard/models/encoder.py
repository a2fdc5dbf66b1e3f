"""A transformer that reads in both directions (BERT: Devlin et al. 2019), its sentence embeddings, a classifier on it.

Parameter names are Hugging Face's. Rows of a batch are padded on the right; nothing attends to padding.
"""

# B rows  L longest row  D width  H heads  E head width  C classes

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import nn

from steelyard.errors import CheckpointError
from steelyard.kernels.training import attention
from steelyard.models.dropout import Dropout

ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
"""How torch's gelu is approximated, by `hidden_act`."""


class EncoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    chain: bool = False
    """Of a tagger: how well labels follow each other is learnt, too."""
    bio: bool = False
    """Of a tagger: its labels say where something begins and goes on, in all sentences that it learnt from."""
    classes: int = 0
    """0: no classifier."""

    @classmethod
    def parse(cls, raw: Mapping[str, Any], classes: int = 0) -> EncoderConfig:
        """Read a `config.json`'s fields.

        Raises:
            CheckpointError: one that is missing, out of range or not known here.
        """
        try:
            known = {name: raw[name] for name in cls.__struct_fields__ if name in raw and name != "classes"}
            config = msgspec.convert({**known, "classes": classes}, cls)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"config.json: {error}") from None
        if raw.get("position_embedding_type", "absolute") != "absolute" or config.hidden_act not in ACTIVATIONS:
            raise CheckpointError("config.json: only absolute positions and gelu are known here")
        sizes = [value for value in msgspec.structs.astuple(config)[:7] if isinstance(value, int)]
        if min(sizes) < 1 or max(sizes) > 1 << 20 or config.hidden_size % config.num_attention_heads:
            raise CheckpointError("config.json: sizes must be at least 1, and heads must divide hidden_size")
        return config


class _Embeddings(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, token_ids: torch.Tensor, extra: torch.Tensor | None) -> torch.Tensor:
        positions = torch.arange(token_ids.shape[1])
        one_text = self.token_type_embeddings.weight[0]
        x = self.word_embeddings(token_ids) + self.position_embeddings(positions) + one_text
        normed: torch.Tensor = self.LayerNorm(x if extra is None else x + extra)
        return normed


class _SelfAttention(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(3))

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        rows, length, width = x.shape
        q, k, v = (
            layer(x).view(rows, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = attention(q, k, v, lengths)
        return mixed.transpose(1, 2).reshape(rows, length, width)


class _Output(nn.Module):
    """What a block adds to its input, normalised after."""

    def __init__(self, inputs: int, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, inner: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self.LayerNorm(x + self.dropout(self.dense(inner)))
        return added


class _Attention(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.self = _SelfAttention(config)
        self.output = _Output(config.hidden_size, config)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        attended: torch.Tensor = self.output(self.self(x, lengths), x)
        return attended


class _Intermediate(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.approximate = ACTIVATIONS[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.dense(x), approximate=self.approximate)


class _Layer(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.intermediate = _Intermediate(config)
        self.output = _Output(config.intermediate_size, config)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        x = self.attention(x, lengths)
        fed: torch.Tensor = self.output(self.intermediate(x), x)
        return fed


class _Stack(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))


class Encoder(nn.Module):
    """Hidden states of every token, from both sides."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = _Stack(config)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self, token_ids: torch.Tensor, lengths: torch.Tensor, extra: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Token ids `[B, L]` int64, whatever stands behind each row's length `[B]` -> `[B, L, D]`.

        `extra` `[B, L, D]` is added to the embeddings before they are normalised.
        """
        is_traced = torch.compiler.is_exporting()  # then what is true of these rows is to hold for all
        seen = None if not is_traced and bool((lengths == token_ids.shape[1]).all()) else lengths
        x: torch.Tensor = self.dropout(self.embeddings(token_ids, extra))
        for layer in self.encoder.layer:
            x = layer(x, seen)
        return x

    def embed(self, token_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The mean of a row's hidden states, of length 1 (Reimers and Gurevych 2019): `[B, D]` float32."""
        pooled = mean_of(self(token_ids, lengths), token_ids, lengths)
        return F.normalize(pooled.float(), dim=-1)


class EncoderClassifier(nn.Module):
    """A linear layer on the mean of an encoder's hidden states."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.classifier = nn.Linear(config.hidden_size, config.classes)

    @property
    def context(self) -> int | None:
        """Most tokens of a row."""
        return self.config.max_position_embeddings

    def forward(self, token_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Token ids `[B, L]` and lengths `[B]` -> logits `[B, C]`."""
        pooled = mean_of(self.encoder(token_ids, lengths), token_ids, lengths)
        logits: torch.Tensor = self.classifier(self.encoder.dropout(pooled))
        return logits


def is_token(token_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """`[B, L]` bool: what is no padding."""
    return torch.arange(token_ids.shape[1]) < lengths[:, None]


def mean_of(hidden_states: torch.Tensor, token_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """`[B, L, D]` -> `[B, D]`: the mean over each row's own tokens."""
    seen = is_token(token_ids, lengths)[..., None].to(hidden_states.dtype)
    mean: torch.Tensor = (hidden_states * seen).sum(1) / lengths[:, None].to(hidden_states.dtype)
    return mean
