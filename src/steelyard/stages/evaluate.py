"""Evaluate a checkpoint on a file: classification for labelled rows, likelihood for text and chat."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch

from steelyard.data import audio, chat, fused, images, tagged
from steelyard.data.audio import RATE, Recording
from steelyard.data.chat import FormatConfig
from steelyard.data.fused import FusedRow
from steelyard.data.images import ImageRow, ImageTensors
from steelyard.data.rows import Conversation
from steelyard.data.tagged import TaggedSentence
from steelyard.data.tokenize import tokenize
from steelyard.errors import CheckpointError, DataError
from steelyard.evaluate import classification, likelihood
from steelyard.evaluate.transcription import error_rate
from steelyard.models import classifiers
from steelyard.models.classifiers import Classifier
from steelyard.models.inputs import Fused
from steelyard.models.opening import Opened, open_checkpoint
from steelyard.models.speech import normalised
from steelyard.report import Report
from steelyard.stages.fusion import labelled as labelled_rows
from steelyard.stages.tagger import labelled
from steelyard.stages.transcriber import open_transcriber, transcribes


class Classification(msgspec.Struct, frozen=True, kw_only=True):
    """How well a model labels rows."""

    rows: int
    """Of a tagger: words."""
    labels: tuple[str, ...]
    accuracy: float
    accuracy_interval: tuple[float, float]
    """Wilson's, of 95%."""
    mcc: float
    """Matthews correlation."""
    confusion: list[list[int]]
    """Rows are the truth, columns the prediction."""
    seconds: float
    ablation: dict[str, tuple[float, tuple[float, float]]] | None = None
    """Of several modalities: accuracy and interval where a row has one of them alone, or all but one."""
    tokens_per_second: float
    """Of the prompts read; of images, blocks of 64 pixels."""


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
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Classification | Likelihood | Transcription:
    """Measure a checkpoint (a model, or an adapter on its base) on the rows of a file.

    Args:
        checkpoint: what to measure.
        data: the rows.
        format_: how they are read.
        limit: only the first so many rows.
        report: told (rows or tokens done, of how many).

    Raises:
        DataError: a row; file, line and field are named.
        CheckpointError: the checkpoint is missing or does not fit.
    """
    if transcribes(checkpoint):
        return _write_down(checkpoint, [row for _, row in audio.listed(data, format_)][:limit], report)
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


def classify(
    opened: Opened,
    rows: Sequence[Conversation],
    labels: Sequence[str],
    report: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Classification, torch.Tensor]:
    """Label rows by label log-probability; the summary, and the `[R, L]` log-probabilities.

    Raises:
        DataError: a row that the model's context does not hold.
        CheckpointError: the model has no chat template, or broken weights.
    """
    started = time.perf_counter()
    asked = classification.questions(rows, labels, opened.tokenizer, opened.template)
    classification.check_lengths(asked, rows, opened.decoder.config.context)
    scores = classification.score(opened.decoder, opened.adapter, asked, lambda done: report(done, len(asked)))
    tokens = sum(len(question.prompt) for question in asked)
    return _summary(rows, labels, scores, tokens, time.perf_counter() - started), scores


def tell_apart(
    classifier: Classifier,
    rows: Sequence[Conversation],
    report: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Classification, torch.Tensor]:
    """Label rows by a classifier; the summary, and the `[R, C]` log-probabilities.

    Raises:
        DataError: a row without a text, or with a label that the classifier does not know.
        CheckpointError: broken weights.
    """
    started = time.perf_counter()
    for row in rows:
        if row.text is None or row.label not in classifier.labels:
            known = ", ".join(classifier.labels)
            reason = "has no label" if row.label is None else f"has the label '{row.label}'"
            raise DataError(f"{reason}; this classifier knows {known}", file=row.file, line=row.line)
    tokens = [classifier.text.tokens(str(row.text)) for row in rows]
    scores = classifiers.log_probabilities(classifier, tokens, lambda done: report(done, len(rows)))
    seconds = time.perf_counter() - started
    return _summary(rows, classifier.labels, scores, sum(map(len, tokens)), seconds), scores


