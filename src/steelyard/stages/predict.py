"""Rows in, rows out: label every text, or answer every chat, and write what the model said beside the row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from steelyard.atomic import file_aside
from steelyard.data import audio, chat, fused, images, tagged
from steelyard.data.chat import FormatConfig, check_labels
from steelyard.data.readers import check_file, json_rows, table_rows
from steelyard.data.rows import Conversation
from steelyard.data.tokenize import prompts
from steelyard.errors import CheckpointError, ConfigError, DataError
from steelyard.evaluate import classification
from steelyard.infer.engine import Engine
from steelyard.infer.request import Beam, Request, Sampling
from steelyard.models import classifiers
from steelyard.models.classifiers import Classifier
from steelyard.models.opening import Opened, open_checkpoint
from steelyard.stages.tasks.fusion import labelled as labelled_rows
from steelyard.stages.tasks.tagger import sentences as as_read
from steelyard.stages.tasks.transcriber import open_transcriber, transcribes


def predict(
    checkpoint: Path,
    data: Path,
    output: Path,
    format_: FormatConfig,
    *,
    max_tokens: int = 256,
    beam: int = 1,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> int:
    """Write the rows of `data` to `output` (JSONL) with the model's prediction; returns their number.

    Rows with a text get `prediction` and `probabilities` if labels are known (from the checkpoint's training or
    `format_`); rows with messages get `prediction`: the assistant's next turn, greedy.

    Args:
        checkpoint: a model, or an adapter on its base.
        data: JSONL, CSV or TSV; for images and recordings a folder of them, too.
        output: replaced whole or left alone.
        format_: how rows are read.
        max_tokens: most tokens of an answer.
        beam: beginnings of an answer or a transcript that are kept; 1 is greedy.
        report: told (rows done, of how many).

    Raises:
        DataError: a row; file, line and field are named.
        ConfigError: rows with a text, and no labels known; an output that is the input; beams where nothing is written.
        CheckpointError: the checkpoint is missing or does not fit.
        TemplateError: the chat template fails on a row, by file and line.
    """
    if output.exists() and data.exists() and output.samefile(data):
        raise ConfigError(f"the output '{output}' is the file that is read: name another")
    if transcribes(checkpoint):
        return _write(output, *_hear(checkpoint, data, format_, beam, report))
    if beam > 1 and classifiers.is_classifier(checkpoint):
        raise ConfigError("beam is for transcripts and answers to chats: this model writes none, leave it out")
    if classifiers.reads_several(checkpoint):
        return _write(output, *_join(classifiers.load(checkpoint), data, format_, report))
    if classifiers.is_classifier(checkpoint) and classifiers.reads_images(checkpoint):
        return _write(output, *_see(classifiers.load(checkpoint), data, format_, report))
    check_file(data)
    if classifiers.tags_words(checkpoint):
        return _write(output, *_tag(classifiers.load(checkpoint), data, format_, report))
    tabular = data.suffix.lower() in (".csv", ".tsv")
    rows = list(table_rows(data, format_.columns) if tabular else json_rows(data))
    if not rows:
        raise DataError("the file has no rows", file=data)
    if classifiers.is_classifier(checkpoint):
        found = _classify(classifiers.load(checkpoint), rows, data, format_, report)
        return _write(output, rows, found)
    opened = open_checkpoint(checkpoint)
    chats = "messages" in rows[0][1]
    if chats:
        return _write(output, rows, _answer(opened, rows, data, max_tokens, beam, report))
    if beam > 1:
        raise ConfigError("beam is for transcripts and answers to chats: these rows ask for labels, leave it out")
    return _write(output, rows, _label(opened, rows, data, format_, report))


def _write(output: Path, rows: list[tuple[int, dict[str, Any]]], found: Iterator[dict[str, Any]]) -> int:
    with file_aside(output) as file:
        for (_, row), prediction in zip(rows, found, strict=True):
            file.write((json.dumps({**row, **prediction}, ensure_ascii=False) + "\n").encode())
    return len(rows)


def _classify(
    classifier: Classifier,
    rows: list[tuple[int, dict[str, Any]]],
    data: Path,
    format_: FormatConfig,
    report: Callable[[int, int], None],
) -> Iterator[dict[str, Any]]:
    texts = [_text(row, line, data, format_) for line, row in rows]
    scores, _ = classifiers.of_texts(classifier, texts, lambda done: report(done, len(rows)))
    yield from _named(classifier.labels, scores)


def _see(
    classifier: Classifier, data: Path, format_: FormatConfig, report: Callable[[int, int], None]
) -> tuple[list[tuple[int, dict[str, Any]]], Iterator[dict[str, Any]]]:
    """Rows of images with what the classifier says of them."""
    listed = images.listed(data, format_)
    rows = images.plain_rows(data, format_)
    inputs = classifier.image
    pictures = images.ImageTensors(listed, inputs.channels, inputs.side)
    scores = classifiers.log_probabilities(classifier, pictures, lambda done: report(done, len(listed)))
    return rows, _named(classifier.labels, scores)


def _hear(
    checkpoint: Path, data: Path, format_: FormatConfig, beam: int, report: Callable[[int, int], None]
) -> tuple[list[tuple[int, dict[str, Any]]], Iterator[dict[str, Any]]]:
    """Rows of recordings with what is said in them."""
    listed = audio.listed(data, format_)
    sounds = audio.Sounds([recording for _, recording in listed])
    texts = open_transcriber(checkpoint, beam)(sounds, lambda done: report(done, len(listed)))
    return [(number, row) for number, (row, _) in enumerate(listed, 1)], ({"prediction": text} for text in texts)


def _join(
    classifier: Classifier, data: Path, format_: FormatConfig, report: Callable[[int, int], None]
) -> tuple[list[tuple[int, dict[str, Any]]], Iterator[dict[str, Any]]]:
    """Rows of several modalities with what the classifier says of them."""
    rows = [msgspec.structs.replace(row, label=None) for row in fused.read(data, format_, classifier.fused.modalities)]
    examples = labelled_rows(classifier, rows, None, None).examples
    scores = classifiers.log_probabilities(classifier, examples, lambda done: report(done, len(rows)))
    return [(row.line, row.fields) for row in rows], _named(classifier.labels, scores)


def _tag(
    classifier: Classifier, data: Path, format_: FormatConfig, report: Callable[[int, int], None]
) -> tuple[list[tuple[int, dict[str, Any]]], Iterator[dict[str, Any]]]:
    """Sentences with the tag of each word."""
    sentences = tagged.read(data, format_, tagged=False)
    examples = as_read(classifier, sentences)
    found = classifiers.tagged(classifier, examples, report=lambda done: report(done, len(sentences)))
    rows = [
        {format_.tokens: list(row.words)} | ({} if row.tags is None else {format_.tags: list(row.tags)})
        for row in sentences
    ]
    said = ({"prediction": [classifier.labels[label] for label in paths[0].labels]} for paths in found)
    return list(enumerate(rows, 1)), said


def _text(row: dict[str, Any], line: int, data: Path, format_: FormatConfig) -> str:
    text = row.get(format_.text)
    if not isinstance(text, str) or not text.strip():
        reason = f"must be a text that is not empty; the row has: {', '.join(row) or 'nothing'}"
        raise DataError(reason, file=data, line=line, field=format_.text)
    return text


def _named(labels: Sequence[str], scores: torch.Tensor) -> Iterator[dict[str, Any]]:
    for probabilities in scores.softmax(-1).tolist():
        named = dict(zip(labels, probabilities, strict=True))
        yield {"prediction": max(named, key=lambda label: named[label]), "probabilities": named}


def _label(
    opened: Opened,
    rows: list[tuple[int, dict[str, Any]]],
    data: Path,
    format_: FormatConfig,
    report: Callable[[int, int], None],
) -> Iterator[dict[str, Any]]:
    if not format_.labels:
        raise ConfigError("no labels are known: this checkpoint was not trained on labelled rows; give --labels a,b")
    check_labels(format_.labels)
    conversations = [chat.asked(_text(row, line, data, format_), format_, data, line) for line, row in rows]
    asked = classification.questions(conversations, format_.labels, opened.tokenizer, opened.template)
    classification.check_lengths(asked, conversations, opened.decoder.config.context)
    scores = classification.score(opened.decoder, opened.adapter, asked, lambda done: report(done, len(asked)))
    yield from _named(format_.labels, scores)


def _answer(
    opened: Opened,
    rows: list[tuple[int, dict[str, Any]]],
    data: Path,
    max_tokens: int,
    beam: int,
    report: Callable[[int, int], None],
) -> Iterator[dict[str, Any]]:
    if opened.template is None:
        raise CheckpointError("this model has no chat template, which chat rows need; use an instruct model")
    chats = []
    for line, row in rows:
        turns = chat.turns(row, data, line)
        asked = turns[:-1] if turns[-1].role == "assistant" else turns
        if not asked:
            raise DataError("nothing is asked: a message of the user is needed", file=data, line=line, field="messages")
        chats.append(Conversation(messages=asked, file=data, line=line))
    adapters = {} if opened.adapter is None else {"adapter": opened.adapter}
    engine = Engine(opened.decoder, opened.tokenizer, adapters)
    sampling = Sampling(max_tokens=max_tokens, temperature=0)
    texts = [""] * len(rows)
    done = 0
    requests = []
    for index, prompt in enumerate(prompts(chats, opened.tokenizer, opened.template)):
        if len(prompt) >= engine.context:
            reason = f"{len(prompt)} tokens; the model's context holds {engine.context}, the answer included"
            raise DataError(reason, file=data, line=rows[index][0])
        worn, searched = next(iter(adapters), None), Beam(width=beam) if beam > 1 else None
        requests.append(Request(id=str(index), prompt=prompt, sampling=sampling, adapter=worn, beam=searched))
    for output in engine.run(requests):
        texts[int(output.id)] += output.text
        if output.finish_reason is not None:
            done += 1
            report(done, len(rows))
    for text in texts:
        yield {"prediction": text}
