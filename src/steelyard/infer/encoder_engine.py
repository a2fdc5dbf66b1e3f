"""The engine of networks that read and do not write: embeddings, classes of texts, tags of words.

Requests wait like those of a decoder's engine: by priority, then by the project served least. Who runs next runs with
those of like length, so that little of a forward pass is padding. It knows neither HTTP nor processes.
"""

# B rows  L longest row  C classes  D width

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from steelyard.errors import CheckpointError, RequestError
from steelyard.infer.example_reader import ExampleReader
from steelyard.infer.grammars import State
from steelyard.infer.request import (
    Aborted,
    EngineStats,
    Failure,
    LabelPath,
    Output,
    Request,
    Task,
    Timeline,
    example_tokens,
)
from steelyard.infer.sound import SAMPLE_BYTES
from steelyard.infer.waiting import Waiting
from steelyard.models import classifiers
from steelyard.models.classifiers import Classifier
from steelyard.models.encoder import Encoder
from steelyard.models.fusion import FusionClassifier
from steelyard.models.inputs import around, padded
from steelyard.text.tokenizer import Tokenizer

log = logging.getLogger("steelyard.engine")
ROWS, TOKENS = 64, 4096
"""Of a forward pass, padding included; a longer row runs alone."""
LIKE = 0.6
"""Of the longest row of a pass; shorter ones wait for others."""
ENOUGH = 512
"""Tokens of a pass that even unlike rows join, since fewer take as long."""
ANY_LENGTH = 4096
"""Most tokens of a row where the network has no limit."""
MOST_PATHS = 64


class Reader(Protocol):
    """A network, and what it reads and says."""

    task: Task
    labels: tuple[str, ...]
    """Of its classes."""
    width: int
    """Of its embeddings; 0: it makes none."""
    context: int
    """Most tokens of a request."""
    tokenizer: Tokenizer | None
    """None: it reads no text."""

    def rows(self, request: Request) -> list[Any]:
        """What it reads of a request, in as many rows as that takes. Raises RequestError: nothing that it reads."""
        ...

    def size(self, row: Any) -> int:
        """Tokens of a row."""
        ...

    def answer(self, requests: list[Request], rows: list[list[Any]]) -> list[tuple[list[float], list[LabelPath]]]:
        """What it says of each request: see `Output`."""
        ...


@dataclass(eq=False, slots=True)
class Job:
    """A request that waits."""

    request: Request
    rows: list[Any]
    longest: int
    arrived: float


