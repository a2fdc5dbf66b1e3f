"""Text classifiers: tokens in, a logit for each class out; from scratch, from a trained encoder, from a checkpoint.

config.json: "architectures": ["SteelyardRecurrentClassifier"], the network's sizes, "id2label"
"""

# B rows  L longest row  C classes

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from torch import nn

from steelyard.checkpoint import manifest
from steelyard.errors import CheckpointError
from steelyard.models import weights
from steelyard.models.encoder import Encoder, EncoderClassifier, EncoderConfig
from steelyard.models.recurrent import RecurrentClassifier, RecurrentConfig
from steelyard.text.tokenizer import Tokenizer

ROWS, TOKENS = 64, 8192
"""Most rows and tokens of a forward pass that measures."""
RECURRENT, ENCODER = "SteelyardRecurrentClassifier", "SteelyardEncoderClassifier"
ENCODERS = ("BertModel", "BertForMaskedLM")
"""Trained encoders that a classifier is made from."""


Network = RecurrentClassifier | EncoderClassifier
"""Token ids `[B, L]`, padded on the right, and lengths `[B]` -> logits `[B, C]`."""


@dataclass(frozen=True)
class TextClassifier:
    """A network with its tokenizer and what its classes are called."""

    network: Network
    tokenizer: Tokenizer
    labels: tuple[str, ...]
    origin: Path
    """Where its tokenizer's files are."""

    def all_tokens(self, text: str) -> list[int]:
        """All of a text, however long; at least one token."""
        return self.tokenizer.encode_plain(text, add_special_tokens=True) or [0]

    def tokens(self, text: str) -> list[int]:
        """What the network reads of a text: no more than its context."""
        return self.all_tokens(text)[: self.network.context]


def architecture(folder: Path) -> str:
    """What a model's config.json says that it is; empty: nothing."""
    named = manifest.read_json(folder / "config.json").get("architectures") or [""]
    return str(named[0])


def is_classifier(folder: Path) -> bool:
    """Whether a checkpoint is one of ours."""
    return manifest.kind_of(folder) == "model" and architecture(folder) in (RECURRENT, ENCODER)


def load(folder: Path) -> TextClassifier:
    """Open a classifier for evaluation.

    Raises:
        CheckpointError: it is none, or its weights do not fit its config.json.
    """
    raw = manifest.read_json(folder / "config.json")
    labels = _labels(raw, folder)
    kind = architecture(folder)
    if kind == ENCODER:
        network: Network = EncoderClassifier(EncoderConfig.parse(raw, len(labels)))
    elif kind == RECURRENT:
        network = RecurrentClassifier(_recurrent(raw, len(labels), folder))
    else:
        raise CheckpointError(f"'{folder}' is no classifier: its architecture is '{kind}'")
    _fill(network, weights.read_tensors(folder), folder)
    return TextClassifier(network.eval().requires_grad_(False), Tokenizer.load(folder), labels, folder)


def load_encoder(folder: Path) -> Encoder:
    """Open a trained encoder.

    Raises:
        CheckpointError: it is none that is known here, or its weights do not fit its config.json.
    """
    kind = architecture(folder)
    if kind not in ENCODERS:
        raise CheckpointError(
            f"'{folder}': architecture '{kind}' is no encoder that is known here: {', '.join(ENCODERS)}"
        )
    encoder = Encoder(EncoderConfig.parse(manifest.read_json(folder / "config.json")))
    wanted = encoder.state_dict().keys()
    tensors = {name.removeprefix("bert."): tensor for name, tensor in weights.read_tensors(folder).items()}
    _fill(encoder, {name: tensor for name, tensor in tensors.items() if name in wanted}, folder)
    return encoder.eval().requires_grad_(False)


