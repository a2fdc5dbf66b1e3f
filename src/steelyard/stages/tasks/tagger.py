"""Training a tagger: sentences of tagged words, a trained encoder with a new head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from steelyard.checkpoint import manifest
from steelyard.checkpoint.sources import resolve
from steelyard.data import tagged
from steelyard.data.tagged import TaggedSentence
from steelyard.errors import DataError
from steelyard.models import chain, classifiers
from steelyard.models.classifiers import Classifier
from steelyard.models.tagger import EncoderTagger
from steelyard.runs import Run
from steelyard.stages.tasks.prepared import DTYPES, METRICS, Prepared, file_digests, parts
from steelyard.train.classification import Classification, Labelled
from steelyard.train.config import TrainConfig
from steelyard.train.tagging import ChainTagging


def prepare(config: TrainConfig) -> Prepared:
    """Read a run's sentences. Raises as `stages.train.train` does."""
    assert config.model is not None, "checked before"
    base = resolve(config.model)
    learnt, held = _parts(config)
    labels = config.data.labels or tuple(sorted({tag for row in (*learnt, *held) for tag in row.tags or ()}))
    config = msgspec.structs.replace(config, data=msgspec.structs.replace(config.data, labels=labels))

    def build(run: Run) -> Classification:
        generator = torch.Generator().manual_seed(config.seed)
        bio = chain.obeys(row.tags for row in (*learnt, *held) if row.tags is not None)
        if classifiers.tags_words(base):
            classifier = classifiers.swap_head(base, labels, generator, chain=config.chain, bio=bio)
        else:
            classifier = classifiers.on_encoder(base, labels, generator, EncoderTagger, chain=config.chain, bio=bio)
        return (ChainTagging if config.chain else Classification)(
            classifier,
            labelled(classifier, learnt),
            labelled(classifier, held),
            METRICS,
            dtype=DTYPES[config.dtype],
            smoothing=config.label_smoothing,
        )

    counts = {
        "rows": len(learnt),
        "words": sum(len(row.words) for row in learnt),
        "validation_rows": len(held),
        "labels": len(labels),
    }
    parent = manifest.read(base).id
    return Prepared(config=config, counts=counts, parent=parent, build=build, digests=file_digests(config))


def labelled(classifier: Classifier, rows: Sequence[TaggedSentence]) -> Labelled:
    """Sentences as a tagger reads them, with the numbers of their tags.

    Raises:
        DataError: one that the tagger's context does not hold, or a tag that it does not know, by file and line.
        CheckpointError: it is no tagger.
    """
    numbers = {label: number for number, label in enumerate(classifier.labels)}
    made = Labelled(sentences(classifier, rows), [])
    for row in rows:
        for tag in row.tags or ():
            if tag not in numbers:
                known = ", ".join(classifier.labels[:20]) + (", ..." if len(classifier.labels) > 20 else "")
                raise DataError(f"the tag '{tag}' is none of {known}", file=row.file, line=row.line)
        made.labels.append([numbers[tag] for tag in row.tags or ()])
    return made


def sentences(classifier: Classifier, rows: Sequence[TaggedSentence]) -> list[object]:
    """Sentences as a tagger reads them. Raises as `labelled` does."""
    inputs = classifier.words
    made: list[object] = []
    for row in rows:
        example = inputs.sentence(row.words)
        if inputs.context is not None and len(example.tokens) > inputs.context:
            reason = f"{len(example.tokens)} tokens, at most {inputs.context} fit: part the sentence"
            raise DataError(reason, file=row.file, line=row.line)
        made.append(example)
    return made


def _parts(config: TrainConfig) -> tuple[list[TaggedSentence], list[TaggedSentence]]:
    """Sentences to learn from and to validate on; the same words are not in both."""
    rows = tagged.read(Path(config.data.train), config.data)
    if config.data.deduplicate:
        rows = list({(row.words, row.tags): row for row in reversed(rows)}.values())[::-1]
    return parts(config, rows, lambda path: tagged.read(path, config.data), lambda row: row.words, lambda row: row)
