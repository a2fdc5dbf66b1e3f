"""Training a text classifier: rows to tokens, a trained encoder with a new head, or a network from nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from steelyard.checkpoint import manifest
from steelyard.checkpoint.sources import resolve
from steelyard.data import tokenizer_training
from steelyard.data.rows import Conversation
from steelyard.data.tokenize import TOO_LONG
from steelyard.errors import ConfigError, DataError
from steelyard.models import classifiers
from steelyard.models.classifiers import Classifier
from steelyard.models.inputs import TextInputs
from steelyard.models.recurrent import RecurrentClassifier, RecurrentConfig
from steelyard.runs import Run
from steelyard.stages.tasks.prepared import DTYPES, METRICS, Prepared, conversations, file_digests
from steelyard.text.tokenizer import Tokenizer
from steelyard.train.classification import Classification, Labelled
from steelyard.train.config import DataConfig, TrainConfig
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
    if config.data.max_windows < 1:
        raise ConfigError(f"data.max_windows must be at least 1, not {config.data.max_windows}")
    if not labels:
        raise DataError("a classifier learns from labelled rows: texts, each with its label", file=config.data.train)
    base = None if config.model is None else resolve(config.model)

    def build(run: Run) -> Classification:
        generator = torch.Generator().manual_seed(config.seed)
        if base is not None:
            classifier = classifiers.on_trained(base, labels, generator)
            classifier.text  # noqa: B018  it reads texts, or says that it does not
        else:
            assert isinstance(config.network, LstmNetwork), "the other networks read no texts"
            texts = [_text(chat) for chat in learnt]
            classifier = _fresh(config.network, labels, texts, run.folder / "tokenizer", config.seed)
        window = min(config.data.max_length, classifier.text.context or config.data.max_length)
        parted = replace(classifier.text, window=window if config.data.too_long == WINDOWS else None)
        classifier = replace(classifier, inputs=parted)
        rows, validation = (_rows(classifier, chats, config.data) for chats in (learnt, held))
        return Classification(
            classifier,
            rows,
            validation,
            METRICS,
            dtype=DTYPES[config.dtype],
            smoothing=config.label_smoothing,
        )

    counts = {"rows": len(learnt), "validation_rows": len(held), "labels": len(labels)}
    parent = None if base is None else manifest.read(base).id
    return Prepared(config=config, counts=counts, parent=parent, build=build, digests=file_digests(config))


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


def _rows(classifier: Classifier, chats: Sequence[Conversation], data: DataConfig) -> Labelled:
    """Rows of tokens, as `data.max_length` and `data.too_long` have them; none is longer than the network takes."""
    numbers = {label: number for number, label in enumerate(classifier.labels)}
    inputs = classifier.text
    most = min(data.max_length, inputs.context or data.max_length)
    made = Labelled([], [])
    for chat in chats:
        tokens = inputs.all_tokens(_text(chat))
        if data.too_long == WINDOWS:
            for part in _spread(inputs.windows(tokens), data.max_windows):
                made.examples.append(part)
                made.labels.append((numbers[str(chat.label)],))
            continue
        if len(tokens) > most and data.too_long == "error":
            reason = f"{len(tokens)} tokens, at most {most} fit: shorten it, or set data.too_long"
            raise DataError(reason, file=chat.file, line=chat.line)
        if len(tokens) <= most or data.too_long == "truncate":
            made.examples.append(tokens[:most])
            made.labels.append((numbers[str(chat.label)],))
    return made


def _spread(parts: list[list[int]], most: int) -> list[list[int]]:
    """Some of the parts, evenly over all: the first is one of them."""
    return [parts[number * len(parts) // most] for number in range(most)] if len(parts) > most else parts


def _text(chat: Conversation) -> str:
    assert chat.text is not None, "labelled rows have one"
    return chat.text
