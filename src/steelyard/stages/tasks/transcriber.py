"""Training a recogniser of speech, and opening whatever transcribes: ours, or Whisper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from steelyard.checkpoint import manifest
from steelyard.checkpoint.sources import resolve
from steelyard.data import audio, audio_augmentation, augmentation
from steelyard.data.audio import Recording
from steelyard.data.split import parted
from steelyard.errors import ConfigError, DataError
from steelyard.evaluate.transcription import character_error_rate
from steelyard.infer import transcription
from steelyard.models import speech
from steelyard.models.mel import HOP, RATE
from steelyard.models.seq2seq import WhisperConfig, sines
from steelyard.models.speech import Recogniser, SpeechCTC, normalised
from steelyard.runs import Run
from steelyard.stages.tasks.prepared import DTYPES, Prepared, check_one_way, digest_of
from steelyard.train.config import DataConfig, TrainConfig
from steelyard.train.networks import SpeechNetwork
from steelyard.train.transcription import Spoken, Transcription

Digested = tuple[Recording, str]
Transcribe = Callable[[Sequence[torch.Tensor], Callable[[int], None]], list[str]]


def transcribes(folder: Path) -> bool:
    """Whether a checkpoint turns recordings into texts."""
    return speech.is_recogniser(folder) or transcription.is_transcriber(folder)


def open_transcriber(folder: Path) -> Transcribe:
    """What turns samples into texts. Raises CheckpointError: the checkpoint's files do not fit each other."""
    if transcription.is_transcriber(folder):
        return partial(transcription.transcribe, transcription.Transcriber.load(folder))
    recogniser = speech.load(folder)

    def recognise(sounds: Sequence[torch.Tensor], report: Callable[[int], None]) -> list[str]:
        pieces = [(number, piece) for number in range(len(sounds)) for piece in recogniser.pieces(sounds[number])]
        texts = [""] * len(sounds)
        logits = speech.logits_of(recogniser, [piece for _, piece in pieces], report)
        for (number, _), found in zip(pieces, logits, strict=True):
            texts[number] = f"{texts[number]} {speech.greedy(found, recogniser.vocabulary)}".strip()
        return texts

    return recognise


def prepare(config: TrainConfig) -> Prepared:
    """Find a run's recordings. Raises as `stages.train.train` does."""
    augmentation.check(config.augment, augmentation.SOUND)
    learnt, held, digests = _parts(config)
    base = None if config.model is None else resolve(config.model)
    vocabulary = sorted({letter for row, _ in learnt for letter in normalised(str(row.text))})

    def build(run: Run) -> Transcription:
        recogniser = _recogniser(config, base, vocabulary)
        return Transcription(
            recogniser,
            _spoken(recogniser, learnt, config.data, run),
            [row for row in _spoken(recogniser, held, config.data, run) if set(row.text) <= set(vocabulary)],
            {"validation_cer": character_error_rate},
            dtype=DTYPES[config.dtype],
            augment=partial(audio_augmentation.augmented, config=config.augment),
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


def _parts(config: TrainConfig) -> tuple[list[Digested], list[Digested], dict[str, str]]:
    """What to learn from, what to validate on (no text is in both), and the digests of both lists with their files."""
    data = config.data
    rows = _texted(Path(data.train), data)
    digests = {Path(data.train).name: _together(rows)}
    if data.deduplicate:
        rows = list({(row.text, digest): (row, digest) for row, digest in reversed(rows)}.values())[::-1]
    if data.validation is None:
        return (*parted(rows, lambda row: normalised(str(row[0].text)), data.holdout, config.seed), digests)
    check_one_way(config)
    held = _texted(Path(data.validation), data)
    return rows, held, digests | {Path(data.validation).name: _together(held)}


def _texted(path: Path, data: DataConfig) -> list[Digested]:
    rows = [row for _, row in audio.listed(path, data)]
    for row in rows:
        if row.text is None or not normalised(row.text):
            raise DataError("must say what is spoken", file=row.file, line=row.line, field=data.text)
        if not row.path.is_file():
            raise DataError(f"'{row.path}' cannot be read: no such file", file=row.file, line=row.line)
    return [(row, manifest.sha256_file(row.path)) for row in rows]


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
