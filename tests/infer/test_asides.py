"""Work between an engine's steps: its share of the time, whose turn it is, what ends it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from steelyard.errors import CheckpointError, RequestError
from steelyard.infer.asides import ALONE_SECONDS, SHARE, Asides, Steps, Tally
from steelyard.infer.request import Explain, Explanation, Failure, Output, Request


class Pieces:
    """Explains in so many pieces of so many seconds."""

    def __init__(self, count: int, seconds: float = 0.0, wrong: Exception | None = None) -> None:
        self.count, self.seconds, self.wrong = count, seconds, wrong
        self.done: list[str] = []

    def check(self, request: Request) -> None:
        if not request.prompt:
            raise RequestError("nothing to explain", param="input")

    def explain(self, request: Request, tally: Tally) -> Steps:
        for _ in range(self.count):
            time.sleep(self.seconds)
            tally.before += 1
            self.done.append(request.id)
            yield
        if self.wrong is not None:
            raise self.wrong
        return Explanation(
            places=[0], shares=[1.0], rest=0, value=1, base=0, residual=0, baseline="", computed_tokens=7
        )


def asked(id: str, project: str = "p", **fields: object) -> Request:
    return Request(id=id, prompt=[1], project=project, explain=Explain(), **fields)  # type: ignore[arg-type]


def test_alone_it_goes_on_and_is_told() -> None:
    asides = Asides(pieces := Pieces(3))
    asides.add(asked("a"), arrived=0.0)
    (told,) = asides.turn(0.0, others=False)
    assert isinstance(told, Output)
    assert (told.id, told.prompt_tokens, told.finish_reason) == ("a", 7, "stop")
    assert told.explanation is not None
    assert (pieces.done, asides.busy) == (["a"] * 3, False)
    assert told.timeline is not None
    assert told.timeline.arrived == 0.0


def test_beside_others_it_has_its_share_of_their_time() -> None:
    """Over many steps; a piece longer than its share waits until it is paid for."""
    asides = Asides(pieces := Pieces(10_000, seconds=0.002))
    asides.add(asked("a"), arrived=0.0)
    others = 0.0
    for _ in range(400):
        asides.turn(0.005, others=True)
        others += 0.005
    assert 0.8 * SHARE * others <= 0.002 * len(pieces.done) <= 1.5 * SHARE * others


def test_messages_are_looked_at_in_between() -> None:
    asides = Asides(pieces := Pieces(10_000, seconds=0.001))
    asides.add(asked("a"), arrived=0.0)
    began = time.monotonic()
    asides.turn(0.0, others=False)
    assert time.monotonic() - began < 5 * ALONE_SECONDS
    assert pieces.done
    gone = asides.abort("a")
    assert gone is not None
    assert gone.prompt_tokens == len(pieces.done), "what was computed is paid for"
    assert (asides.busy, asides.abort("a")) == (False, None)


def test_a_message_is_not_kept_waiting_by_the_next_piece() -> None:
    asides = Asides(pieces := Pieces(10_000))
    asides.add(asked("a"), arrived=0.0)
    asides.turn(0.0, others=False, asked=lambda: len(pieces.done) >= 3)
    assert len(pieces.done) == 3


def test_a_long_piece_is_paid_back_by_others_time() -> None:
    """A second of work beside steps of 10 ms: the next piece comes after ten seconds of these."""
    asides = Asides(pieces := Pieces(100, seconds=0.05))
    asides.add(asked("a"), arrived=0.0)
    turns = 0
    while len(pieces.done) < 2:
        asides.turn(0.01, others=True)
        turns += 1
    assert turns >= 0.05 / SHARE / 0.01 * 0.9


def test_the_project_that_was_served_least_is_next() -> None:
    asides = Asides(pieces := Pieces(1))
    for name in ("a1", "a2", "a3", "b1"):
        asides.add(asked(name, name[0]), arrived=0.0)
    asides.add(asked("c1", "c", priority="batch"), arrived=0.0)
    while asides.busy:
        asides.turn(0.0, others=False)
    assert pieces.done.index("b1") < pieces.done.index("a2")
    assert pieces.done[-1] == "c1"


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        (RequestError("no such place", param="places"), "places"),
        (CheckpointError("no memory"), None),
        (OSError("no file"), None),
        (ValueError("?"), None),
    ],
)
def test_what_goes_wrong_is_that_requests_alone(wrong: Exception, param: str | None) -> None:
    asides = Asides(Pieces(1, wrong=wrong))
    asides.add(asked("a"), arrived=0.0)
    asides.add(asked("b"), arrived=0.0)
    told = asides.turn(0.0, others=False)
    assert [one.id for one in told] == ["a", "b"]
    assert all(isinstance(one, Failure) and one.param == param for one in told)


def test_what_cannot_be_explained_is_refused() -> None:
    makes: list[Callable[[], Asides]] = [lambda: Asides(None), lambda: Asides(Pieces(1))]
    with pytest.raises(RequestError, match="not explained"):
        makes[0]().add(asked("a"), 0.0)
    asides = makes[1]()
    with pytest.raises(RequestError, match="nothing"):
        asides.add(Request(id="a", prompt=[], explain=Explain()), 0.0)
    asides.add(asked("a"), 0.0)
    with pytest.raises(RequestError, match="in use"):
        asides.add(asked("a"), 0.0)
