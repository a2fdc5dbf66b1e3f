"""What was said in a recording: Whisper's decoder, greedily, several recordings at a time, or by beams."""

# B recordings  M mel bands  F frames

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from steelyard.checkpoint import manifest
from steelyard.errors import CheckpointError
from steelyard.infer.decoding.beam import Beams
from steelyard.infer.decoding.stepped import Steps
from steelyard.infer.request import Beam
from steelyard.infer.sound import Hearing
from steelyard.models import seq2seq
from steelyard.models.mel import HOP, RATE, log_mel
from steelyard.models.seq2seq import Memory, Whisper
from steelyard.text.tokenizer import Tokenizer

SECONDS = 30
"""Of sound that is listened to at once; shorter sound is followed by silence."""
ROWS = 8
"""Recordings of a forward pass."""
LANGUAGE, TASK = "<|en|>", "<|transcribe|>"
OF_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")
BEFORE = "<|startofprev|>"
NO_SPEECH = ("<|nospeech|>", "<|nocaptions|>")
"""Marks: what was said before follows; nothing is said."""


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
    languages: dict[str, int | None]
    """Marks of the languages that it can be told, by their codes, the one that it takes for granted first; a model of
    one language has none."""
    before: int | None
    """The mark that stands before what was said before."""
    silence: int
    """The token that says that nothing is said."""

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
        languages: dict[str, int | None] = {"en": marks[0] if several else None}
        if several:
            named = ((OF_LANGUAGE.fullmatch(text), token) for token, text in tokenizer.special_tokens.items())
            languages |= {match[1]: token for match, token in named if match is not None and token < plain}
        silence = next((token for mark in NO_SPEECH if (token := _known(tokenizer, mark, size)) is not None), end)
        start, before = (begin, *marks, plain), _known(tokenizer, BEFORE, size)
        return cls(network, tokenizer, start, end, suppressed, first, languages, before, silence)

    def start_of(self, hearing: Hearing) -> tuple[int, ...]:
        """What stands before a transcript of what is heard so; both are known here."""
        start = self.start
        mark = None if hearing.language is None else self.languages[hearing.language]
        if mark is not None:
            start = (start[0], mark, *start[2:])
        if not hearing.prompt.strip():
            return start
        assert self.before is not None, "see the caller"
        said = self.tokenizer.encode_plain(" " + hearing.prompt.strip())
        most = self.network.config.max_target_positions // 2 - 1
        return (self.before, *said[max(0, len(said) - most) :], *start)

    @torch.inference_mode()
    def listen(self, sound: torch.Tensor) -> Memory:
        """Sound `[S]` -> what the decoder attends to."""
        features = _features(sound, self)[None]
        return self.network.listen(features.to(self.network.model.encoder.conv1.weight.dtype))


class Said(NamedTuple):
    """What is said in a piece."""

    tokens: list[int]
    """Without the end."""
    log_probability: float
    """Of them and the end."""
    drawn: int
    """Tokens of the transcript, the end included."""
    rejected: int
    """Tokens of beginnings that did not come back."""
    no_speech: float
    """How likely it is that nothing is said."""


Progress = list[int] | tuple[int, Said]
"""How many tokens each piece has so far; or the number of one, and what is said in it."""


def is_transcriber(folder: Path) -> bool:
    """Whether a checkpoint is a Whisper."""
    if manifest.kind_of(folder) != "model":
        return False
    described = manifest.read_json(folder / "config.json").get("architectures") or [""]
    return bool(described[0] == seq2seq.ARCHITECTURE)


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
        found = whole(hear(transcriber, [piece for _, piece in chosen], Hearing(beam=beam)))
        for (number, _), said in zip(chosen, found, strict=True):
            texts[number] += transcriber.tokenizer.decode(said.tokens)
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
    given = torch.tensor([[*transcriber.start, *tokens]])
    logits: torch.Tensor = transcriber.network(given, transcriber.listen(sound), len(tokens) + 1)[0]
    return logits.log_softmax(-1)


def transcript_tokens(transcriber: Transcriber, sound: torch.Tensor) -> list[int]:
    """What is said in a piece of at most 30 s, as tokens."""
    return whole(hear(transcriber, [sound]))[0].tokens


def whole(hearing: Steps[Progress, None]) -> list[Said]:
    """What is said in each piece, once all are heard."""
    found = dict(told for told in hearing if isinstance(told, tuple))
    return [found[row] for row in range(len(found))]


@torch.inference_mode()
def hear(
    transcriber: Transcriber, sounds: Sequence[torch.Tensor], hearing: Hearing | None = None
) -> Steps[Progress, None]:
    """What is said in pieces, a token of each at a step; each as soon as it is known.

    Args:
        transcriber: whose; it knows the language, and prompts if there is one.
        sounds: pieces of at most 30 s.
        hearing: how; None: as it takes for granted.

    Raises:
        CheckpointError: its figures are not finite.
    """
    hearing = hearing or Hearing()
    start, silent, heard = transcriber.start_of(hearing), [0] * len(sounds), list[Memory]()
    for sound in sounds:
        heard.append(transcriber.listen(sound))
        yield silent
    if hearing.beam == 1:
        yield from _greedy(transcriber, start, Memory.joined(heard))
        return
    for row, memory in enumerate(heard):
        searching = _searching(transcriber, start, memory, hearing.beam)
        rest = [0] * (len(sounds) - row - 1)
        while True:
            try:
                drawn = next(searching)
            except StopIteration as end:
                yield row, end.value
                break
            yield [*([0] * row), drawn, *rest]


