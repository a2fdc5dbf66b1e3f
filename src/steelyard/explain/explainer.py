"""Explains what a served model says, by float weights that are loaded when they are first needed and let go after."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import torch

from steelyard import memory
from steelyard.errors import CheckpointError, RequestError
from steelyard.explain import faithfulness
from steelyard.explain.decoders import AnswerSubject, LabelSubject, parts
from steelyard.explain.examples import ExampleSubject
from steelyard.explain.kept import Kept
from steelyard.explain.methods import METHODS
from steelyard.explain.nearest import nearest, of_answers
from steelyard.explain.subject import Steps, Subject
from steelyard.explain.texts import TextSubject
from steelyard.infer import effort
from steelyard.infer.asides import Tally
from steelyard.infer.example_reader import example_of
from steelyard.infer.request import Explanation, Request, example_tokens
from steelyard.infer.sound import SAMPLE_BYTES
from steelyard.models import classifiers, quantized, weights
from steelyard.models.classifiers import Classifier
from steelyard.models.decoder import Decoder
from steelyard.models.inputs import TextInputs, around
from steelyard.models.lora import Adapter
from steelyard.text.tokenizer import Tokenizer

FLOAT_TIMES, MOST_TIMES = 2, 8
"""Bytes of float32 for one of bfloat16, and for one of four bits."""


class ClassifierExplainer:
    """See `Explainer`: classes of texts, images, examples of several kinds.

    Args:
        folder: the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._kept = Kept(lambda: open_classifier(folder))

    def check(self, request: Request) -> None:
        """See `Explainer`."""
        asked = request.explain
        assert asked is not None, "see the caller"
        for field, given in (("answer", asked.answer), ("lens", asked.lens), ("words", request.words)):
            if given:
                raise RequestError(f"'{field}' is for models that write: this one classifies", param=field)
        samples = len(request.sound or b"") // SAMPLE_BYTES
        effort.check(asked, example_tokens(len(request.prompt), len(request.image or b""), samples))

    def explain(self, request: Request, tally: Tally) -> Steps[Explanation]:
        """See `Explainer`."""
        asked = request.explain
        assert asked is not None, "see the caller"
        classifier = yield from self._kept.get()
        if asked.target is not None and not 0 <= asked.target < len(classifier.labels):
            raise RequestError(f"'target' must be below {len(classifier.labels)}", param="target")
        if not isinstance(classifier.inputs, TextInputs):
            return (yield from self._example(classifier, request, tally))
        target = asked.target
        if target is None:
            windows = classifier.text.windows(request.prompt)
            target = int(classifiers.of_windows(classifier, [windows])[0].argmax())
            tally.before = sum(map(len, windows))
            yield
        subject = tally.subject = TextSubject(classifier, request.prompt, target)
        before = len(around(classifier.text.tokenizer)[0])
        places = list(range(before, before + subject.units))
        found = yield from explained(subject, request, places)
        return msgspec.structs.replace(found, target=target, computed_tokens=tally.computed)

    def _example(self, classifier: Classifier, request: Request, tally: Tally) -> Steps[Explanation]:
        asked = request.explain
        assert asked is not None, "see the caller"
        example = example_of(classifier, request)
        target = asked.target
        if target is None:
            target = int(classifiers.log_probabilities(classifier, [example])[0].argmax())
            tally.before = classifier.inputs.size(example)
            yield
        subject = tally.subject = ExampleSubject(classifier, example, target)
        found = yield from explained(subject, request, list(range(subject.units)))
        units = [(unit.kind, unit.name) for unit in subject.names]
        return msgspec.structs.replace(found, units=units, target=target, computed_tokens=tally.computed)


class Worn(Protocol):
    """An adapter as an engine knows it."""

    digest: str
    path: Path | None