class EncoderEngine:
    """Dynamic batching over one reader."""

    adapters = None
    grammars = None

    def __init__(self, reader: Reader) -> None:
        self.reader, self.context = reader, reader.context
        self._waiting: Waiting[Job] = Waiting()
        self._jobs: dict[str, Job] = {}
        self._steps = self._tokens = 0

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return 1 if self.reader.tokenizer is None else self.reader.tokenizer.vocabulary

    def add(self, request: Request, arrived: float | None = None, grammar: State | None = None) -> None:
        """Queue a request.

        Raises:
            RequestError: it cannot be read here; the field is named.
        """
        if request.id in self._jobs:
            raise RequestError(f"request id '{request.id}' is in use", param="id")
        if request.adapter is not None or request.beam is not None or grammar is not None:
            raise RequestError("this model reads and does not write", param="model")
        if len(request.prompt) > self.context:
            raise RequestError(
                f"the input has {len(request.prompt)} tokens; the context holds {self.context}",
                param="input",
                code="context_length_exceeded",
            )
        if not all(0 <= token < self.vocabulary for token in request.prompt):
            raise RequestError(f"token ids must be 0 to {self.vocabulary - 1}", param="input")
        rows = self.reader.rows(request)
        longest = max(map(self.reader.size, rows))
        job = Job(request, rows, longest, time.monotonic() if arrived is None else arrived)
        self._jobs[request.id] = job
        self._waiting.add(job, set())

    def abort(self, request_id: str) -> Aborted | None:
        """Drop a request that waits; None: it has just ended."""
        job = self._jobs.pop(request_id, None)
        if job is None:
            return None
        self._waiting.remove(job)
        return Aborted(id=request_id, prompt_tokens=0, cached_tokens=0, completion_tokens=[])

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._jobs)

    def step(self) -> list[Output | Failure]:
        """Choose, run, answer."""
        jobs = self._together()
        if not jobs:
            return []
        scheduled = time.monotonic()
        answers = self._answers(jobs)
        self._steps += 1
        now = time.monotonic()
        outputs: list[Output | Failure] = []
        for job, answer in zip(jobs, answers, strict=True):
            if isinstance(answer, Failure):
                outputs.append(self._end(job, answer))
                continue
            values, paths = answer
            self._tokens += _paid(job.request) if job.request.counted else 0
            timeline = Timeline(arrived=job.arrived, scheduled=scheduled, first_token=now, last_token=now)
            output = Output(
                id=job.request.id,
                choice=0,
                text="",
                tokens=[],
                values=values,
                paths=paths or None,
                finish_reason="stop",
                prompt_tokens=_paid(job.request),
                timeline=timeline,
            )
            outputs.append(self._end(job, output))
        return outputs

    def _answers(self, jobs: list[Job]) -> list[tuple[list[float], list[LabelPath]] | Failure]:
        """What is said of each job, or why nothing is. Of several, one that fails leaves the others alone."""
        try:
            return list(self.reader.answer([job.request for job in jobs], [job.rows for job in jobs]))
        except Exception as error:  # a text may be anything: others do not end for it
            if len(jobs) > 1:
                return [found for job in jobs for found in self._answers([job])]
            id = jobs[0].request.id
            if isinstance(error, CheckpointError):  # figures that are not finite
                return [Failure(id, str(error))]
            log.exception("request %s", id)
            return [Failure(id, f"the input cannot be read: {type(error).__name__}; send another", "input")]

    def stats(self) -> EngineStats:
        """What it has done, and is doing."""
        return EngineStats(steps=self._steps, prompt_tokens=self._tokens, waiting=len(self._jobs))

    def check_integrity(self) -> None:
        """Who waits is known, and the reverse."""
        assert {job.request.id for job in self._waiting} == self._jobs.keys(), "a request was lost"

    def _together(self) -> list[Job]:
        """Whose turn it is, and others that fit beside it, in the order of their turns."""
        first = self._waiting.next()
        if first is None:
            return []
        chosen, longest, rows = [first], first.longest, len(first.rows)
        for job in self._waiting:
            most, count = max(longest, job.longest), rows + len(job.rows)
            alike = min(longest, job.longest) >= LIKE * most or most * count <= ENOUGH
            same = job.request.paths == first.request.paths
            if job is first or not alike or not same or count > ROWS or most * count > TOKENS:
                continue
            chosen.append(job)
            longest, rows = most, count
        for job in chosen:
            project = job.request.project
            self._waiting.served[project] = self._waiting.served.get(project, 0) + _paid(job.request)
        return chosen

    def _end(self, job: Job, said: Output | Failure) -> Output | Failure:
        del self._jobs[job.request.id]
        self._waiting.remove(job)
        self._waiting.forget(set())
        return said


class SentenceReader:
    """Embeddings of texts, of length 1.

    Args:
        encoder: of sentences.
        tokenizer: its own.
    """

    task: Task = "embed"
    labels: tuple[str, ...] = ()

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer) -> None:
        self._encoder = encoder
        self.tokenizer: Tokenizer | None = tokenizer
        self.width, self.context = encoder.config.hidden_size, encoder.config.max_position_embeddings

    def rows(self, request: Request) -> list[Any]:
        """See `Reader`."""
        return [request.prompt or [0]]

    def size(self, row: Any) -> int:
        """See `Reader`."""
        return len(row)

    @torch.inference_mode()
    def answer(self, requests: list[Request], rows: list[list[Any]]) -> list[tuple[list[float], list[LabelPath]]]:
        """See `Reader`."""
        vectors = self._encoder.embed(*padded([row for (row,) in rows])).float()
        if not bool(vectors.isfinite().all()):
            raise CheckpointError("the model's figures are not finite: its weights are broken")
        return [(vector, []) for vector in vectors.tolist()]


