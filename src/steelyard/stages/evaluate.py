"""Evaluate a checkpoint on a file: classification for labelled rows, likelihood for text and chat."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from steelyard.data import audio, chat, fused, images, tagged
from steelyard.data.audio import RATE, Recording
from steelyard.data.chat import FormatConfig
from steelyard.data.rows import Conversation
from steelyard.data.tokenize import tokenize
from steelyard.errors import CheckpointError, ConfigError, DataError
from steelyard.evaluate import classification, likelihood
from steelyard.evaluate.transcription import error_rate
from steelyard.models import classifiers
from steelyard.models.opening import Opened, open_checkpoint
from steelyard.models.speech import normalised
from steelyard.report import Report
from steelyard.stages.labelling import Classification, classify, join, see_apart, tag_words, tell_apart
from steelyard.stages.tasks.transcriber import open_transcriber, transcribes


class Likelihood(msgspec.Struct, frozen=True, kw_only=True):
    """How likely a model finds rows: text (every token) or chat (what the assistant says)."""

    rows: int
    tokens: int
    loss: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float | None
    """For plain text."""
    seconds: float


class Transcription(msgspec.Struct, frozen=True, kw_only=True):
    """How well what is said in recordings is written down; all texts are compared as `speech.normalised` has them."""

    rows: int
    character_error_rate: float
    """Edits over characters."""
    character_error_interval: tuple[float, float]
    """Of 95%, by drawing rows anew."""
    word_error_rate: float
    word_error_interval: tuple[float, float]
    exact: float
    """Share of the rows without an error."""
    sound_seconds: float
    seconds: float


def evaluate(
    checkpoint: Path,
    data: Path,
    format_: FormatConfig,
    *,
    limit: int | None = None,
    beam: int = 1,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Classification | Likelihood | Transcription:
    """Measure a checkpoint (a model, or an adapter on its base) on the rows of a file.

    Args:
        checkpoint: what to measure.
        data: the rows.
        format_: how they are read.
        limit: only the first so many rows.
        beam: of recordings: beginnings of a transcript that are kept; 1 is greedy.
        report: told (rows or tokens done, of how many).

    Raises:
        DataError: a row; file, line and field are named.
        CheckpointError: the checkpoint is missing or does not fit.
        ConfigError: beams for a model that transcribes nothing.
    """
    if transcribes(checkpoint):
        return _write_down(checkpoint, [row for _, row in audio.listed(data, format_)][:limit], beam, report)
    if beam > 1:
        raise ConfigError("beam is for models that write down what is said: leave it out")
    if classifiers.is_classifier(checkpoint) and classifiers.reads_images(checkpoint):
        return see_apart(classifiers.load(checkpoint), images.listed(data, format_)[:limit], report)
    if classifiers.reads_several(checkpoint):
        classifier = classifiers.load(checkpoint)
        return join(classifier, fused.read(data, format_, classifier.fused.modalities)[:limit], report)
    if classifiers.tags_words(checkpoint):
        return tag_words(classifiers.load(checkpoint), tagged.read(data, format_)[:limit], report)
    rows = chat.read(data, format_)
    # The labels of all rows, as in the prompts, whatever the limit leaves.
    labels = format_.labels or classification.labels_of(rows) if rows[0].label is not None else ()
    if classifiers.is_classifier(checkpoint):
        return tell_apart(classifiers.load(checkpoint), rows[:limit], report)[0]
    opened = open_checkpoint(checkpoint)
    if labels:
        return classify(opened, rows[:limit], labels, report)[0]
    return _likelihood(opened, rows[:limit], report)


def _write_down(
    checkpoint: Path, rows: Sequence[Recording], beam: int, report: Callable[[int, int], None]
) -> Transcription:
    for row in rows:
        if row.text is None or not normalised(row.text):
            raise DataError("has no text of what is said", file=row.file, line=row.line)
    transcribe, started = open_transcriber(checkpoint, beam), time.perf_counter()
    sounds = [audio.read(row) for row in rows]
    said = [normalised(text) for text in transcribe(sounds, lambda done: report(done, len(rows)))]
    truth = [normalised(str(row.text)) for row in rows]
    seconds = time.perf_counter() - started
    letters, words = error_rate(truth, said, list), error_rate(truth, said, str.split)
    return Transcription(
        rows=len(rows),
        character_error_rate=letters[0],
        character_error_interval=letters[1],
        word_error_rate=words[0],
        word_error_interval=words[1],
        exact=sum(map(str.__eq__, truth, said)) / len(rows),
        sound_seconds=sum(map(len, sounds)) / RATE,
        seconds=seconds,
    )


def _likelihood(opened: Opened, rows: Sequence[Conversation], report: Callable[[int, int], None]) -> Likelihood:
    started = time.perf_counter()
    plain = [row for row in rows if row.messages[0].role == "text"]
    begin = opened.tokenizer.beginning
    context = max(2 + len(begin), min(1024, opened.decoder.config.context))
    size = None
    if plain:
        texts = [row.messages[0].content for row in plain]
        tokens = [opened.tokenizer.encode_plain(text) for text in texts]
        size = sum(len(text.encode()) for text, ids in zip(texts, tokens, strict=True) if len(ids) > 1)
        stride = (context - len(begin)) // 2
        scored = [row for ids in tokens if len(ids) > 1 for row in likelihood.windows(ids, context, stride, begin)]
        if not scored:
            raise DataError("the text is too short: at least two tokens are needed", file=rows[0].file)
    else:
        scored = tokenize(rows, opened.tokenizer, opened.template, opened.decoder.config.context)
    total = sum(len(row.tokens) for row in scored)
    nats, count = likelihood.negative_log_likelihood(
        opened.decoder, opened.adapter, scored, lambda done: report(done, total)
    )
    if not math.isfinite(nats):
        raise CheckpointError(
            "the model's log-probabilities are not finite: its weights are broken, pull or train anew"
        )
    found = likelihood.summary(nats, count, size)
    return Likelihood(
        rows=len(rows),
        tokens=count,
        loss=found["loss"],
        perplexity=found["perplexity"],
        bits_per_byte=found.get("bits_per_byte"),
        seconds=time.perf_counter() - started,
    )


def page(checkpoint: Path, data: Path, found: Classification | Likelihood | Transcription) -> Report:
    """A report of one evaluation."""
    report = Report(f"{checkpoint.name} on {data.name}")
    apart = ("confusion", "labels", "ablation")
    values = {key: value for key, value in msgspec.to_builtins(found).items() if key not in apart}
    report.table(["measure", "value"], [[key.replace("_", " "), str(value)] for key, value in values.items()], "")
    if isinstance(found, Classification) and found.ablation:
        rows = [
            [name, f"{accuracy:.4f}", f"{low:.4f} to {high:.4f}"]
            for name, (accuracy, (low, high)) in found.ablation.items()
        ]
        report.table(["rows have", "accuracy", "interval of 95%"], rows, "With less than all modalities")
    if isinstance(found, Classification):
        report.matrix("Confusion matrix", list(found.labels), found.confusion)
    return report