def see_apart(
    classifier: Classifier, rows: Sequence[ImageRow], report: Callable[[int, int], None] = lambda done, of: None
) -> Classification:
    """Label images by a classifier.

    Raises:
        DataError: an image that cannot be read, or with a label that the classifier does not know.
        CheckpointError: broken weights, or a classifier of something else.
    """
    started = time.perf_counter()
    for row in rows:
        if row.label not in classifier.labels:
            known = ", ".join(classifier.labels)
            reason = "has no label" if row.label is None else f"has the label '{row.label}'"
            raise DataError(f"{reason}; this classifier knows {known}", file=row.file, line=row.line)
    inputs = classifier.image
    pictures = ImageTensors(rows, inputs.channels, inputs.side)
    scores = classifiers.log_probabilities(classifier, pictures, lambda done: report(done, len(rows)))
    seconds = time.perf_counter() - started
    return _summary(rows, classifier.labels, scores, len(rows) * inputs.size(None), seconds)


def join(
    classifier: Classifier, rows: Sequence[FusedRow], report: Callable[[int, int], None] = lambda done, of: None
) -> Classification:
    """Label rows of several modalities, then again with some of these left out. Raises as `fusion.labelled` does."""
    started = time.perf_counter()
    for row in rows:
        if row.label is None:
            raise DataError("has no label", file=row.file, line=row.line)
    examples = labelled_rows(classifier, rows, None, None)
    truth = [number for labels in examples.labels for number in labels]
    sizes = sum(map(classifier.inputs.size, examples.examples))

    def counted(chosen: Sequence[int], given: Sequence[Fused]) -> Classification:
        scores = classifiers.log_probabilities(classifier, given, lambda done: report(done, len(given)))
        wanted = [truth[number] for number in chosen]
        return _counted(wanted, classifier.labels, scores, sizes, time.perf_counter() - started)

    whole = counted(range(len(rows)), examples.examples)
    ablation = {}
    modalities = classifier.fused.modalities
    for name, kept in fusion_subsets(modalities).items():
        fewer = [example.only(kept) for example in examples.examples]
        chosen = [number for number, example in enumerate(fewer) if not example.empty]
        if chosen:
            found = counted(chosen, [fewer[number] for number in chosen])
            ablation[name] = (found.accuracy, found.accuracy_interval)
    return msgspec.structs.replace(whole, ablation=ablation)


def fusion_subsets(modalities: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Each modality alone, and all without each where that is something else."""
    if len(modalities) < 2:
        return {}
    alone: dict[str, tuple[str, ...]] = {f"{name} alone": (name,) for name in modalities}
    if len(modalities) > 2:
        alone |= {f"without {name}": tuple(kept for kept in modalities if kept != name) for name in modalities}
    return alone


def tag_words(
    classifier: Classifier, rows: Sequence[TaggedSentence], report: Callable[[int, int], None] = lambda done, of: None
) -> Classification:
    """Tag the words of sentences; `rows` of what comes back counts words. Raises as `tagger.labelled` does."""
    started = time.perf_counter()
    examples = labelled(classifier, rows)
    scores = classifiers.log_probabilities(classifier, examples.examples, lambda done: report(done, len(rows)))
    truth = [label for labels in examples.labels for label in labels]
    tokens = sum(map(classifier.inputs.size, examples.examples))
    return _counted(truth, classifier.labels, scores, tokens, time.perf_counter() - started)


def _summary(
    rows: Sequence[Conversation | ImageRow], labels: Sequence[str], scores: torch.Tensor, tokens: int, seconds: float
) -> Classification:
    truth = [list(labels).index(str(row.label)) for row in rows]
    return _counted(truth, labels, scores, tokens, seconds)


def _counted(
    truth: Sequence[int], labels: Sequence[str], scores: torch.Tensor, tokens: int, seconds: float
) -> Classification:
    counts = classification.confusion(truth, scores.argmax(1).tolist(), len(labels))
    return Classification(
        rows=len(truth),
        labels=tuple(labels),
        accuracy=classification.accuracy(counts),
        accuracy_interval=classification.interval(int(counts.diagonal().sum()), len(truth)),
        mcc=classification.matthews(counts),
        confusion=counts.tolist(),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
    )


def _write_down(checkpoint: Path, rows: Sequence[Recording], report: Callable[[int, int], None]) -> Transcription:
    for row in rows:
        if row.text is None or not normalised(row.text):
            raise DataError("has no text of what is said", file=row.file, line=row.line)
    transcribe, started = open_transcriber(checkpoint), time.perf_counter()
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
    context = max(2, min(1024, opened.decoder.config.context))
    size = None
    if plain:
        texts = [row.messages[0].content for row in plain]
        tokens = [opened.tokenizer.encode_plain(text) for text in texts]
        size = sum(len(text.encode()) for text, ids in zip(texts, tokens, strict=True) if len(ids) > 1)
        scored = [row for ids in tokens if len(ids) > 1 for row in likelihood.windows(ids, context, context // 2)]
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
