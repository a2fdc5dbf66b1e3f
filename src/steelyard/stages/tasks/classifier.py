"""Training a text classifier: rows to tokens, a trained encoder with a new head, or a network from nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from steelyard.checkpoint import manifest
from steelyard.checkpoint.sources import resolve
from steelyard.data import chat, tokenizer_training
from steelyard.data.readers import check_file
from steelyard.data.rows import Conversation
from steelyard.data.tokenize import TOO_LONG
from steelyard.errors import ConfigError, DataError
from steelyard.models import classifiers
from steelyard.models.classifiers import Classifier
from steelyard.models.inputs import TextInputs
from steelyard.models.recurrent import RecurrentClassifier, RecurrentConfig
from steelyard.runs import Run
from steelyard.stages.tasks.prepared import DTYPES, METRICS, Prepared, conversations, file_digests
from steelyard.stages.tasks.teacher import kept
from steelyard.text.tokenizer import Tokenizer
from steelyard.train.classification import Classification, Labelled
from steelyard.train.config import DataConfig, TrainConfig
from steelyard.train.distillation import UNLABELLED, Distillation
from steelyard.train.networks import LstmNetwork

WINDOWS = "windows"
"""What a text that is too long can be besides: several rows of one label."""


def prepare(config: TrainConfig) -> Prepared:
    """Read a run's rows. Raises as `stages.train.train` does."""
    config, learnt, held = conversations(config)
    labels = config.data.labels
    known = (*TOO_LONG, WINDOWS)
    if config.data.too_long not in known:
        raise ConfigError(f"data.too_long '{config.data.too_long}' is not known; known: {', '.join(known)}")
    if config.data.too_long == WINDOWS and config.data.max_length < classifiers.SHORTEST:
        raise ConfigError(f"data.max_length: windows are of {classifiers.SHORTEST} tokens at least")
    if not labels:
        raise DataError("a classifier learns from labelled rows: texts, each with its label", file=config.data.train)
    for row in (*learnt, *held):
        if row.label is None or row.text is None:
            raise DataError("has no label", file=row.file, line=row.line, field=config.data.label)
    base = None if config.model is None else resolve(config.model)
    teacher = None if config.distill.teacher is None else resolve(config.distill.teacher)
    more = _more(config, [*learnt, *held])

    def build(run: Run) -> Classification:
        generator = torch.Generator().manual_seed(config.seed)
        if base is not None:
            classifier = classifiers.on_trained(base, labels, generator)
            classifier.text  # noqa: B018  it reads texts, or says that it does not
        else:
            assert isinstance(config.network, LstmNetwork), "the other networks read no texts"
            texts = [_text(row) for row in (*learnt, *more)]
            classifier = _fresh(config.network, labels, texts, run.folder / "tokenizer", config.seed)
        window = min(config.data.max_length, classifier.text.context or config.data.max_length)
        parted = replace(classifier.text, window=window if config.data.too_long == WINDOWS else None)
        classifier = replace(classifier, inputs=parted)
        rows, owners = _rows(classifier, [*learnt, *more], config.data)
        validation, _ = _rows(classifier, held, msgspec.structs.replace(config.data, max_windows=sys.maxsize))
        shared: dict[str, Any] = {"dtype": DTYPES[config.dtype], "smoothing": config.label_smoothing}
        if teacher is None:
            return Classification(classifier, rows, validation, METRICS, **shared)
        said = kept(run, teacher, [*learnt, *more], labels)[owners]
        asked = config.distill
        way: dict[str, Any] = {"weight": asked.weight, "temperature": asked.temperature, "kind": asked.divergence}
        return Distillation(classifier, rows, validation, METRICS, teacher=said, **way, **shared)

    counts = {"rows": len(learnt), "validation_rows": len(held), "labels": len(labels)}
    digests = file_digests(config)
    if teacher is not None:
        counts["texts"] = len(more)
        digests["teacher"] = manifest.read(teacher).id
    if config.distill.texts is not None:
        digests[f"texts: {Path(config.distill.texts).name}"] = manifest.sha256_file(Path(config.distill.texts))
    parent = None if base is None else manifest.read(base).id
    return Prepared(config=config, counts=counts, parent=parent, build=build, digests=digests)


def _fresh(network: LstmNetwork, labels: Sequence[str], texts: Sequence[str], folder: Path, seed: int) -> Classifier:
    folder.mkdir(exist_ok=True)
    tokenizer_training.train(texts, network.vocabulary, folder / "tokenizer.json", lowercase=network.lowercase)
    tokenizer = Tokenizer.load(folder)
    config = RecurrentConfig(
        vocab_size=tokenizer.vocabulary,
        embedding_size=network.embedding,
        hidden_size=network.hidden,
        dense_size=network.dense,
        dropout=network.dropout,
        classes=len(labels),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = RecurrentClassifier(config)
    return Classifier(made, TextInputs(tokenizer, None), tuple(labels), folder)


def _more(config: TrainConfig, known: Sequence[Conversation]) -> list[Conversation]:
    """Texts for the teacher alone, each once, and none that is there already."""
    if config.distill.texts is None:
        return []
    path = Path(config.distill.texts)
    check_file(path)
    seen = {_text(row).strip() for row in known}
    found = {_text(row).strip(): row for row in chat.texts(path, config.data)}
    if not found:
        raise DataError("the file has no rows", file=path)
    return [row for text, row in found.items() if text not in seen]


def _rows(classifier: Classifier, chats: Sequence[Conversation], data: DataConfig) -> tuple[Labelled, list[int]]:
    """Rows of tokens, as `data.max_length` and `data.too_long` have them, none longer than the network takes; and which
    text each is of.
    """
    numbers = {label: number for number, label in enumerate(classifier.labels)}
    inputs = classifier.text
    most = min(data.max_length, inputs.context or data.max_length)
    made, owners = Labelled([], []), list[int]()
    for owner, row in enumerate(chats):
        tokens = inputs.all_tokens(_text(row))
        label = UNLABELLED if row.label is None else numbers[row.label]
        parts: list[list[int]] = []
        if data.too_long == WINDOWS:
            parts = _spread(inputs.windows(tokens), data.max_windows)
        elif len(tokens) > most and data.too_long == "error":
            reason = f"{len(tokens)} tokens, at most {most} fit: shorten it, or set data.too_long"
            raise DataError(reason, file=row.file, line=row.line)
        elif len(tokens) <= most or data.too_long == "truncate":
            parts = [tokens[:most]]
        for part in parts:
            made.examples.append(part)
            made.labels.append((label,))
            owners.append(owner)
    return made, owners


def _spread(parts: list[list[int]], most: int) -> list[list[int]]:
    """Some of the parts, evenly over all: the first is one of them."""
    return [parts[number * len(parts) // most] for number in range(most)] if len(parts) > most else parts


def _text(row: Conversation) -> str:
    assert row.text is not None, "labelled rows have one"
    return row.text
