"""What a LoRA run can be told, and the adapter that it starts from."""

from __future__ import annotations

import msgspec
import torch

from steelyard.models.decoder import Decoder
from steelyard.models.dora import DoraAdapter
from steelyard.models.lora import Adapter


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Low-rank adaptation (Hu et al. 2021)."""

    rank: int = 16
    """R: width of the bottleneck."""
    alpha: float = 32.0
    """Numerator of the scale alpha / rank."""
    dropout: float = 0.0
    """Probability of dropping an adapter's input while training."""
    dora: bool = False
    """Learn the size of each output's weights apart from their direction (DoRA: Liu et al. 2024)."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get a pair, by their last name."""


def start(decoder: Decoder, config: LoraConfig, seed: int) -> Adapter:
    """A fresh adapter for `decoder`; the seed decides it."""
    adapter = Adapter.create(
        decoder,
        rank=config.rank,
        alpha=config.alpha,
        targets=config.targets,
        dropout=config.dropout,
        generator=torch.Generator().manual_seed(seed),
    )
    return DoraAdapter.begin(adapter, decoder) if config.dora else adapter