def on_encoder(folder: Path, labels: Sequence[str], generator: torch.Generator) -> TextClassifier:
    """A classifier on a trained encoder, its last layer new. Raises as `load_encoder` does."""
    encoder = load_encoder(folder)
    network = EncoderClassifier(msgspec.structs.replace(encoder.config, classes=len(labels)))
    network.encoder = encoder.requires_grad_(True)
    with torch.no_grad():
        network.classifier.weight.normal_(0, 0.02, generator=generator)
        network.classifier.bias.zero_()
    return TextClassifier(network, Tokenizer.load(folder), tuple(labels), folder)


def save(classifier: TextClassifier, folder: Path) -> None:
    """Write a classifier's files into `folder`."""
    network = classifier.network
    config: Any = network.config
    values = {name: value for name, value in msgspec.to_builtins(config).items() if name != "classes"}
    kind = RECURRENT if isinstance(network, RecurrentClassifier) else ENCODER
    names = {str(number): label for number, label in enumerate(classifier.labels)}
    text = json.dumps({"architectures": [kind], **values, "id2label": names}, indent=2, ensure_ascii=False)
    tensors = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / weights.WEIGHTS, metadata={"format": "pt"})
    weights.copy_companions(classifier.origin, folder)
    (folder / "config.json").write_text(text + "\n")


def padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids -> `[B, L]` int64, padded with 0 on the right, and lengths `[B]`."""
    lengths = torch.tensor([len(row) for row in rows])
    token_ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for number, row in enumerate(rows):
        token_ids[number, : len(row)] = torch.tensor(row)
    return token_ids, lengths


@torch.inference_mode()
def log_probabilities(
    classifier: TextClassifier, rows: Sequence[Sequence[int]], report: Callable[[int], None] = lambda done: None
) -> torch.Tensor:
    """Of every class for every row of tokens, `[R, C]` float32, in nats; rows of like length run together.

    Raises:
        CheckpointError: a figure that is not a number: the weights are broken.
    """
    scores = torch.empty(len(rows), len(classifier.labels))
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    done = 0
    while done < len(order):
        count = max(1, min(ROWS, TOKENS // len(rows[order[min(done + ROWS, len(order)) - 1]])))
        chosen = order[done : done + count]
        logits = classifier.network(*padded([rows[row] for row in chosen]))
        scores[torch.tensor(chosen)] = logits.float().log_softmax(-1)
        done += count
        report(min(done, len(order)))
    if not bool(scores.isfinite().all()):
        raise CheckpointError("the model's figures are not finite: its weights are broken, pull or train anew")
    return scores


def _labels(raw: dict[str, Any], folder: Path) -> tuple[str, ...]:
    names = raw.get("id2label")
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))) or len(names) < 2:
        raise CheckpointError(f"'{folder}/config.json': id2label must name at least two classes, from 0 on")
    return tuple(str(names[str(number)]) for number in range(len(names)))


def _recurrent(raw: dict[str, Any], classes: int, folder: Path) -> RecurrentConfig:
    try:
        known = {name: raw[name] for name in RecurrentConfig.__struct_fields__ if name in raw}
        config = msgspec.convert({**known, "classes": classes}, RecurrentConfig)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"'{folder}/config.json': {error}") from None
    sizes = (config.vocab_size, config.embedding_size, config.hidden_size, config.dense_size)
    if min(sizes) < 1 or max(sizes) > 1 << 20:
        raise CheckpointError(f"'{folder}/config.json': every size must be at least 1 and at most {1 << 20}")
    return config


def _fill(network: nn.Module, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    wanted = network.state_dict()
    for name in sorted(wanted.keys() ^ tensors.keys()):
        what = "lacks" if name in wanted else "has an unknown"
        raise CheckpointError(f"'{folder}' {what} '{name}': its weights do not fit its config.json")
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape:
            shapes = f"{tuple(tensors[name].shape)}, config.json says {tuple(tensor.shape)}"
            raise CheckpointError(f"'{folder}': '{name}' is {shapes}")
    network.load_state_dict({name: tensors[name].to(wanted[name].dtype) for name in wanted})