class DecoderExplainer:
    """See `Explainer`: what follows a prompt.

    Args:
        folder: the checkpoint, of any numbers: what its integers stand for is computed with.
        tokenizer: its own.
        vocabulary: token ids of the model.
        adapter: what a name means now; raises RequestError: nothing.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, vocabulary: int, adapter: Callable[[str], Worn]) -> None:
        self._tokenizer, self._vocabulary, self._find = tokenizer, vocabulary, adapter
        self._kept = Kept(lambda: open_decoder(folder))
        self._adapter: tuple[str, Adapter] | None = None
        """The newest that was explained, and its digest."""

    def check(self, request: Request) -> None:
        """See `Explainer`."""
        asked = request.explain
        assert asked is not None, "see the caller"
        if asked.target is not None or request.words is not None:
            raise RequestError("this model has no classes: name an answer", param="target")
        if not request.prompt or not all(0 <= token < self._vocabulary for token in (*request.prompt, *asked.answer)):
            raise RequestError(f"token ids must be 0 to {self._vocabulary - 1}, and a prompt not empty", param="input")
        if asked.places is not None and not _rising(asked.places, len(request.prompt)):
            raise RequestError("'places' must rise, and be those of tokens of the prompt", param="places")
        if request.adapter is not None:
            self._find(request.adapter)
        if not all(answer and all(0 <= token < self._vocabulary for token in answer) for answer in asked.against):
            raise RequestError("answers have tokens, and these are known", param="against")
        for answer in [asked.answer] if asked.answer else asked.against:
            if asked.against and not parts(answer, asked.against):
                raise RequestError(
                    "none of 'against' parts from the answer: name what else it could be", param="against"
                )
        for prompt, answer in asked.rows:
            if not prompt or not answer or not all(0 <= token < self._vocabulary for token in (*prompt, *answer)):
                raise RequestError("rows have a prompt and an answer of known tokens", param="nearest")
        if not 0 <= asked.own <= effort.MOST_OWN:
            raise RequestError(f"own answers have at most {effort.MOST_OWN} tokens", param="target")
        effort.check(asked, len(request.prompt) + effort.longest_answer(asked))

    def explain(self, request: Request, tally: Tally) -> Steps[Explanation]:
        """See `Explainer`."""
        asked = request.explain
        assert asked is not None, "see the caller"
        worn = None if request.adapter is None else self._find(request.adapter)
        decoder = yield from self._kept.get()
        adapter = None if worn is None else self._read(worn, decoder)
        yield
        answer = asked.answer
        if not answer and asked.against:
            answer = yield from likeliest_of(decoder, adapter, request.prompt, asked.against, tally)
        elif not answer:
            answer = yield from self._own(decoder, adapter, request.prompt, max(1, asked.own), tally)
        places = asked.places
        if places is None:
            special = self._tokenizer.special_tokens
            places = [place for place, token in enumerate(request.prompt) if token not in special]
        others = [one for one in asked.against if one != answer]
        if others:
            subject: AnswerSubject = LabelSubject(decoder, adapter, request.prompt, [answer, *others], 0, places)
        else:
            subject = AnswerSubject(decoder, adapter, request.prompt, answer, places)
        tally.subject = subject
        found = yield from explained(subject, request, places)
        if asked.lens:
            if not subject.states:
                yield from subject.taken()
            text = self._tokenizer.token_text
            layers = yield from subject.lens(asked.lens)
            told = [[(token, text(token), share) for token, share in layer] for layer in layers]
            found = msgspec.structs.replace(found, lens=told)
        if asked.rows:
            near = yield from self._nearest(decoder, adapter, request, answer, tally)
            found = msgspec.structs.replace(found, nearest=near)
        return msgspec.structs.replace(found, answer=answer, computed_tokens=tally.computed)

    def _own(
        self, decoder: Decoder, adapter: Adapter | None, prompt: list[int], most: int, tally: Tally
    ) -> Steps[list[int]]:
        """What most likely follows, token by token, without what ends it."""
        answer: list[int] = []
        while len(answer) < most:
            following = yield from likeliest(decoder, adapter, [*prompt, *answer])
            tally.before += len(prompt) + len(answer)
            ends = following in self._tokenizer.eos_ids
            if not (ends and answer):  # that it says nothing is an answer, too
                answer.append(following)
            if ends:
                break
        return answer

    def _nearest(
        self, decoder: Decoder, adapter: Adapter | None, request: Request, answer: list[int], tally: Tally
    ) -> Steps[list[tuple[int, float]]]:
        asked = request.explain
        assert asked is not None, "see the caller"
        rows = [(request.prompt, answer), *asked.rows]
        gradients = []
        for row in rows:
            (gradient,) = of_answers(decoder, adapter, [row])
            gradients.append(gradient)
            tally.before += len(row[0]) + len(row[1])
            yield
        return nearest(gradients[0], gradients[1:], asked.nearest)

    def _read(self, worn: Worn, decoder: Decoder) -> Adapter:
        if self._adapter is None or self._adapter[0] != worn.digest:
            assert worn.path is not None, "adapters of a worker have files"
            self._adapter = worn.digest, Adapter.load(worn.path, decoder)
        return self._adapter[1]


def explained(subject: Subject, request: Request, places: list[int]) -> Steps[Explanation]:
    """Shares by the method that is asked for, and how far they can be believed."""
    asked = request.explain
    assert asked is not None, "see the caller"
    if not subject.units:
        raise RequestError("there is nothing to explain: the input has no token of its own", param="input")
    shares = yield from METHODS[asked.method](subject)
    if not bool(shares.units.isfinite().all()):
        raise CheckpointError("the model's figures are not finite: its weights are broken")
    found, chance = None, None
    if asked.faithfulness:
        found, chance = yield from faithfulness.measure(subject, shares.units)
    return Explanation(
        places=places,
        shares=shares.units.tolist(),
        rest=shares.rest,
        value=shares.value,
        base=shares.base,
        residual=shares.residual,
        baseline=subject.baseline,
        faithfulness=found,
        chance=chance,
        computed_tokens=subject.computed,
    )


def likeliest(decoder: Decoder, adapter: Adapter | None, prompt: list[int]) -> Steps[int]:
    """The token that most likely follows."""
    subject = AnswerSubject(decoder, adapter, prompt, [0], [])
    logits = yield from subject.following(prompt)
    return int(logits.argmax())


def likeliest_of(
    decoder: Decoder, adapter: Adapter | None, prompt: list[int], answers: list[list[int]], tally: Tally
) -> Steps[list[int]]:
    """The answer that most likely follows, all its tokens together."""
    scores = []
    for answer in answers:
        subject = AnswerSubject(decoder, adapter, prompt, answer, [])
        mean = yield from subject.likelihood(torch.ones(1, 0, dtype=torch.bool))
        tally.before += subject.computed
        scores.append(float(mean) * len(answer))
    return answers[scores.index(max(scores))]


def open_classifier(folder: Path) -> Classifier:
    """A classifier in float32, dense. Raises CheckpointError: it is none, or there is no memory."""
    demand_room(folder)
    classifier = classifiers.load(folder)
    quantized.restore(classifier.network)
    classifier.network.float().requires_grad_(False)
    return classifier


def open_decoder(folder: Path) -> Decoder:
    """A decoder in float32, dense. Raises CheckpointError: it is none, or there is no memory."""
    demand_room(folder)
    decoder = weights.load(folder, torch.float32)
    quantized.restore(decoder)
    decoder.requires_grad_(False)
    return decoder


def demand_room(folder: Path) -> None:
    """Raises CheckpointError: float32 of a checkpoint's weights, and some passes, do not fit into memory."""
    whole = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    wanted = whole * (MOST_TIMES if quantized.is_quantized(folder) else FLOAT_TIMES)
    if not memory.fits(wanted, (), memory.available()):
        gigabytes = wanted / memory.GIGABYTE
        reason = f"there is no memory for the float weights that explanations need ({gigabytes:.1f} GB)"
        raise CheckpointError(f"{reason}: serve fewer models, or ask later")


def _rising(places: list[int], length: int) -> bool:
    inside = all(0 <= place < length for place in places)
    return inside and all(one < other for one, other in itertools.pairwise(places))
