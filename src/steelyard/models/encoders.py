"""Encoders that are trained themselves: as masked language models, as sentence embeddings; in Hugging Face's layout."""

# B rows  L longest row  N places  D width  V vocabulary

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from steelyard.errors import CheckpointError
from steelyard.models import classifiers, quantized, weights
from steelyard.models.encoder import ACTIVATIONS, Encoder, EncoderConfig
from steelyard.text.tokenizer import Tokenizer

MASKS = ("[MASK]", "<mask>", "<|mask|>")
HEAD = "cls.predictions."


class MaskedEncoder(nn.Module):
    """An encoder with a head over the vocabulary, whose matrix is the embeddings'."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = Encoder(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, token_ids: torch.Tensor, lengths: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Token ids `[B, L]`, lengths `[B]`, places in the flat `[B * L]`: `[N]` -> logits `[N, V]`."""
        states = self.bert(token_ids, lengths).flatten(0, 1)[places]
        x = self.norm(F.gelu(self.dense(states), approximate=ACTIVATIONS[self.config.hidden_act]))
        return F.linear(x, self.bert.embeddings.word_embeddings.weight, self.bias)


NAMES = {
    "dense.weight": f"{HEAD}transform.dense.weight",
    "dense.bias": f"{HEAD}transform.dense.bias",
    "norm.weight": f"{HEAD}transform.LayerNorm.weight",
    "norm.bias": f"{HEAD}transform.LayerNorm.bias",
    "bias": f"{HEAD}bias",
}
"""Ours -> Hugging Face's, where they differ."""


@dataclass(frozen=True)
class MaskedModel:
    """A network that finds hidden tokens, with its tokenizer."""

    network: MaskedEncoder
    tokenizer: Tokenizer
    mask: int
    """The token that hides others."""
    origin: Path
    """Where the tokenizer's files are."""


@dataclass(frozen=True)
class SentenceModel:
    """An encoder of sentences, with its tokenizer."""

    network: Encoder
    tokenizer: Tokenizer
    origin: Path


def fresh(config: EncoderConfig, seed: int) -> Encoder:
    """An encoder that begins from nothing, its matrices drawn as BERT's are."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = Encoder(config)
        for module in encoder.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, 0, 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
    return encoder


def masked(encoder: Encoder, origin: Path, seed: int) -> MaskedModel:
    """A masked language model on an encoder: with the head that its checkpoint has, or a new one.

    Raises:
        CheckpointError: its tokenizer knows no token that hides others.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = MaskedEncoder(msgspec.structs.replace(encoder.config, classes=0))
    network.bert = encoder.requires_grad_(True)
    nn.init.normal_(network.dense.weight, 0, 0.02, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(network.dense.bias)
    if (origin / weights.WEIGHTS).is_file():
        kept = weights.read_tensors(origin)
        own = network.state_dict()
        found = {ours: kept[theirs] for ours, theirs in NAMES.items() if theirs in kept}
        if len(found) == len(NAMES) and all(own[name].shape == tensor.shape for name, tensor in found.items()):
            network.load_state_dict({**own, **{name: tensor.to(own[name].dtype) for name, tensor in found.items()}})
    tokenizer = Tokenizer.load(origin)
    known = [token for token in map(tokenizer.token_id, MASKS) if token is not None]
    if not known:
        raise CheckpointError(f"'{origin}': its tokenizer has none of {', '.join(MASKS)}, which hide others")
    return MaskedModel(network, tokenizer, known[0], origin)


def sentence(folder: Path) -> SentenceModel:
    """An encoder to be trained for sentences. Raises as `classifiers.load_encoder` does."""
    encoder = classifiers.load_encoder(folder)
    quantized.demand_dense(encoder, folder)
    return SentenceModel(encoder.requires_grad_(True), Tokenizer.load(folder), folder)


def save_masked(model: MaskedModel, folder: Path) -> None:
    """Write a masked language model's files into `folder`."""
    tensors = {NAMES.get(name, name): tensor for name, tensor in model.network.state_dict().items()}
    _save("BertForMaskedLM", model.network.config, tensors, model.origin, folder)


def save_sentence(model: SentenceModel, folder: Path) -> None:
    """Write an encoder's files into `folder`."""
    _save("BertModel", model.network.config, model.network.state_dict(), model.origin, folder)


def _save(
    architecture: str, config: EncoderConfig, tensors: dict[str, torch.Tensor], origin: Path, folder: Path
) -> None:
    values: dict[str, Any] = {name: value for name, value in msgspec.to_builtins(config).items() if name != "classes"}
    described = {"architectures": [architecture], "model_type": "bert", **values}
    kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(kept, folder / weights.WEIGHTS, metadata={"format": "pt"})
    weights.copy_companions(origin, folder)
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
