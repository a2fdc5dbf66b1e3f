"""What is explained: a text, a chat, an image, a row of several kinds, as methods take it and as a page shows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import torch

from steelyard.checkpoint import manifest
from steelyard.data import chat, fused, images
from steelyard.data.chat import FormatConfig
from steelyard.data.rows import Conversation, Message
from steelyard.data.tokenize import located, of_chats
from steelyard.errors import CheckpointError, ConfigError, DataError
from steelyard.evaluate import classification
from steelyard.explain import nearest as alike
from steelyard.explain.decoders import AnswerSubject, LabelSubject
from steelyard.explain.examples import ExampleSubject, ImagePart, SoundPart
from steelyard.explain.explainer import open_classifier, open_decoder
from steelyard.explain.subject import Subject
from steelyard.explain.texts import TextSubject
from steelyard.infer.engine import Engine
from steelyard.infer.request import Method, Request, Sampling
from steelyard.models import classifiers, dora
from steelyard.models.classifiers import Classifier
from steelyard.models.inputs import FusedInputs, around
from steelyard.stages.tasks.fusion import labelled as labelled_rows
from steelyard.text.chat_template import ChatTemplate
from steelyard.text.source import Source, marked, source_of, source_of_chat
from steelyard.text.tokenizer import Tokenizer

ANSWER = 32
"""Tokens of an answer of the model's own."""
MOST_TOKENS = 4096
TOLD = 200
"""Characters of a row that learning used."""
Report_ = Callable[[int, int], None]
T = TypeVar("T")


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """How to explain."""

    method: Method = "lrp"
    target: str | None = None
    faithfulness: bool = True
    lens: int = 0
    row: int | None = None
    """Of a file with rows; None: the first."""
    nearest: int = 0
    rows: Path | None = None
    """That learning used; None: as the checkpoint's lineage says."""


class Neighbour(msgspec.Struct, frozen=True):
    """A row that learning used."""

    line: int
    text: str
    label: str | None
    cosine: float
    """Of the gradients: above 0 it made what is explained likelier."""


@dataclass(frozen=True)
class Drawing:
    """What a page shows of an input."""

    parts: list[tuple[str, int | None]]
    """A text in parts, each with its unit's number, or none."""
    image: ImagePart | None = None
    moment: float = 0.0
    """Seconds of a unit of sound."""


@dataclass(frozen=True)
class Prepared:
    """What is explained, and how it is called and shown."""

    subject: Subject
    target: str
    drawing: Drawing
    kinds: list[str]
    names: list[str]
    nearest: Callable[[Path, int, Report_], list[Neighbour]] | None
    computed: int = 0


def prepare(checkpoint: Path, given: str, format_: FormatConfig, wanted: Wanted) -> Prepared:
    """What is explained of an input. Raises as `explain` does."""
    if classifiers.is_classifier(checkpoint):
        if classifiers.tags_words(checkpoint):
            raise CheckpointError(f"'{checkpoint}' tags words, which is not explained here")
        classifier = open_classifier(checkpoint)
        if classifiers.reads_texts(checkpoint):
            return _text(classifier, _said(given, format_, wanted), format_, wanted)
        return _example(classifier, given, format_, wanted)
    if classifiers.architecture(manifest.base_of(checkpoint)) in classifiers.ENCODERS:
        raise CheckpointError(f"'{checkpoint}' says nothing of texts: explain a classifier that was made from it")
    return _answer(checkpoint, _said(given, format_, wanted), format_, wanted)


def _said(given: str, format_: FormatConfig, wanted: Wanted) -> str:
    """A text, or that of a file's row."""
    listed = given.lower().endswith(images.LISTS)
    if not listed or (len(given.split()) > 1 and not _is_file(given)):
        if not given.strip():
            raise ConfigError("there is nothing to explain: the text is empty")
        if wanted.row is not None:
            raise ConfigError(f"--row {wanted.row} is of a file of rows ({', '.join(images.LISTS)}), not of a text")
        return given
    if not _is_file(given):
        raise ConfigError(f"there is no file '{given}'")
    rows = chat.read(Path(given), format_)
    row = _row(rows, given, wanted)
    if row.text:
        return row.text
    asked = row.messages[:-1] if row.messages[-1].role == "assistant" else row.messages
    if [message.role for message in asked] != ["user"]:
        reason = "more is said before the answer than one message: give the text that is to be explained"
        raise DataError(reason, file=row.file, line=row.line)
    return asked[0].content


