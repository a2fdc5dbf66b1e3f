"""A transformer that reads an image as a row of patches (ViT: Dosovitskiy et al. 2021). Names are Hugging Face's."""

# B rows  C channels  S side  P patches and the class token  D width  K classes

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from steelyard.errors import CheckpointError
from steelyard.kernels.training import attention
from steelyard.models import images as image_networks
from steelyard.models.dropout import Dropout
from steelyard.models.images import ImageConfig, normalised


class VisionConfig(ImageConfig, frozen=True, kw_only=True):
    """Sizes, under Hugging Face's names."""

    patch_size: int = 4
    hidden_size: int = 128
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    intermediate_size: int = 256
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1

    @classmethod
    def parse(cls, raw: Mapping[str, Any], classes: int) -> VisionConfig:
        """Read a `config.json`'s fields. Raises as `images.parse` does."""
        config = image_networks.parse(raw, classes, cls)
        problem = config.problem()
        if problem:
            raise CheckpointError(f"config.json: {problem}")
        return config

    def problem(self) -> str:
        """What does not go together; empty: all does."""
        sizes = (self.hidden_size, self.num_hidden_layers, self.num_attention_heads, self.intermediate_size)
        if min(sizes) < 1 or max(sizes) > 1 << 16 or self.hidden_size % self.num_attention_heads:
            return "sizes must be at least 1, and num_attention_heads must divide hidden_size"
        if self.patch_size < 1 or self.image_size % self.patch_size:
            return "patch_size must divide image_size"
        return ""


class _Patches(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.projection(x)
        return projected.flatten(2).transpose(1, 2)


class _Embeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        count = (config.image_size // config.patch_size) ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.empty(1, count, config.hidden_size).normal_(0, 0.02))
        self.patch_embeddings = _Patches(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embeddings(x)
        return torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], 1) + self.position_embeddings


class _Attention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed: torch.Tensor = self.o_proj(attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed


class _FeedForward(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fed: torch.Tensor = self.fc2(F.gelu(self.fc1(x)))
        return fed


class _Layer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.mlp = _FeedForward(config)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.layernorm_before(x)))
        fed: torch.Tensor = x + self.dropout(self.mlp(self.layernorm_after(x)))
        return fed


class _Vision(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(x)
        for layer in self.layers:
            x = layer(x)
        states: torch.Tensor = self.layernorm(x)
        return states


class VisionTransformer(nn.Module):
    """See the module; the class token's last state is what is classified."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = _Vision(config)
        self.classifier = nn.Linear(config.hidden_size, config.classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[B, C, S, S]` uint8 -> what was seen in them: `[B, D]`."""
        states: torch.Tensor = self.vit(normalised(images, self.config, next(self.parameters()).dtype))
        return states[:, 0]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[B, C, S, S]` uint8 -> logits `[B, K]`."""
        logits: torch.Tensor = self.classifier(self.features(images))
        return logits
