"""Training a text classifier: rows to tokens, a trained encoder with a new head, or a network from nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from steelyard.checkpoint import manifest
from steelyard.checkpoint.sources import resolve
from steelyard.data import tokenizer_training
from steelyard.data.rows import Conversation
from steelyard.data.tokenize import TOO_LONG
from steelyard.errors import ConfigError, DataError
from steelyard.evaluate import classification
from steelyard.models import classifiers
from steelyard.models.classifiers import TextClassifier
from steelyard.models.recurrent import RecurrentClassifier, RecurrentConfig
from steelyard.runs import Run
from steelyard.stages.prepared import DTYPES, Prepared, conversations
from steelyard.text.tokenizer import Tokenizer
from steelyard.train.classification import LabelledText, TextClassification
from steelyard.train.config import DataConfig, NetworkConfig, TrainConfig

METRICS: dict[str, Callable[[torch.Tensor], float]] = {
    "validation_accuracy": classification.accuracy,
    "validation_mcc": classification.matthews,
}


def prepare(config: TrainConfig) -> Prepared:
    """Read a run's rows. Raises as `stages.train.train` does."""
    config, learnt, held = conversations(config)
    labels = config.data.labels
    if config.data.too_long not in TOO_LONG:
        raise ConfigError(f"data.too_long '{config.data.too_long}' is not known; known: {', '.join(TOO_LONG)}")
    if not labels:
        raise DataError("a classifier learns from labelled rows: texts, each with its label", file=config.data.train)
    base = None if config.model is None else resolve(config.model)

    def build(run: Run) -> TextClassification:
        generator = torch.Generator().manual_seed(config.seed)
        if base is not None:
            classifier = classifiers.on_encoder(base, labels, generator)
        else:
            assert config.network is not None, "checked before"
            texts = [_text(chat) for chat in learnt]
            classifier = _fresh(config.network, labels, texts, run.folder / "tokenizer", config.seed)
        rows, validation = (_rows(classifier, chats, config.data) for chats in (learnt, held))
        return TextClassification(classifier, rows, validation, METRICS, DTYPES[config.dtype])

    counts = {"rows": len(learnt), "validation_rows": len(held), "labels": len(labels)}
    return Prepared(config, counts, None if base is None else manifest.read(base).id, build)


def _fresh(
    network: NetworkConfig, labels: Sequence[str], texts: Sequence[str], folder: Path, seed: int
) -> TextClassifier:
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
    return TextClassifier(made, tokenizer, tuple(labels), folder)


def _rows(classifier: TextClassifier, chats: Sequence[Conversation], data: DataConfig) -> list[LabelledText]:
    """Rows of tokens, as `data.max_length` and `data.too_long` have them; none is longer than the network takes."""
    numbers = {label: number for number, label in enumerate(classifier.labels)}
    most = min(data.max_length, classifier.network.context or data.max_length)
    rows = []
    for chat in chats:
        tokens = classifier.all_tokens(_text(chat))
        if len(tokens) > most and data.too_long == "error":
            reason = f"{len(tokens)} tokens, at most {most} fit: shorten it, or set data.too_long"
            raise DataError(reason, file=chat.file, line=chat.line)
        if len(tokens) <= most or data.too_long == "truncate":
            rows.append(LabelledText(tokens[:most], numbers[str(chat.label)]))
    return rows


def _text(chat: Conversation) -> str:
    assert chat.text is not None, "labelled rows have one"
    return chat.text