def _is_file(given: str) -> bool:
    try:
        return Path(given).is_file()
    except OSError:  # too long for a name
        return False


def _row(rows: Sequence[T], given: str, wanted: Wanted) -> T:
    number = wanted.row or 1
    if number > len(rows):
        raise ConfigError(f"--row {number}: '{given}' has {len(rows)} rows")
    return rows[number - 1]


def _class_of(classifier: Classifier, scores: torch.Tensor, target: str | None) -> int:
    if target is None:
        return int(scores.argmax())
    if target not in classifier.labels:
        raise ConfigError(f"--target '{target}' is none of {', '.join(classifier.labels)}")
    return classifier.labels.index(target)


def _text(classifier: Classifier, given: str, format_: FormatConfig, wanted: Wanted) -> Prepared:
    source = source_of(classifier.text.tokenizer, given)
    if len(source.ids) > MOST_TOKENS:
        raise ConfigError(f"the text has {len(source.ids)} tokens; {MOST_TOKENS} are explained at the most")
    scores, _ = classifiers.of_texts(classifier, [given])
    target = _class_of(classifier, scores[0], wanted.target)
    subject = TextSubject(classifier, source.ids, target)
    first = len(around(classifier.text.tokenizer)[0])
    places = list(range(first, first + subject.units))

    def near(rows: Path, count: int, report: Report_) -> list[Neighbour]:
        learnt = [row for row in chat.read(rows, format_) if row.label in classifier.labels and row.text]
        if not learnt:
            raise DataError(f"no row has one of the labels {', '.join(classifier.labels)}", file=rows)
        examples = [classifier.text.tokens(row.text or "") for row in learnt]
        targets = [classifier.labels.index(row.label or "") for row in learnt]
        (own,) = alike.of_classes(classifier, [classifier.text.tokens(given)], [target])
        others = alike.of_classes(classifier, examples, targets, lambda done: report(done, len(examples)))
        return _neighbours(alike.nearest(own, others, count), learnt)

    names = [_part(source, place) for place in places]
    kinds = ["text"] * subject.units
    return Prepared(subject, classifier.labels[target], _drawn(source, places), kinds, names, near)


def _example(classifier: Classifier, given: str, format_: FormatConfig, wanted: Wanted) -> Prepared:
    """An image, or a row of several kinds."""
    path = Path(given)
    if not path.is_file():
        raise ConfigError(f"'{given}' is no file: this model reads images, or rows of several kinds")
    if isinstance(classifier.inputs, FusedInputs):
        rows = fused.read(path, format_, classifier.fused.modalities)
        unlabelled = [msgspec.structs.replace(_row(rows, given, wanted), label=None)]
        (example,) = labelled_rows(classifier, unlabelled, None, None).examples
    else:
        inputs = classifier.image
        row = images.ImageRow(path=path, label=None, file=path, line=None)
        example = images.ImageTensors([row], inputs.channels, inputs.side)[0]
    scores = classifiers.log_probabilities(classifier, [example])
    target = _class_of(classifier, scores[0], wanted.target)
    subject = ExampleSubject(classifier, example, target)
    names = subject.names
    parts: list[tuple[str, int | None]] = [
        (unit.name, number) for number, unit in enumerate(names) if unit.kind == "text"
    ]
    picture = subject.parts.get("image")
    sound = subject.parts.get("audio")
    drawing = Drawing(
        parts,
        picture if isinstance(picture, ImagePart) else None,
        sound.seconds if isinstance(sound, SoundPart) else 0.0,
    )
    kinds = [unit.kind for unit in names]
    return Prepared(subject, classifier.labels[target], drawing, kinds, [unit.name for unit in names], None)


