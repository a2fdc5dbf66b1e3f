"""Work that an engine does between its steps, in pieces: explanations, which others are not to wait for.

While others are served, it has a share of the time that their steps take, so that they keep their pace; alone, all of
it. Whose turn it is goes as for tokens: by priority, then by the project served least. It knows no way of explaining:
whoever composes the engine's process hands one down.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Protocol

from steelyard.errors import CheckpointError, RequestError
from steelyard.infer.request import Aborted, Explanation, Failure, Output, Request, Timeline
from steelyard.infer.waiting import Waiting

SHARE = 0.1
"""Of the time that others' steps take."""
ALONE_SECONDS = 0.05
"""How long it may go on where nobody else waits, until messages are looked at."""
DEBT_SECONDS = 60.0
"""The most that a long piece is held against those after it."""

log = logging.getLogger("steelyard.engine")
Steps = Generator[None, None, Explanation]


class Counted(Protocol):
    """Something that is computed."""

    computed: int
    """Tokens so far."""


@dataclass(slots=True)
class Tally:
    """What an explanation has come to."""

    before: int = 0
    """Tokens before its subject was there."""
    subject: Counted | None = None

    @property
    def computed(self) -> int:
        """Tokens so far."""
        return self.before + (0 if self.subject is None else self.subject.computed)


class Explainer(Protocol):
    """Explains what the engine's model says."""

    def check(self, request: Request) -> None:
        """Raises RequestError: it cannot be explained; the field is named."""
        ...

    def explain(self, request: Request, tally: Tally) -> Steps:
        """Pieces of some milliseconds, and what came of them. Raises as `check`, or CheckpointError: no memory."""
        ...


@dataclass(eq=False, slots=True)
class Aside:
    """A request that is explained, or waits for it."""

    request: Request
    arrived: float
    steps: Steps | None = None
    """None: it has not begun."""
    scheduled: float = 0.0
    tally: Tally = field(default_factory=Tally)


class Asides:
    """What waits, what is being done, and how much time it may take.

    Args:
        explainer: does the work; None: nothing is explained here.
    """

    def __init__(self, explainer: Explainer | None) -> None:
        self._explainer = explainer
        self._waiting: Waiting[Aside] = Waiting()
        self._asides: dict[str, Aside] = {}
        self._credit = 0.0

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._asides)

    def add(self, request: Request, arrived: float) -> None:
        """Queue a request. Raises RequestError: it cannot be explained."""
        if self._explainer is None:
            raise RequestError("this model is not explained", param="explain", code="model_not_supported")
        if request.id in self._asides:
            raise RequestError(f"request id '{request.id}' is in use", param="id")
        self._explainer.check(request)
        aside = self._asides[request.id] = Aside(request, arrived)
        self._waiting.add(aside, set())

    def abort(self, request_id: str) -> Aborted | None:
        """Drop a request; None: there is no such one. What was computed is paid for."""
        aside = self._asides.get(request_id)
        if aside is None:
            return None
        self._end(aside)
        return Aborted(id=request_id, prompt_tokens=aside.tally.computed, cached_tokens=0, completion_tokens=[])

    def turn(self, spent: float, *, others: bool, asked: Callable[[], bool] = lambda: False) -> list[Output | Failure]:
        """Some work.

        Args:
            spent: seconds that the step before took.
            others: whether anybody waits for the next step.
            asked: whether a message has come meanwhile.
        """
        if not self._asides:
            self._credit = 0.0
            return []
        began = time.monotonic()
        self._credit = min(self._credit + SHARE * spent, ALONE_SECONDS)
        said: list[Output | Failure] = []
        while self._asides and not asked() and self._may_go_on(others, began):
            before = time.monotonic()
            said += self._piece()
            if others:
                self._credit = max(self._credit - (time.monotonic() - before), -DEBT_SECONDS)
        return said

    def _may_go_on(self, others: bool, began: float) -> bool:
        return self._credit > 0 if others else time.monotonic() - began < ALONE_SECONDS

    def _piece(self) -> list[Output | Failure]:
        aside = self._waiting.next()
        assert aside is not None, "see the caller"
        assert self._explainer is not None, "see `add`"
        request = aside.request
        try:
            if aside.steps is None:
                aside.scheduled = time.monotonic()
                aside.steps = self._explainer.explain(request, aside.tally)
            next(aside.steps)
        except StopIteration as end:
            return [self._told(aside, end.value)]
        except RequestError as error:
            return self._failed(aside, Failure(request.id, str(error), error.param, error.code))
        except (CheckpointError, MemoryError, OSError) as error:
            return self._failed(aside, Failure(request.id, str(error) or "not enough memory to explain"))
        except Exception as error:  # an input may be anything: others do not end for it
            log.exception("explaining request %s", request.id)
            return self._failed(aside, Failure(request.id, f"it cannot be explained: {type(error).__name__}"))
        return []

    def _told(self, aside: Aside, found: Explanation) -> Output:
        self._end(aside)
        now = time.monotonic()
        return Output(
            id=aside.request.id,
            choice=0,
            text="",
            tokens=[],
            explanation=found,
            finish_reason="stop",
            prompt_tokens=found.computed_tokens,
            timeline=Timeline(arrived=aside.arrived, scheduled=aside.scheduled, first_token=now, last_token=now),
        )

    def _failed(self, aside: Aside, failure: Failure) -> list[Output | Failure]:
        self._end(aside)
        return [failure]

    def _end(self, aside: Aside) -> None:
        del self._asides[aside.request.id]
        served, project = self._waiting.served, aside.request.project
        served[project] = served.get(project, 0) + aside.tally.computed
        self._waiting.remove(aside)
        self._waiting.forget(set())
        if aside.steps is not None:
            aside.steps.close()