class ClassReader:
    """Log-probabilities of the classes of texts; long ones in windows, as in evaluation."""

    task: Task = "classify"
    width = 0

    def __init__(self, classifier: Classifier) -> None:
        self._classifier, self._inputs = classifier, classifier.text
        self.labels = classifier.labels
        self.tokenizer: Tokenizer | None = classifier.text.tokenizer
        window = self.window = self._inputs.window
        self.around = sum(map(len, around(self._inputs.tokenizer)))
        self.context = ROWS * window // 2 if window else self._inputs.context or ANY_LENGTH  # in one pass

    def rows(self, request: Request) -> list[Any]:
        """See `Reader`."""
        return list(self._inputs.windows(request.prompt or [0]))

    def size(self, row: Any) -> int:
        """See `Reader`."""
        return len(row)

    def answer(self, requests: list[Request], rows: list[list[Any]]) -> list[tuple[list[float], list[LabelPath]]]:
        """See `Reader`."""
        scores = classifiers.of_windows(self._classifier, rows)
        return [(row, []) for row in scores.tolist()]


class WordReader:
    """Tags of words: the likeliest sequences, and how likely each word's tag of the first is by itself."""

    task: Task = "tag"
    width = 0

    def __init__(self, classifier: Classifier) -> None:
        self._classifier, self._inputs = classifier, classifier.words
        self.labels = classifier.labels
        self.tokenizer: Tokenizer | None = self._inputs.tokenizer
        self.context = self._inputs.context or ANY_LENGTH

    def rows(self, request: Request) -> list[Any]:
        """See `Reader`."""
        if not request.words:
            if request.counted:
                raise RequestError("there are no words to tag", param="input")
            return [self._inputs.sentence(["a"])]  # a canary's
        row = self._inputs.sentence(request.words)
        if len(row.tokens) > self.context:
            reason = f"a sentence has {len(row.tokens)} tokens; the context holds {self.context}: part it"
            raise RequestError(reason, param="input", code="context_length_exceeded")
        return [row]

    def size(self, row: Any) -> int:
        """See `Reader`."""
        return len(row.tokens)

    def answer(self, requests: list[Request], rows: list[list[Any]]) -> list[tuple[list[float], list[LabelPath]]]:
        """See `Reader`."""
        examples = [row for (row,) in rows]
        most = max(request.paths for request in requests)
        found = classifiers.tagged(self._classifier, examples, k=min(most, MOST_PATHS))
        each = iter(classifiers.log_probabilities(self._classifier, examples))
        answers = []
        for request, paths in zip(requests, found, strict=True):
            own = [float(next(each)[label]) for label in paths[0].labels]
            answers.append((own, [LabelPath(path.labels, path.score) for path in paths[: request.paths]]))
        return answers


def _paid(request: Request) -> int:
    """Tokens that a request is paid for."""
    return example_tokens(len(request.prompt), len(request.image or b""), len(request.sound or b"") // SAMPLE_BYTES)


def open_reader(folder: Path) -> Reader | None:
    """The reader of a checkpoint; None: it is none.

    Raises:
        CheckpointError: one whose files do not fit each other, or that reads what is not served yet.
    """
    if not (folder / "config.json").is_file():
        return None  # whoever opens it as something else says what is missing
    reader: Reader
    if classifiers.architecture(folder) in classifiers.ENCODERS:
        encoder = classifiers.load_encoder(folder)
        reader, known = SentenceReader(encoder, Tokenizer.load(folder)), encoder.config.vocab_size
    elif not classifiers.is_classifier(folder):
        return None
    elif classifiers.tags_words(folder) or classifiers.reads_texts(folder):
        classifier = classifiers.load(folder)
        reader = (WordReader if classifiers.tags_words(folder) else ClassReader)(classifier)
        config: Any = classifier.network.config
        known = config.vocab_size
    else:
        classifier = classifiers.load(folder)
        reader, network = ExampleReader(classifier), classifier.network
        text = network.config.text if isinstance(network, FusionClassifier) else None
        known = 1 if text is None else text.vocab_size
    if reader.tokenizer is not None and reader.tokenizer.vocabulary > known:
        raise CheckpointError(f"'{folder}': the tokenizer has more tokens than the model; pull it again")
    return reader