def _pieces(sound: torch.Tensor) -> list[torch.Tensor]:
    step = SECONDS * RATE
    return [sound[first : first + step] for first in range(0, max(1, len(sound)), step)]


def _features(sound: torch.Tensor, transcriber: Transcriber) -> torch.Tensor:
    config = transcriber.network.config
    padded = torch.zeros(2 * config.max_source_positions * HOP)
    padded[: len(sound)] = sound[: len(padded)]
    return log_mel(padded, config.num_mel_bins)


def _greedy(transcriber: Transcriber, start: tuple[int, ...], memory: Memory) -> Steps[Progress, None]:
    """The most likely token again and again, until each row has come to its end."""
    network, rows = transcriber.network, len(memory.heard[0][0])
    found: list[list[int]] = [[] for _ in range(rows)]
    sums, drawn, no_speech = [0.0] * rows, [0] * rows, [0.0] * rows
    open_rows = list(range(rows))
    token_ids = torch.tensor([start] * rows)
    while open_rows and memory.length + 1 < network.config.max_target_positions:
        logits, first = _next(transcriber, start, memory, token_ids)
        if first is not None:
            no_speech = first
        log_probabilities = logits.log_softmax(-1)
        best = _allowed(transcriber, logits, memory.length == len(start)).argmax(-1)
        scores = log_probabilities.gather(1, best[:, None]).flatten().tolist()
        going = (best != transcriber.end).nonzero().flatten()
        for place, row in enumerate(open_rows):
            sums[row] += scores[place]
            drawn[row] += 1
        for place in going.tolist():
            found[open_rows[place]].append(int(best[place]))
        if len(going) < len(open_rows):
            memory.keep(going)
        before, open_rows = open_rows, [open_rows[place] for place in going.tolist()]
        token_ids = best[going, None]
        for row in before:
            if row not in open_rows:
                yield row, Said(found[row], sums[row], drawn[row], 0, no_speech[row])
        yield list(drawn)
    for row in open_rows:
        yield row, Said(found[row], sums[row], drawn[row], 0, no_speech[row])


def _searching(transcriber: Transcriber, start: tuple[int, ...], memory: Memory, width: int) -> Steps[int, Said]:
    """The likeliest of the transcripts that `width` beams lead to."""
    most = transcriber.network.config.max_target_positions - len(start)
    beams = Beams(Beam(width=width), frozenset({transcriber.end}), most)
    token_ids = torch.tensor([start])
    drawn, no_speech = 0, [0.0]
    while True:
        logits, first = _next(transcriber, start, memory, token_ids)
        if first is not None:
            no_speech = first
        steps = beams.advance(_allowed(transcriber, logits.log_softmax(-1), memory.length == len(start)))
        drawn += max(1, len(steps))
        yield drawn
        if not steps:
            break
        memory.keep(torch.tensor([step.row for step in steps]))
        token_ids = torch.tensor([[step.token] for step in steps])
    if not (ended := beams.best()):
        return Said([], 0.0, drawn, 0, no_speech[0])
    best = ended[0]
    tokens = [token for token in best.tokens if token != transcriber.end]
    own = len(best.tokens)
    return Said(tokens, best.score * own, own, max(0, drawn - own), no_speech[0])


def _next(
    transcriber: Transcriber, start: tuple[int, ...], memory: Memory, token_ids: torch.Tensor
) -> tuple[torch.Tensor, list[float] | None]:
    """Logits of what follows `[B, V]`; at the start also how likely it is that nothing is said."""
    if memory.length:
        return transcriber.network(token_ids, memory)[:, -1], None
    own = len(transcriber.start)  # what stands before that says what was said before
    logits = transcriber.network(token_ids, memory, own)
    if not bool(logits.isfinite().all()):
        raise CheckpointError("the model's figures are not finite: its weights are broken")
    place = -1 if transcriber.silence == transcriber.end else 0
    return logits[:, -1], logits[:, place].softmax(-1)[:, transcriber.silence].tolist()


def _allowed(transcriber: Transcriber, scores: torch.Tensor, first: bool) -> torch.Tensor:
    """Scores `[B, V]` without those of what is never said."""
    masked = scores.masked_fill(transcriber.suppressed, -torch.inf)
    return masked.masked_fill(transcriber.suppressed_first, -torch.inf) if first else masked


def _token(value: Any, name: str, size: int) -> int:
    if not isinstance(value, int) or not 0 <= value < size:
        raise CheckpointError(f"generation_config.json: {name} must be a token id of the vocabulary, not {value!r}")
    return value


def _named(tokenizer: Tokenizer, mark: str, size: int) -> int:
    found = tokenizer.token_id(mark)
    return _token(found, mark, size)


def _known(tokenizer: Tokenizer, mark: str, size: int) -> int | None:
    found = tokenizer.token_id(mark)
    return found if found is not None and found < size else None
