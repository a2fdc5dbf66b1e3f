"""Explains what a served model says, by float weights that are loaded when they are first needed and let go after."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import msgspec
import torch

from steelyard import memory
from steelyard.errors import CheckpointError, RequestError
from steelyard.explain import faithfulness
from steelyard.explain.decoders import AnswerSubject
from steelyard.explain.examples import ExampleSubject
from steelyard.explain.methods import METHODS
from steelyard.explain.subject import Steps, Subject
from steelyard.explain.texts import TextSubject
from steelyard.infer.effort import MOST, most
from steelyard.infer.example_reader import example_of
from steelyard.infer.request import Explanation, Request, example_tokens
from steelyard.infer.sound import SAMPLE_BYTES
from steelyard.models import classifiers, quantized, weights
from steelyard.models.classifiers import Classifier
from steelyard.models.decoder import Decoder
from steelyard.models.inputs import TextInputs, around
from steelyard.models.lora import Adapter
from steelyard.text.tokenizer import Tokenizer

PAUSE = 0.005
"""Seconds that are waited at once for weights that a thread reads."""
KEPT_SECONDS = 600.0
"""How long float weights stay after the last explanation."""
MOST_ANSWER = 512
FLOAT_TIMES, MOST_TIMES = 2, 8
"""Bytes of float32 for one of bfloat16, and for one of four bits."""


class _Kept:
    """Something that a thread reads when it is needed, and that is let go when it was not for some time."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(1, "explain")
        self._found: Future[Any] | None = None
        self._timer: threading.Timer | None = None

    def get(self) -> Steps[Any]:
        """It, once it is read."""
        if self._timer is not None:
            self._timer.cancel()
        if self._found is None or (self._found.done() and self._found.exception() is not None):
            self._found = self._thread.submit(self._read)
        found = self._found
        while not found.done():
            wait([found], PAUSE)
            yield
        self._timer = threading.Timer(KEPT_SECONDS, self.drop)
        self._timer.daemon = True
        self._timer.start()
        return found.result()

    def drop(self) -> None:
        """Let it go; who has it keeps it to the end of his explanation."""
        self._found = None


