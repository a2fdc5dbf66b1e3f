"""What was said in a recording: Whisper's decoder, greedily, several recordings at a time, or by beams."""

# B recordings  M mel bands  F frames

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steelyard.checkpoint import manifest
from steelyard.errors import CheckpointError
from steelyard.infer.decoding.beam import Beams
from steelyard.infer.request import Beam
from steelyard.models import seq2seq
from steelyard.models.mel import HOP, RATE, log_mel
from steelyard.models.seq2seq import Whisper
from steelyard.text.tokenizer import Tokenizer

SECONDS = 30
"""Of sound that is listened to at once; shorter sound is followed by silence."""
ROWS = 8
"""Recordings of a forward pass."""
LANGUAGE, TASK = "<|en|>", "<|transcribe|>"


@dataclass(frozen=True)
class Transcriber:
    """A Whisper with its tokenizer, and what is never said."""

    network: Whisper
    tokenizer: Tokenizer
    start: tuple[int, ...]
    """What stands before every transcript."""
    end: int
    suppressed: torch.Tensor
    """`[V]` bool: never a part of a transcript: signs, time stamps, other tasks' marks."""
    suppressed_first: torch.Tensor
    """`[V]` bool: not how one begins."""

    @classmethod
    def load(cls, folder: Path) -> Transcriber:
        """Open a Whisper checkpoint.

        Raises:
            CheckpointError: it is none, or lacks the tokens that transcripts need.
        """
        network, tokenizer = seq2seq.load(folder), Tokenizer.load(folder)
        said = manifest.read_json(folder / "generation_config.json")
        size = network.config.vocab_size
        end, begin, plain = (
            _token(said.get(name), name, size)
            for name in ("eos_token_id", "decoder_start_token_id", "no_timestamps_token_id")
        )
        suppressed, first = (torch.zeros(size, dtype=torch.bool) for _ in range(2))
        for mask, name in ((suppressed, "suppress_tokens"), (first, "begin_suppress_tokens")):
            mask[[_token(token, name, size) for token in said.get(name) or ()]] = True
        suppressed[plain:] = True  # and the time stamps, which come after it
        several = size > 51_864  # the models of one language know of no other, nor of translation
        marks = [_named(tokenizer, mark, size) for mark in (LANGUAGE, TASK)] if several else []
        return cls(network, tokenizer, (begin, *marks, plain), end, suppressed, first)


def is_transcriber(folder: Path) -> bool:
    """Whether a checkpoint is a Whisper."""
    if manifest.kind_of(folder) != "model":
        return False
    described = manifest.read_json(folder / "config.json").get("architectures") or [""]
    return bool(described[0] == seq2seq.ARCHITECTURE)


@torch.inference_mode()
def transcribe(
    transcriber: Transcriber,
    sounds: Sequence[torch.Tensor],
    report: Callable[[int], None] = lambda done: None,
    *,
    beam: int = 1,
) -> list[str]:
    """The texts of recordings; what is longer than 30 s is heard in pieces.

    Args:
        transcriber: a Whisper.
        sounds: each `[S]` float32 of 16 kHz.
        report: told (recordings done).
        beam: beginnings that are kept; 1 takes the likeliest token at each place.
    """
    pieces = ((number, piece) for number in range(len(sounds)) for piece in _pieces(sounds[number]))
    texts = [""] * len(sounds)
    while chosen := list(itertools.islice(pieces, ROWS)):  # no more of them are read than are heard together
        features = torch.stack([_features(piece, transcriber) for _, piece in chosen])
        if beam == 1:
            found = _greedy(transcriber, features)
        else:
            found = [_searched(transcriber, row[None], beam) for row in features]
        for (number, _), tokens in zip(chosen, found, strict=True):
            texts[number] += transcriber.tokenizer.decode(tokens)
        report(chosen[-1][0] + 1)
    return [text.strip() for text in texts]


