"""What a network that hears makes of pieces of recordings, a step at a time: Whisper, and recognisers by characters.

Samples in, transcripts out, with what is known of them. It knows neither queues nor processes.
"""

# S samples  P places  K characters and the blank

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from steelyard.errors import CheckpointError, ConfigError
from steelyard.infer import recognition, transcription
from steelyard.infer.decoding.stepped import Steps
from steelyard.infer.sound import MOST_BEAMS, SOUND_RATE, TOKEN_SAMPLES, Heard, Hearing, Hears
from steelyard.infer.transcription import ROWS, SECONDS, Said, Transcriber
from steelyard.models import speech
from steelyard.models.mel import HOP
from steelyard.models.speech import Recogniser

PLACES = 3000
"""Of a pass of a recogniser, padding included."""
HEARD_BYTES = 512 << 20
"""What a Whisper's rows may keep of what they heard."""
CANARY_SAMPLES = 4 * HOP


class Transcript(NamedTuple):
    """Of a piece."""

    text: str
    """Begins with a space where a word does."""
    tokens: list[int]
    drawn: int
    """Tokens of the transcript, its end included."""
    rejected: int
    """Tokens of beginnings that did not come back."""
    heard: Heard


Progress = list[int] | tuple[int, Transcript]
"""How many tokens each piece has so far; or the number of one, and its transcript."""


class Hearer(Protocol):
    """A network that hears."""

    hears: Hears

    def size(self, samples: int) -> float:
        """Which share of a pass a piece takes."""
        ...

    def hear(self, sounds: Sequence[torch.Tensor], hearing: Hearing) -> Steps[Progress, None]:
        """Transcripts of pieces `[S]`, each as soon as it is known.

        Raises:
            CheckpointError: its figures are not finite.
        """
        ...

    def canary(self) -> None:
        """Hear next to nothing. Raises CheckpointError: its figures are not finite."""
        ...


class WhisperHearer:
    """A Whisper: several pieces together, each as if it were half a minute."""

    def __init__(self, transcriber: Transcriber) -> None:
        self._transcriber, config = transcriber, transcriber.network.config
        row = 2 * 4 * config.decoder_layers * config.max_source_positions * config.d_model
        self._rows = max(1, min(ROWS, HEARD_BYTES // row))
        self.hears = Hears(
            piece=SECONDS * SOUND_RATE,
            written=config.max_target_positions,
            languages=list(transcriber.languages),
            prompts=transcriber.before is not None,
            words=False,
            beams=max(1, min(MOST_BEAMS, HEARD_BYTES // row)),
        )

    def size(self, samples: int) -> float:
        """See `Hearer`."""
        return 1 / self._rows

    def hear(self, sounds: Sequence[torch.Tensor], hearing: Hearing) -> Steps[Progress, None]:
        """See `Hearer`."""
        for told in transcription.hear(self._transcriber, sounds, hearing):
            yield told if isinstance(told, list) else (told[0], self._transcript(told[1]))

    def _transcript(self, said: Said) -> Transcript:
        heard = Heard(average_logprob=said.log_probability / max(1, said.drawn), no_speech=said.no_speech)
        text = self._transcriber.tokenizer.decode(said.tokens)
        return Transcript(text, said.tokens, said.drawn, said.rejected, heard)

    @torch.inference_mode()
    def canary(self) -> None:
        """See `Hearer`."""
        network = self._transcriber.network
        weight = network.model.encoder.conv1.weight
        features = torch.zeros(1, network.config.num_mel_bins, 4, dtype=weight.dtype)
        _check_finite(network(torch.tensor([self._transcriber.start]), network.listen(features), 1))


class CharacterHearer:
    """A recogniser: a character or none at each place, greedily or by beams; each word has its time."""

    def __init__(self, recogniser: Recogniser) -> None:
        self._recogniser = recogniser
        self.hears = Hears(
            piece=recogniser.context * HOP,
            written=recogniser.context // 2,
            written_per_token=TOKEN_SAMPLES // (2 * HOP) + 1,  # a place may be begun before and after
            languages=[],
            prompts=False,
            words=True,
        )

    def size(self, samples: int) -> float:
        """See `Hearer`."""
        return max(1, samples // (2 * HOP)) / PLACES

    def hear(self, sounds: Sequence[torch.Tensor], hearing: Hearing) -> Steps[Progress, None]:
        """See `Hearer`."""
        recogniser, nothing = self._recogniser, [0] * len(sounds)
        logits = speech.logits_of(recogniser, [recogniser.features(sound) for sound in sounds])
        for row in logits:
            _check_finite(row)
        for number, row in enumerate(logits):
            characters, others = speech.best_characters(row), 0
            if hearing.beam > 1:
                searching = recognition.searching(recogniser, row, hearing.beam)
                while True:
                    yield nothing
                    try:
                        next(searching)
                    except StopIteration as end:
                        best, *rejected = end.value
                        break
                characters, others = list(best.characters), sum(len(one.characters) for one in rejected)
            yield number, self._transcript(row, characters, others, hearing)

    def _transcript(self, logits: torch.Tensor, characters: list[int], others: int, hearing: Hearing) -> Transcript:
        text = recognition.spelled(self._recogniser, characters)
        shares = logits.log_softmax(-1)
        heard = Heard(
            average_logprob=float(shares.amax(-1).mean()),
            no_speech=float(shares[:, 0].sum().exp()),
            words=recognition.words(self._recogniser, logits, text) if hearing.words else None,
        )
        return Transcript(f" {text}" if text else "", characters, len(characters), others, heard)

    def canary(self) -> None:
        """See `Hearer`."""
        (logits,) = speech.logits_of(self._recogniser, [self._recogniser.features(torch.zeros(CANARY_SAMPLES))])
        _check_finite(logits)


def open_hearer(folder: Path) -> Hearer | None:
    """The hearer of a checkpoint; None: it does not hear.

    Raises:
        CheckpointError: its files do not fit each other.
        ConfigError: the libraries that decode recordings are not installed.
    """
    if not (folder / "config.json").is_file():
        return None  # whoever opens it as something else says what is missing
    hearer: Hearer
    if transcription.is_transcriber(folder):
        hearer = WhisperHearer(Transcriber.load(folder))
    elif speech.is_recogniser(folder):
        hearer = CharacterHearer(speech.load(folder))
    else:
        return None
    if any(find_spec(library) is None for library in ("soundfile", "soxr")):  # the server decodes what is heard
        raise ConfigError("recordings need two libraries more: pip install 'steelyard[audio]'")
    return hearer


def _check_finite(figures: torch.Tensor) -> None:
    if not bool(figures.isfinite().all()):
        raise CheckpointError("the model's figures are not finite: its weights are broken")