def _answer(checkpoint: Path, given: str, format_: FormatConfig, wanted: Wanted) -> Prepared:
    """What follows a prompt: a label, an answer that is named, or the model's own."""
    base = manifest.base_of(checkpoint)
    decoder, tokenizer, template = open_decoder(base), Tokenizer.load(base), ChatTemplate.load(base)
    adapter = dora.load(checkpoint, decoder) if base != checkpoint else None
    labelled = len(format_.labels) > 1 and template is not None

    def asked(text: str) -> Conversation:
        plain = Conversation(messages=(Message("user", text),))
        return chat.asked(text, format_, None, None) if labelled else plain

    source = _asked(tokenizer, template, given, asked)
    if len(source.ids) > min(MOST_TOKENS, decoder.config.context):
        raise ConfigError(f"the prompt has {len(source.ids)} tokens: more than the model, or an explanation, takes")
    if labelled:
        (question,) = classification.questions([asked(given)], format_.labels, tokenizer, template)
        if wanted.target is not None and wanted.target not in format_.labels:
            raise ConfigError(f"--target '{wanted.target}' is none of {', '.join(format_.labels)}")
        scores = classification.score(decoder, adapter, [question])[0]
        named = wanted.target or format_.labels[int(scores.argmax())]
        number = format_.labels.index(named)
        answer = question.answers[number]
    elif wanted.target is not None:
        named, answer = wanted.target, tokenizer.encode_plain(wanted.target)
    else:
        answer = _own(checkpoint, source.ids)
        named = tokenizer.decode(answer)
    places = source.places
    if places is None:
        places = [place for place, token in enumerate(source.ids) if token not in tokenizer.special_tokens]
    if labelled:
        subject: AnswerSubject = LabelSubject(decoder, adapter, source.ids, question.answers, number, places)
    else:
        subject = AnswerSubject(decoder, adapter, source.ids, answer, places)

    def near(rows: Path, count: int, report: Report_) -> list[Neighbour]:
        learnt = chat.read(rows, format_)
        if any(row.messages[0].role == "text" for row in learnt):
            raise ConfigError(f"--rows {rows} has plain text, which answers nothing: give it chats, or labelled rows")
        tokens = of_chats(learnt, tokenizer, template, decoder.config.context, "truncate")
        kept = [(row, read.last_answer) for row, read in zip(learnt, tokens, strict=True) if read is not None]
        pairs = [answered for _, answered in kept]
        (own,) = alike.of_answers(decoder, adapter, [(source.ids, answer)])
        others = alike.of_answers(decoder, adapter, pairs, lambda done: report(done, len(pairs)))
        return _neighbours(alike.nearest(own, others, count), [row for row, _ in kept])

    names = [_part(source, place) for place in places]
    return Prepared(subject, named, _drawn(source, places), ["text"] * len(places), names, near)


def _asked(
    tokenizer: Tokenizer, template: ChatTemplate | None, given: str, asked: Callable[[str], Conversation]
) -> Source:
    """What the model reads of a text, and which of its tokens are the text's."""
    if template is None:
        return source_of(tokenizer, given)
    conversations = [asked(given), asked(marked(given))]
    plain, with_marks = located(
        conversations, lambda turns: template.render_many([(tokenizer.guard_messages(each), True) for each in turns])
    )
    return source_of_chat(tokenizer, plain, with_marks)


def _own(checkpoint: Path, prompt: list[int]) -> list[int]:
    """The model's own answer, greedily; its end is not part of it."""
    base = manifest.base_of(checkpoint)
    engine = Engine.load(base, {} if base == checkpoint else {"adapter": checkpoint})
    sampling = Sampling(max_tokens=ANSWER, temperature=0)
    worn = None if base == checkpoint else "adapter"
    request = Request(id="own", prompt=prompt, sampling=sampling, adapter=worn)
    tokens = [token for output in engine.run([request]) for token in output.tokens]
    ends = engine.tokenizer.eos_ids
    return tokens[:-1] if len(tokens) > 1 and tokens[-1] in ends else tokens


def _neighbours(found: list[tuple[int, float]], learnt: Sequence[Conversation]) -> list[Neighbour]:
    told = []
    for number, cosine in found:
        row = learnt[number]
        said = row.text or " / ".join(message.content for message in row.messages)
        told.append(Neighbour(row.line or number + 1, said[:TOLD], row.label, cosine))
    return told


def _part(source: Source, place: int) -> str:
    begin, end = source.spans[place]
    return source.text[begin:end]


def _drawn(source: Source, places: Sequence[int]) -> Drawing:
    """The whole text in parts: tokens with their units, and what is between them."""
    units = {place: number for number, place in enumerate(places)}
    parts: list[tuple[str, int | None]] = []
    at = 0
    for place, (begin, end) in enumerate(source.spans):
        if end <= at:
            continue
        if begin > at:
            parts.append((source.text[at:begin], None))
        parts.append((source.text[max(begin, at) : end], units.get(place)))
        at = end
    return Drawing([*parts, (source.text[at:], None)])
