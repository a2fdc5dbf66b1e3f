"""Training a recogniser of speech, and opening whatever transcribes: ours, or Whisper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from steelyard.checkpoint import manifest
from steelyard.checkpoint.sources import resolve
from steelyard.data import audio, audio_augmentation, augmentation
from steelyard.data.audio import Recording
from steelyard.errors import ConfigError, DataError
from steelyard.evaluate.transcription import character_error_rate
from steelyard.infer import recognition, transcription
from steelyard.models import speech
from steelyard.models.mel import HOP, RATE
from steelyard.models.ngram import CharacterModel
from steelyard.models.seq2seq import WhisperConfig, sines
from steelyard.models.speech import Recogniser, SpeechCTC, normalised
from steelyard.runs import Run
from steelyard.stages.tasks.prepared import DTYPES, Prepared, digest_of, named, parts
from steelyard.train.config import DataConfig, TrainConfig
from steelyard.train.networks import SpeechNetwork
from steelyard.train.transcription import Spoken, Transcription

ORDER = 5
"""Of the model of characters."""
Digested = tuple[Recording, str]
Transcribe = Callable[[Sequence[torch.Tensor], Callable[[int], None]], list[str]]


def transcribes(folder: Path) -> bool:
    """Whether a checkpoint turns recordings into texts."""
    return speech.is_recogniser(folder) or transcription.is_transcriber(folder)


def open_transcriber(folder: Path, beam: int = 1) -> Transcribe:
    """What turns samples into texts, by so many beams. Raises CheckpointError: files that do not fit each other."""
    if transcription.is_transcriber(folder):
        return partial(transcription.transcribe, transcription.Transcriber.load(folder), beam=beam)
    return partial(recognition.recognise, speech.load(folder), beam=beam)


def prepare(config: TrainConfig) -> Prepared:
    """Find a run's recordings. Raises as `stages.train.train` does."""
    augmentation.check(config.augment, augmentation.SOUND)
    learnt, held, digests, notes = _parts(config)
    base = None if config.model is None else resolve(config.model)
    vocabulary = sorted({letter for row, _ in learnt for letter in normalised(str(row.text))})

    def build(run: Run) -> Transcription:
        for note in notes:
            run.log(note)
        texts = (normalised(str(row.text)) for row, _ in learnt)
        recogniser = replace(_recogniser(config, base, vocabulary), language=CharacterModel.learn(texts, ORDER))
        return Transcription(
            recogniser,
            _spoken(recogniser, learnt, config.data, run),
            _spoken(recogniser, held, config.data, run),
            {"validation_cer": character_error_rate},
            dtype=DTYPES[config.dtype],
            augment=partial(audio_augmentation.augmented, config=config.augment, longest=recogniser.context),
        )

    counts = {"rows": len(learnt), "validation_rows": len(held), "characters": len(vocabulary)}
    parent = None if base is None else manifest.read(base).id
    return Prepared(config=config, counts=counts, parent=parent, build=build, digests=digests)


def _recogniser(config: TrainConfig, base: Path | None, vocabulary: Sequence[str]) -> Recogniser:
    if base is not None:
        return speech.on_trained(base, vocabulary, torch.Generator().manual_seed(config.seed))
    network = config.network
    assert isinstance(network, SpeechNetwork), "checked before"
    sizes = WhisperConfig(
        vocab_size=len(vocabulary) + 1,
        d_model=network.hidden,
        encoder_layers=network.layers,
        decoder_layers=1,
        encoder_attention_heads=network.heads,
        decoder_attention_heads=network.heads,
        encoder_ffn_dim=4 * network.hidden,
        decoder_ffn_dim=4 * network.hidden,
        dropout=network.dropout,
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        made = SpeechCTC(sizes, len(vocabulary))
        made.encoder.embed_positions.weight.data.copy_(sines(sizes.max_source_positions, sizes.d_model))
    return Recogniser(made, tuple(vocabulary))


def _parts(config: TrainConfig) -> tuple[list[Digested], list[Digested], dict[str, str], list[str]]:
    """What to learn from, what to validate on (no text is in both), the digests of both lists with their files, and
    what is to be said of recordings that are not there.
    """
    data = config.data
    notes: list[str] = []
    rows = _texted(Path(data.train), data, notes)
    train = _together(rows)
    if data.deduplicate:
        rows = list({(row.text, digest): (row, digest) for row, digest in reversed(rows)}.values())[::-1]

    def key(row: Digested) -> str:
        return normalised(str(row[0].text))

    learnt, held = parts(config, rows, lambda path: _texted(path, data, notes), key, lambda row: row[0])
    return learnt, held, named(config, train, _together(held) if data.validation else None), notes


def _texted(path: Path, data: DataConfig, notes: list[str]) -> list[Digested]:
    rows = [row for _, row in audio.listed(path, data)]
    found: list[Digested] = []
    for row in rows:
        if row.text is None or not normalised(row.text):
            raise DataError("must say what is spoken", file=row.file, line=row.line, field=data.text)
        try:
            found.append((row, audio.digest(row)))
        except DataError as error:
            if len(notes) >= data.bad_files:
                raise
            notes.append(f"left out: {error}")
    return found


def _together(rows: Sequence[Digested]) -> str:
    return digest_of((f"{row.text}: {row.path.name}", digest) for row, digest in rows)


def _spoken(recogniser: Recogniser, rows: Sequence[Digested], data: DataConfig, run: Run) -> list[Spoken]:
    made, bad = [], 0
    for row, _ in rows:
        try:
            features = recogniser.features(audio.read(row))
            if features.shape[-1] > recogniser.context:
                seconds = recogniser.context * HOP / RATE
                raise DataError(f"'{row.path}' is longer than {seconds:.0f} s: part it", file=row.file, line=row.line)
        except DataError as error:
            bad += 1
            if bad > data.bad_files:
                advice = f"{error.reason}; mend it, or let so many be left out by data.bad_files"
                raise DataError(advice, file=error.file, line=error.line) from None
            run.log(f"left out: {error}")
            continue
        made.append(Spoken(features, normalised(str(row.text))))
    if rows and not made:
        raise ConfigError("no recording could be read")
    return made
