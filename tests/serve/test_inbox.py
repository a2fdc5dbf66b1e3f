"""Outputs that wait for their reader: few as they came, many joined, always everything in the order of its choice."""

from __future__ import annotations

import random
import tracemalloc

from steelyard.errors import EngineUnavailableError
from steelyard.infer.request import Output, PromptLogprob, TokenLogprob
from steelyard.serve.inbox import MOST_JOINED, MOST_WAITING, Inbox


def output(choice: int, token: int, size: int, *, logprobs: bool = False, ends: bool = False) -> Output:
    told = [TokenLogprob(token, str(token), -1.0, [])] if logprobs else None
    return Output(
        id="a",
        choice=choice,
        text=f"{token} ",
        tokens=[token],
        logprobs=told,
        finish_reason="length" if ends else None,
        prompt_tokens=3,
        completion_tokens=size,
    )


def drain(inbox: Inbox) -> list[Output]:
    found = []
    while not inbox.empty():
        item = inbox.get_nowait()
        assert isinstance(item, Output)
        found.append(item)
    return found


def test_few_stay_as_they_are() -> None:
    inbox, outputs = Inbox(), [output(0, number, number + 1) for number in range(MOST_WAITING)]
    for one in outputs:
        inbox.put_nowait(one)
    assert drain(inbox) == outputs


def test_many_are_joined_and_lose_nothing() -> None:
    seeded, inbox = random.Random(4), Inbox()
    wanted: dict[int, list[int]] = {choice: [] for choice in range(3)}
    found: dict[int, list[Output]] = {choice: [] for choice in range(3)}
    for number in range(3000):
        choice = seeded.randrange(3)
        wanted[choice].append(number)
        inbox.put_nowait(output(choice, number, len(wanted[choice]), logprobs=True))
        if seeded.random() < 0.1:
            item = inbox.get_nowait()
            assert isinstance(item, Output)
            found[item.choice].append(item)
    assert inbox.qsize() < MOST_WAITING + 3000 // MOST_JOINED + 6
    for choice in range(3):
        inbox.put_nowait(output(choice, -1, len(wanted[choice]) + 1, logprobs=True, ends=True))
        wanted[choice].append(-1)
    for item in drain(inbox):
        found[item.choice].append(item)
    for choice, tokens in wanted.items():
        pieces = found[choice]
        assert [token for piece in pieces for token in piece.tokens] == tokens
        assert "".join(piece.text for piece in pieces).split() == list(map(str, tokens))
        assert [told.token for piece in pieces for told in piece.logprobs or []] == tokens
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
        seen = 0
        for piece in pieces:  # each still says how many there have been
            seen += len(piece.tokens)
            assert piece.completion_tokens == seen


def test_a_stalled_reader_holds_little() -> None:
    inbox = Inbox()
    tracemalloc.start()
    for number in range(20_000):
        inbox.put_nowait(output(0, 1000 + number, number))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 2_000_000
    assert sum(len(one.tokens) for one in drain(inbox)) == 20_000


def test_ends_errors_and_scored_prompts_keep_their_places() -> None:
    inbox, error = Inbox(), EngineUnavailableError("gone")
    for number in range(MOST_WAITING):
        inbox.put_nowait(output(0, number, number))
    scored = Output(id="a", choice=0, text="", tokens=[], prompt_logprobs=[PromptLogprob(1, "a", -1.0, [], 1)])
    for item in (scored, output(0, 7, 7), error, None):
        inbox.put_nowait(item)
    everything = [inbox.get_nowait() for _ in range(inbox.qsize())]
    assert everything[MOST_WAITING] == scored
    assert everything[-2:] == [error, None]
    assert everything[MOST_WAITING + 1 : -2] == [output(0, 7, 7)]
