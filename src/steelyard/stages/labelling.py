"""How well a model labels rows: by label log-probability, or as a classifier of whatever it reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec
import torch

from steelyard.data.fused import FusedRow
from steelyard.data.images import ImageRow, ImageTensors
from steelyard.data.rows import Conversation
from steelyard.data.tagged import TaggedSentence
from steelyard.errors import DataError
from steelyard.evaluate import classification
from steelyard.models import classifiers
from steelyard.models.classifiers import Classifier
from steelyard.models.inputs import Fused
from steelyard.models.opening import Opened
from steelyard.stages.tasks.fusion import labelled as labelled_rows
from steelyard.stages.tasks.tagger import labelled


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
    texts = [str(row.text) for row in rows]
    scores, tokens = classifiers.of_texts(classifier, texts, lambda done: report(done, len(rows)))
    return _summary(rows, classifier.labels, scores, tokens, time.perf_counter() - started), scores


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
        return _counted(wanted, classifier.labels, scores.argmax(1).tolist(), sizes, time.perf_counter() - started)

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
    found = classifiers.tagged(classifier, examples.examples, report=lambda done: report(done, len(rows)))
    truth = [label for labels in examples.labels for label in labels]
    said = [label for paths in found for label in paths[0].labels]
    tokens = sum(map(classifier.inputs.size, examples.examples))
    return _counted(truth, classifier.labels, said, tokens, time.perf_counter() - started)


def _summary(
    rows: Sequence[Conversation | ImageRow], labels: Sequence[str], scores: torch.Tensor, tokens: int, seconds: float
) -> Classification:
    truth = [list(labels).index(str(row.label)) for row in rows]
    return _counted(truth, labels, scores.argmax(1).tolist(), tokens, seconds)


def _counted(
    truth: Sequence[int], labels: Sequence[str], said: Sequence[int], tokens: int, seconds: float
) -> Classification:
    counts = classification.confusion(truth, said, len(labels))
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