class ClassifierExplainer:
    """See `Explainer`: classes of texts, images, examples of several kinds.

    Args:
        folder: the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._kept = _Kept(lambda: open_classifier(folder))

    def check(self, request: Request) -> int:
        """See `Explainer`."""
        asked = request.explain
        assert asked is not None, "see the caller"
        for field, given in (("answer", asked.answer), ("lens", asked.lens), ("words", request.words)):
            if given:
                raise RequestError(f"'{field}' is for models that write: this one classifies", param=field)
        samples = len(request.sound or b"") // SAMPLE_BYTES
        return _bounded(request, example_tokens(len(request.prompt), len(request.image or b""), samples))

    def explain(self, request: Request) -> Steps[Explanation]:
        """See `Explainer`."""
        asked = request.explain
        assert asked is not None, "see the caller"
        classifier: Classifier = yield from self._kept.get()
        if asked.target is not None and not 0 <= asked.target < len(classifier.labels):
            raise RequestError(f"'target' must be below {len(classifier.labels)}", param="target")
        if not isinstance(classifier.inputs, TextInputs):
            return (yield from self._example(classifier, request))
        target, computed = asked.target, 0
        if target is None:
            windows = classifier.text.windows(request.prompt)
            target = int(classifiers.of_windows(classifier, [windows])[0].argmax())
            computed = sum(map(len, windows))
            yield
        subject = TextSubject(classifier, request.prompt, target)
        before = len(around(classifier.text.tokenizer)[0])
        places = list(range(before, before + subject.units))
        found = yield from explained(subject, request, places)
        return msgspec.structs.replace(found, target=target, computed_tokens=found.computed_tokens + computed)

    def _example(self, classifier: Classifier, request: Request) -> Steps[Explanation]:
        asked = request.explain
        assert asked is not None, "see the caller"
        example = example_of(classifier, request)
        target, computed = asked.target, 0
        if target is None:
            target = int(classifiers.log_probabilities(classifier, [example])[0].argmax())
            computed = classifier.inputs.size(example)
            yield
        subject = ExampleSubject(classifier, example, target)
        found = yield from explained(subject, request, list(range(subject.units)))
        units = [(unit.kind, unit.name) for unit in subject.names]
        return msgspec.structs.replace(
            found, units=units, target=target, computed_tokens=found.computed_tokens + computed
        )


class DecoderExplainer:
    """See `Explainer`: what follows a prompt.

    Args:
        folder: the checkpoint, of any numbers: what its integers stand for is computed with.
        adapter_path: where the adapter of a name is.
    """

    def __init__(self, folder: Path, adapter_path: Callable[[str], Path]) -> None:
        self._tokenizer = Tokenizer.load(folder)
        self._path = adapter_path
        self._kept = _Kept(lambda: open_decoder(folder))
        self._adapters: dict[Path, Adapter] = {}
        self._vocabulary = self._tokenizer.vocabulary

    def check(self, request: Request) -> int:
        """See `Explainer`."""
        asked = request.explain
        assert asked is not None, "see the caller"
        if asked.target is not None or request.words is not None:
            raise RequestError("this model has no classes: name an answer", param="target")
        if not request.prompt or not all(0 <= token < self._vocabulary for token in (*request.prompt, *asked.answer)):
            raise RequestError(f"token ids must be 0 to {self._vocabulary - 1}, and a prompt not empty", param="input")
        if len(asked.answer) > MOST_ANSWER:
            reason = f"the answer has {len(asked.answer)} tokens; {MOST_ANSWER} are explained at the most"
            raise RequestError(reason, param="target")
        if asked.places is not None and not _rising(asked.places, len(request.prompt)):
            raise RequestError("'places' must rise, and be those of tokens of the prompt", param="places")
        if request.adapter is not None:
            self._path(request.adapter)
        return _bounded(request, len(request.prompt) + len(asked.answer))

    def explain(self, request: Request) -> Steps[Explanation]:
        """See `Explainer`."""
        asked = request.explain
        assert asked is not None, "see the caller"
        decoder: Decoder = yield from self._kept.get()
        adapter = None if request.adapter is None else self._adapter(request.adapter, decoder)
        yield
        answer, computed = asked.answer, 0
        if not answer:
            answer = [(yield from likeliest(decoder, adapter, request.prompt))]
            computed = len(request.prompt)
        places = asked.places
        if places is None:
            special = self._tokenizer.special_tokens
            places = [place for place, token in enumerate(request.prompt) if token not in special]
        subject = AnswerSubject(decoder, adapter, request.prompt, answer, places)
        found = yield from explained(subject, request, places)
        if asked.lens:
            if not subject.states:
                yield from subject.taken()
            text = self._tokenizer.token_text
            layers = yield from subject.lens(asked.lens)
            told = [[(token, text(token), share) for token, share in layer] for layer in layers]
            found = msgspec.structs.replace(found, lens=told)
        return msgspec.structs.replace(found, answer=answer, computed_tokens=subject.computed + computed)

    def _adapter(self, name: str, decoder: Decoder) -> Adapter:
        path = self._path(name)
        if path not in self._adapters:
            self._adapters.clear()  # one is enough: it is small, and read fast
            self._adapters[path] = Adapter.load(path, decoder)
        return self._adapters[path]


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


def _bounded(request: Request, tokens: int) -> int:
    asked = request.explain
    assert asked is not None, "see the caller"
    count = most(asked, tokens)
    if count > MOST:
        reason = f"the explanation would compute {count} tokens, {MOST} are the limit: shorten the input"
        raise RequestError(f"{reason}, or take the method 'lrp'", param="input", code="context_length_exceeded")
    return count


def _rising(places: list[int], length: int) -> bool:
    inside = all(0 <= place < length for place in places)
    return inside and all(one < other for one, other in itertools.pairwise(places))
