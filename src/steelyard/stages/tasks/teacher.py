"""What a teacher holds of texts: any checkpoint that labels them, asked once and kept in the run's folder."""

# R texts  C classes

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec
import safetensors.torch
import torch

from steelyard.atomic import write_file
from steelyard.checkpoint import manifest
from steelyard.data import chat
from steelyard.data.rows import Conversation
from steelyard.errors import ConfigError
from steelyard.evaluate import classification
from steelyard.models import classifiers
from steelyard.models.opening import open_checkpoint
from steelyard.runs import Run
from steelyard.stages.formats import trained_format

FILE = "teacher.safetensors"


def kept(run: Run, checkpoint: Path, rows: Sequence[Conversation], labels: Sequence[str]) -> torch.Tensor:
    """Log-probabilities `[R, C]` float16: asked now, or found in the run's folder where they were asked before."""
    asked = hashlib.sha256(repr((manifest.read(checkpoint).id, tuple(labels))).encode())
    for row in rows:
        asked.update(repr(row.text).encode())
    key, path = asked.hexdigest(), run.folder / FILE
    if path.is_file():
        with safetensors.safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("asked") == key:
                found: torch.Tensor = file.get_tensor("log_probabilities")
                return found
    run.log(f"the teacher reads {len(rows)} texts")
    said = log_probabilities(checkpoint, rows, labels).half()
    write_file(path, safetensors.torch.save({"log_probabilities": said}, metadata={"asked": key}))
    return said


def log_probabilities(checkpoint: Path, rows: Sequence[Conversation], labels: Sequence[str]) -> torch.Tensor:
    """Of every label for every text, `[R, C]`: by a classifier of texts, or by a model that answers with a label.

    Raises:
        ConfigError: a classifier of something else, or one that knows other labels.
        CheckpointError: no checkpoint.
        DataError: a text that the model's context does not hold.
    """
    if not classifiers.is_classifier(checkpoint):
        opened = open_checkpoint(checkpoint)
        fields = trained_format(checkpoint)
        fields = fields if fields.labels else msgspec.structs.replace(fields, labels=tuple(labels))
        order = _order(fields.labels, labels)
        chats = [chat.asked(str(row.text), fields, row.file, row.line) for row in rows]
        questions = classification.questions(chats, fields.labels, opened.tokenizer, opened.template)
        classification.check_lengths(questions, chats, opened.decoder.config.context)
        return classification.score(opened.decoder, opened.adapter, questions).log_softmax(-1)[:, order]
    if (
        classifiers.reads_images(checkpoint)
        or classifiers.reads_several(checkpoint)
        or classifiers.tags_words(checkpoint)
    ):
        raise ConfigError(f"distill.teacher '{checkpoint}' labels no texts")
    teacher = classifiers.load(checkpoint)
    order = _order(teacher.labels, labels)
    scores, _ = classifiers.of_texts(teacher, [str(row.text) for row in rows])
    return scores[:, order]


def _order(theirs: Sequence[str], ours: Sequence[str]) -> list[int]:
    """Where each of our labels stands among the teacher's. Raises ConfigError: it knows others."""
    if sorted(theirs) != sorted(ours):
        raise ConfigError(f"distill.teacher knows the labels {', '.join(theirs)}; the rows have {', '.join(ours)}")
    return [list(theirs).index(label) for label in ours]