@torch.inference_mode()
def token_scores(transcriber: Transcriber, sound: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """Log-probabilities `[L + 1, V]` of each token of a transcript and of its end, given those before it.

    Args:
        transcriber: whose.
        sound: `[S]` float32 of 16 kHz, 30 s at the most.
        tokens: of the transcript.
    """
    network = transcriber.network
    features = _features(sound, transcriber)[None]
    memory = network.listen(features.to(network.model.encoder.conv1.weight.dtype))
    given = torch.tensor([[*transcriber.start, *tokens]])
    logits: torch.Tensor = network(given, memory)[0, len(transcriber.start) - 1 :]
    return logits.log_softmax(-1)


@torch.inference_mode()
def transcript_tokens(transcriber: Transcriber, sound: torch.Tensor) -> list[int]:
    """What is said in a piece of at most 30 s, as tokens."""
    return _greedy(transcriber, _features(sound, transcriber)[None])[0]


def _pieces(sound: torch.Tensor) -> list[torch.Tensor]:
    step = SECONDS * RATE
    return [sound[first : first + step] for first in range(0, max(1, len(sound)), step)]


def _features(sound: torch.Tensor, transcriber: Transcriber) -> torch.Tensor:
    config = transcriber.network.config
    padded = torch.zeros(2 * config.max_source_positions * HOP)
    padded[: len(sound)] = sound[: len(padded)]
    return log_mel(padded, config.num_mel_bins)


def _greedy(transcriber: Transcriber, features: torch.Tensor) -> list[list[int]]:
    """The most likely token again and again, until each row has come to its end."""
    network, rows = transcriber.network, len(features)
    memory = network.listen(features.to(network.model.encoder.conv1.weight.dtype))
    found: list[list[int]] = [[] for _ in range(rows)]
    open_rows = list(range(rows))
    token_ids = torch.tensor([transcriber.start] * rows)
    while open_rows and memory.length + 1 < network.config.max_target_positions:
        logits = network(token_ids, memory)[:, -1]
        logits[:, transcriber.suppressed] = -torch.inf
        if memory.length == len(transcriber.start):
            logits[:, transcriber.suppressed_first] = -torch.inf
        best = logits.argmax(-1)
        going = (best != transcriber.end).nonzero().flatten()
        for place in going.tolist():
            found[open_rows[place]].append(int(best[place]))
        if len(going) < len(open_rows):
            memory.keep(going)
        open_rows = [open_rows[place] for place in going.tolist()]
        token_ids = best[going, None]
    return found


def _searched(transcriber: Transcriber, features: torch.Tensor, width: int) -> list[int]:
    """By the likeliest of the transcripts that `width` beams lead to."""
    network, end = transcriber.network, transcriber.end
    memory = network.listen(features.to(network.model.encoder.conv1.weight.dtype))
    most = network.config.max_target_positions - len(transcriber.start)
    beams = Beams(Beam(width=width), frozenset({end}), most)
    token_ids = torch.tensor([transcriber.start])
    while True:
        log_probabilities = network(token_ids, memory)[:, -1].log_softmax(-1)
        log_probabilities[:, transcriber.suppressed] = -torch.inf
        if memory.length == len(transcriber.start):
            log_probabilities[:, transcriber.suppressed_first] = -torch.inf
        steps = beams.advance(log_probabilities)
        if not steps:
            break
        memory.keep(torch.tensor([step.row for step in steps]))
        token_ids = torch.tensor([[step.token] for step in steps])
    best = beams.best()
    return [token for token in best[0].tokens if token != end] if best else []


def _token(value: Any, name: str, size: int) -> int:
    if not isinstance(value, int) or not 0 <= value < size:
        raise CheckpointError(f"generation_config.json: {name} must be a token id of the vocabulary, not {value!r}")
    return value


def _named(tokenizer: Tokenizer, mark: str, size: int) -> int:
    found = tokenizer.token_id(mark)
    return _token(found, mark, size)
