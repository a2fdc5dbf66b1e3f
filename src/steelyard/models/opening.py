"""Open any checkpoint to run it: a model, or an adapter together with the base that it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from steelyard.checkpoint import manifest
from steelyard.models import dora, weights
from steelyard.models.decoder import Decoder
from steelyard.models.lora import Adapter
from steelyard.text.chat_template import ChatTemplate
from steelyard.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint, ready to run."""

    folder: Path
    base: Path
    """Where the weights, the tokenizer and the template are: the folder itself, or the adapter's base."""
    decoder: Decoder
    adapter: Adapter | None
    tokenizer: Tokenizer
    template: ChatTemplate | None


def open_checkpoint(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Opened:
    """Load a checkpoint with its tokenizer and template.

    Raises:
        CheckpointError: something is missing or does not fit.
    """
    base = manifest.base_of(folder)
    decoder = weights.load(base, dtype)
    adapter = dora.load(folder, decoder) if base != folder else None
    return Opened(folder, base, decoder, adapter, Tokenizer.load(base), ChatTemplate.load(base))
