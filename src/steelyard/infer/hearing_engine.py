"""The engine of networks that hear: transcripts of pieces of recordings.

Pieces wait like the requests of other engines: by priority, then by the project served least. Who runs next runs with
those that are heard in the same way. A pass is done a token at a time, so that canaries, aborts and figures do not wait
for its end. It knows neither HTTP nor processes.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

import torch

from steelyard.errors import CheckpointError, RequestError
from steelyard.infer.decoding.stepped import Steps
from steelyard.infer.grammars import State
from steelyard.infer.hearing import Hearer, Progress, Transcript
from steelyard.infer.request import (
    Aborted,
    EngineStats,
    Failure,
    Output,
    Request,
    Task,
    Timeline,
)
from steelyard.infer.sound import SAMPLE_BYTES, check, sound_tokens
from steelyard.infer.waiting import Waiting

log = logging.getLogger("steelyard.engine")
LIKE = 0.6
"""Of the longest piece of a pass; shorter ones wait for others."""


@dataclass(eq=False, slots=True)
class Job:
    """A piece that waits or is heard."""

    request: Request
    arrived: float

    @property
    def samples(self) -> int:
        """How long it is."""
        return len(self.request.sound or b"") // SAMPLE_BYTES

    @property
    def tokens(self) -> int:
        """What it is paid for."""
        return sound_tokens(self.samples)

    @property
    def sound(self) -> torch.Tensor:
        """Samples `[S]`."""
        content = self.request.sound
        return torch.frombuffer(bytearray(content), dtype=torch.float32) if content else torch.zeros(0)


@dataclass(eq=False, slots=True)
class Pass:
    """Pieces that are heard together."""

    jobs: list[Job]
    work: Steps[Progress, None]
    scheduled: float = field(default_factory=time.monotonic)
    written: list[int] = field(default_factory=list)
    """Tokens of each so far."""


class HearingEngine:
    """Dynamic batching over one hearer."""

    adapters = None
    grammars = None
    task: Task = "transcribe"
    vocabulary = 0

    def __init__(self, hearer: Hearer) -> None:
        self.hears, self._hearer = hearer.hears, hearer
        self.context = hearer.hears.written
        self._waiting: Waiting[Job] = Waiting()
        self._jobs: dict[str, Job] = {}
        self._canaries: list[Job] = []
        self._alone: list[Job] = []
        """Of a pass that failed: each is heard by itself."""
        self._pass: Pass | None = None
        self._steps = self._tokens = self._written = 0

    def add(self, request: Request, arrived: float | None = None, grammar: State | None = None) -> None:
        """Queue a piece, or a canary, which has no sound and waits for nobody.

        Raises:
            RequestError: it cannot be heard here; the field is named.
        """
        job = Job(request, time.monotonic() if arrived is None else arrived)
        if request.id in self._jobs:
            raise RequestError(f"request id '{request.id}' is in use", param="id")
        if not request.counted:
            self._jobs[request.id] = job
            self._canaries.append(job)
            return
        if request.sound is None or request.adapter is not None or request.beam is not None or grammar is not None:
            raise RequestError("this model transcribes recordings and does nothing else", param="model")
        if len(request.sound) % SAMPLE_BYTES or job.samples > self.hears.piece:
            raise RequestError(f"a piece has {self.hears.piece} samples at most", param="file")
        check(self.hears, request.hearing)
        if not bool(job.sound.isfinite().all()):
            raise RequestError("the recording has samples that are no numbers", param="file")
        self._jobs[request.id] = job
        self._waiting.add(job, self._active())

    def abort(self, request_id: str) -> Aborted | None:
        """Drop a piece; None: it has just ended."""
        job = self._jobs.pop(request_id, None)
        if job is None:
            return None
        running = self._pass
        if running is None or job not in running.jobs:
            if job in self._canaries:
                self._canaries.remove(job)
            elif job in self._alone:
                self._alone.remove(job)
            else:
                self._waiting.remove(job)
            return Aborted(id=request_id, prompt_tokens=0, cached_tokens=0, completion_tokens=[])
        written = running.written[running.jobs.index(job)]
        self._leave(running)
        return Aborted(id=request_id, prompt_tokens=job.tokens, cached_tokens=0, completion_tokens=[written])

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._jobs)

    def step(self) -> list[Output | Failure]:
        """Answer canaries; choose who is heard; hear on; say what was said."""
        answers = [self._sing(job) for job in self._canaries]
        self._canaries.clear()
        if self._pass is None:
            self._begin()
        running = self._pass
        if running is None:
            return answers
        self._steps += 1
        try:
            told = next(running.work)
            if isinstance(told, list):
                running.written = told
            else:
                answers += self._tell(running, *told)
        except Exception as error:  # a recording may be anything: others do not end for it
            answers += self._fail(running, error)
            self._pass = None
        self._leave(running)
        return answers

    def stats(self) -> EngineStats:
        """What it has done, and is doing."""
        running = 0 if self._pass is None else sum(map(self._wanted, self._pass.jobs))
        return EngineStats(
            steps=self._steps,
            prompt_tokens=self._tokens,
            generated_tokens=self._written,
            running=running,
            waiting=len(self._jobs) - running,
        )

    def check_integrity(self) -> None:
        """Who waits is known, and the reverse."""
        assert not self._jobs, "a request was lost"
        assert not len(self._waiting), "a request is left"
        assert self._pass is None, "a pass is left"

    def _active(self) -> set[str]:
        """Projects of which something is heard, or heard again."""
        running = [] if self._pass is None else self._pass.jobs
        return {job.request.project for job in (*running, *self._alone)}

    def _wanted(self, job: Job) -> bool:
        return self._jobs.get(job.request.id) is job

    def _leave(self, running: Pass) -> None:
        """Of a pass of which nobody waits for anything more nothing more is done."""
        if not any(map(self._wanted, running.jobs)):
            running.work.close()
            self._pass = None
        self._waiting.forget(self._active())

    def _begin(self) -> None:
        jobs = [self._alone.pop(0)] if self._alone else self._together()
        if not jobs:
            return
        work = self._hearer.hear([job.sound for job in jobs], jobs[0].request.hearing)
        self._pass = Pass(jobs, work, written=[0] * len(jobs))

    def _together(self) -> list[Job]:
        """Whose turn it is, and others that fit beside it, in the order of their turns."""
        first = self._waiting.next()
        if first is None:
            return []
        size = self._hearer.size(first.samples)
        chosen, shortest, longest = [first], size, size
        for job in self._waiting:
            size = self._hearer.size(job.samples)
            least, most = min(shortest, size), max(longest, size)
            same = job.request.hearing == first.request.hearing and least >= LIKE * most
            if job is first or not same or most * (len(chosen) + 1) > 1:
                continue
            chosen.append(job)
            shortest, longest = least, most
        for job in chosen:
            self._waiting.remove(job)
            project = job.request.project
            self._waiting.served[project] = self._waiting.served.get(project, 0) + job.tokens
        return chosen

    def _sing(self, job: Job) -> Output | Failure:
        del self._jobs[job.request.id]
        try:
            self._hearer.canary()
        except CheckpointError as error:
            return Failure(job.request.id, str(error))
        return Output(id=job.request.id, choice=0, text="", tokens=[], finish_reason="stop", prompt_tokens=1)

    def _tell(self, running: Pass, number: int, said: Transcript) -> list[Output | Failure]:
        """What was said in a piece, if somebody still waits for it."""
        job, now = running.jobs[number], time.monotonic()
        if not self._wanted(job):
            return []
        del self._jobs[job.request.id]
        self._tokens += job.tokens
        self._written += said.drawn
        return [
            Output(
                id=job.request.id,
                choice=0,
                text=said.text,
                tokens=said.tokens,
                heard=said.heard,
                finish_reason="stop",
                prompt_tokens=job.tokens,
                completion_tokens=said.drawn,
                rejected_tokens=said.rejected,
                timeline=Timeline(arrived=job.arrived, scheduled=running.scheduled, first_token=now, last_token=now),
            )
        ]

    def _fail(self, running: Pass, error: Exception) -> list[Output | Failure]:
        """Of several, one that fails leaves the others alone."""
        jobs = [job for job in running.jobs if self._wanted(job)]
        if len(jobs) > 1:
            self._alone += jobs
            return []
        failures: list[Output | Failure] = []
        for job in jobs:
            id = job.request.id
            del self._jobs[id]
            if isinstance(error, CheckpointError):  # figures that are not finite
                failures.append(Failure(id, str(error)))
                continue
            log.error("request %s", id, exc_info=error)
            reason = f"the recording cannot be heard: {type(error).__name__}; send another"
            failures.append(Failure(id, reason, "file"))
        return failures
