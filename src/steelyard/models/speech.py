"""A recogniser of speech: Whisper's encoder, and at each place a character or none (CTC: Graves et al. 2006).

config.json: "architectures": ["SteelyardSpeechCTC"], the encoder's sizes, "vocabulary": every character, from 1 on
"""

# B rows  M mel bands  F frames  P places, F / 2  K characters and the blank, which is 0

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import nn

from steelyard.checkpoint import manifest
from steelyard.errors import CheckpointError
from steelyard.models import seq2seq, weights
from steelyard.models.inputs import padded_features
from steelyard.models.mel import HOP, log_mel
from steelyard.models.ngram import CharacterModel
from steelyard.models.seq2seq import WhisperConfig, WhisperEncoder

ARCHITECTURE = manifest.SPEECH
MAX_CHARACTERS = 65_536
PLACES = 6000
"""Most places of a forward pass that recognises."""


class SpeechCTC(nn.Module):
    """See the module."""

    def __init__(self, config: WhisperConfig, characters: int) -> None:
        super().__init__()
        self.config = config
        self.encoder = WhisperEncoder(config)
        self.classifier = nn.Linear(config.d_model, characters + 1)

    def forward(self, features: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """Features `[B, M, F]`, 0 behind each row's frames `[B]` -> logits `[B, P, K]`."""
        logits: torch.Tensor = self.classifier(self.encoder(features, frames))
        return logits


@dataclass(frozen=True)
class Recogniser:
    """A network and what its characters are."""

    network: SpeechCTC
    vocabulary: tuple[str, ...]
    language: CharacterModel | None = None
    """Of the texts that it learnt from."""

    @property
    def context(self) -> int:
        """Most frames of a recording."""
        return 2 * self.network.config.max_source_positions

    def pieces(self, sound: torch.Tensor) -> list[torch.Tensor]:
        """Features `[M, F]` of samples `[S]`, in pieces that the network takes."""
        step = self.context * HOP
        return [self.features(sound[first : first + step]) for first in range(0, max(1, len(sound)), step)]

    def features(self, sound: torch.Tensor) -> torch.Tensor:
        """Samples `[S]` -> `[M, F]`."""
        short = torch.nn.functional.pad(sound, (0, max(0, 4 * HOP - len(sound))))
        return log_mel(short, self.network.config.num_mel_bins)


def normalised(text: str) -> str:
    """A text as it is learnt and judged: small letters, digits and apostrophes, with single spaces between words."""
    plain = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    kept = (letter if letter == "'" or unicodedata.category(letter)[0] in "LMN" else " " for letter in plain)
    return " ".join("".join(kept).split())


def places_of(frames: torch.Tensor) -> torch.Tensor:
    """How many places so many frames have."""
    return (frames + 1) // 2


@torch.inference_mode()
def logits_of(
    recogniser: Recogniser, features: Sequence[torch.Tensor], report: Callable[[int], None] = lambda done: None
) -> list[torch.Tensor]:
    """Logits of each row `[P, K]` float32; rows of like length run together."""
    order = sorted(range(len(features)), key=lambda row: -features[row].shape[-1])
    found: list[torch.Tensor] = [torch.empty(0)] * len(order)
    dtype = recogniser.network.encoder.conv1.weight.dtype  # the last layer may be of integers
    done = 0
    while done < len(order):
        count = max(1, 2 * PLACES // features[order[done]].shape[-1])
        chosen = order[done : done + count]
        joined, frames = padded_features([features[row] for row in chosen])
        logits = recogniser.network(joined.to(dtype), frames).float()
        for row, places, found_here in zip(chosen, places_of(frames).tolist(), logits, strict=True):
            found[row] = found_here[:places]
        done += len(chosen)
        report(done)
    return found


def greedy(logits: torch.Tensor, vocabulary: Sequence[str]) -> str:
    """The text of the best character at every place of `[P, K]`: repeated ones are one, blanks are none."""
    return " ".join("".join(vocabulary[number - 1] for number in best_characters(logits)).split())


def best_characters(logits: torch.Tensor) -> list[int]:
    """The same by their numbers."""
    return [number for number, _ in itertools.groupby(logits.argmax(-1).tolist()) if number]


def save(recogniser: Recogniser, folder: Path) -> None:
    """Write a recogniser's files into `folder`."""
    sizes = msgspec.to_builtins(recogniser.network.config)
    described = {"architectures": [ARCHITECTURE], **sizes, "vocabulary": list(recogniser.vocabulary)}
    tensors = {name: tensor.detach().contiguous() for name, tensor in recogniser.network.state_dict().items()}
    save_file(tensors, folder / weights.WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n")
    if recogniser.language is not None:
        recogniser.language.save(folder)


def is_recogniser(folder: Path) -> bool:
    """Whether a checkpoint is one of ours."""
    if manifest.kind_of(folder) != "model":
        return False
    described = manifest.read_json(folder / "config.json").get("architectures") or [""]
    return bool(described[0] == ARCHITECTURE)


def load(folder: Path) -> Recogniser:
    """Open a recogniser for evaluation.

    Raises:
        CheckpointError: it is none, or its weights do not fit its config.json.
    """
    raw = manifest.read_json(folder / "config.json")
    vocabulary = raw.get("vocabulary")
    whole = isinstance(vocabulary, list) and all(isinstance(each, str) and len(each) == 1 for each in vocabulary)
    if not whole or not 0 < len(vocabulary or ()) <= MAX_CHARACTERS:
        raise CheckpointError(f"'{folder}/config.json': vocabulary must be a list of characters")
    network = SpeechCTC(WhisperConfig.parse(raw), len(vocabulary or ()))
    weights.fill(network, weights.read_tensors(folder), folder)
    return Recogniser(network.eval().requires_grad_(False), tuple(vocabulary or ()), CharacterModel.load(folder))


def on_trained(folder: Path, vocabulary: Sequence[str], generator: torch.Generator) -> Recogniser:
    """A recogniser on a trained encoder, Whisper's or another recogniser's; its last layer new if the characters are.

    Raises:
        CheckpointError: the checkpoint is neither.
    """
    if is_recogniser(folder):
        opened = load(folder)
        if opened.vocabulary == tuple(vocabulary):
            return Recogniser(opened.network.requires_grad_(True), opened.vocabulary)
        config, encoder = opened.network.config, opened.network.encoder
    else:
        whisper = seq2seq.load(folder)
        config, encoder = whisper.config, whisper.model.encoder
    network = SpeechCTC(config, len(vocabulary))
    network.encoder = encoder.requires_grad_(True)
    with torch.no_grad():
        network.classifier.weight.normal_(0, 0.02, generator=generator)
        network.classifier.bias.zero_()
    return Recogniser(network, tuple(vocabulary))
