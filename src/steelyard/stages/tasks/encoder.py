"""Training an encoder itself: on plain text with some of it hidden, or on pairs of texts that belong together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from steelyard.checkpoint import manifest
from steelyard.checkpoint.sources import resolve
from steelyard.data import pairs, tokenizer_training
from steelyard.data.pairs import TextPair
from steelyard.data.rows import Conversation
from steelyard.errors import DataError
from steelyard.models import classifiers, encoders, quantized
from steelyard.models.encoder import Encoder, EncoderConfig
from steelyard.runs import Run
from steelyard.stages.tasks.prepared import DTYPES, Prepared, conversations, file_digests, parts
from steelyard.text.tokenizer import Tokenizer
from steelyard.train.config import TrainConfig
from steelyard.train.contrastive import Contrastive
from steelyard.train.masked import MaskedLanguage
from steelyard.train.networks import EncoderNetwork

LEAST = 4
"""Tokens of a row in which some can be hidden."""


def prepare_masked(config: TrainConfig) -> Prepared:
    """Read a run's texts. Raises as `stages.train.train` does."""
    config, learnt, held = conversations(config)
    for document in (learnt[0], *held[:1]):
        if document.messages[0].role != "text":
            raise DataError("task masked learns from plain text", file=document.file, line=document.line)
    base = None if config.model is None else resolve(config.model)

    def build(run: Run) -> MaskedLanguage:
        origin = base or _tokenizer(config, (text.messages[0].content for text in learnt), run.folder / "tokenizer")
        encoder = classifiers.load_encoder(base) if base else _fresh(config, origin)
        if base:
            quantized.demand_dense(encoder, base)
        model = encoders.masked(encoder, origin, config.seed)
        most = min(config.data.max_length, encoder.config.max_position_embeddings)
        rows, validation = (
            [row for text in texts for row in _rows(model.tokenizer, text, most)] for texts in (learnt, held)
        )
        return MaskedLanguage(model, rows, validation, dtype=DTYPES[config.dtype])

    counts = {"rows": len(learnt), "validation_rows": len(held)}
    parent = None if base is None else manifest.read(base).id
    return Prepared(config=config, counts=counts, parent=parent, build=build, digests=file_digests(config))


def prepare_contrastive(config: TrainConfig) -> Prepared:
    """Read a run's pairs. Raises as `stages.train.train` does."""
    assert config.model is not None, "checked before"
    base = resolve(config.model)
    learnt, held = _pairs(config)

    def build(run: Run) -> Contrastive:
        model = encoders.sentence(base)
        most = min(config.data.max_length, model.network.config.max_position_embeddings)

        def tokens(text: str) -> list[int]:
            return model.tokenizer.encode_plain(text, add_special_tokens=True)[:most] or [0]

        rows, validation = ([(tokens(pair.anchor), tokens(pair.positive)) for pair in some] for some in (learnt, held))
        return Contrastive(model, rows, validation, dtype=DTYPES[config.dtype])

    counts = {"rows": len(learnt), "validation_rows": len(held)}
    parent = manifest.read(base).id
    return Prepared(config=config, counts=counts, parent=parent, build=build, digests=file_digests(config))


def _pairs(config: TrainConfig) -> tuple[list[TextPair], list[TextPair]]:
    rows = pairs.read(Path(config.data.train), config.data)
    if config.data.deduplicate:
        rows = list({(row.anchor, row.positive): row for row in reversed(rows)}.values())[::-1]
    return parts(config, rows, lambda path: pairs.read(path, config.data), lambda row: row.anchor, lambda row: row)


def _rows(tokenizer: Tokenizer, text: Conversation, most: int) -> list[list[int]]:
    """A text's tokens in pieces."""
    tokens = tokenizer.encode_plain(text.messages[0].content)
    pieces = (tokens[start : start + most] for start in range(0, len(tokens), most))
    return [piece for piece in pieces if len(piece) >= LEAST]


def _tokenizer(config: TrainConfig, texts: Iterable[str], folder: Path) -> Path:
    network = config.network
    assert isinstance(network, EncoderNetwork), "checked before"
    folder.mkdir(exist_ok=True)
    path, marks = folder / "tokenizer.json", encoders.MASKS[-1:]
    tokenizer_training.train(texts, network.vocabulary, path, lowercase=network.lowercase, marks=marks)
    return folder


def _fresh(config: TrainConfig, folder: Path) -> Encoder:
    network = config.network
    assert isinstance(network, EncoderNetwork), "checked before"
    sizes = EncoderConfig(
        vocab_size=Tokenizer.load(folder).vocabulary,
        hidden_size=network.hidden,
        num_hidden_layers=network.layers,
        num_attention_heads=network.heads,
        intermediate_size=4 * network.hidden,
        max_position_embeddings=network.context,
        hidden_dropout_prob=network.dropout,
    )
    return encoders.fresh(sizes, config.seed)
