"""What a recogniser's places say: the likeliest texts, summed over all ways to spell each, and when each was said.

A way of spelling a text is a character or a blank at every place; repeated ones are one, blanks are none (Graves et al.
2006). `beams` keeps the likeliest beginnings, each with the probability of all its ways that end in a blank and of
those that do not (Hannun et al. 2014, algorithm 1), and may ask a language model of characters about each that is
added. `align` finds the likeliest single way of a text that is known, by Viterbi's algorithm.
"""

# P places  K characters and the blank, which is 0  U characters of a text

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from steelyard.infer.decoding import stepped
from steelyard.infer.decoding.stepped import Steps

CHARACTERS = -8.0
"""Log-probability below which a character is not tried at a place, where any is likelier."""

REMEMBERED = 1 << 14
"""Beginnings of which it is known what the language model says."""
Language = Callable[[tuple[int, ...], int | None], float]
"""What is added to a beginning's score for a character after it, or for ending (None)."""


class Beam(NamedTuple):
    """A text that may have been said."""

    characters: tuple[int, ...]
    score: float
    """Log of the summed probability, and what the language model says."""


def beams(
    log_probabilities: torch.Tensor, width: int, language: Language | None = None, least: float = CHARACTERS
) -> list[Beam]:
    """The likeliest texts, the best first.

    Args:
        log_probabilities: `[P, K]`, in nats.
        width: beginnings that are kept at each place, and texts that come back, at most.
        language: see `Language`.
        least: see `CHARACTERS`.
    """
    return stepped.last(searching(log_probabilities, width, language, least))


def searching(
    log_probabilities: torch.Tensor, width: int, language: Language | None = None, least: float = CHARACTERS
) -> Steps[None, list[Beam]]:
    """`beams`, a place at a step: of half a minute they may take half a minute."""
    kept: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}
    said: dict[tuple[int, ...], float] = {(): 0.0}  # what the language model says of each beginning
    for place in log_probabilities.tolist():
        floor = min(least, max(place))
        tried = [(character, value) for character, value in enumerate(place) if character and value >= floor]
        following: dict[tuple[int, ...], list[float]] = {}
        for text, (blank, other) in kept.items():
            both = _sum(blank, other)
            entry = following.setdefault(text, [-math.inf, -math.inf])
            entry[0] = _sum(entry[0], both + place[0])
            last = text[-1] if text else 0
            if last:
                entry[1] = _sum(entry[1], other + place[last])
            for character, value in tried:
                longer = (*text, character)
                if longer not in said:
                    said[longer] = said[text] + (0.0 if language is None else language(text, character))
                onward = (blank if character == last else both) + value
                if onward > -math.inf:  # a character comes again only after a blank
                    entry = following.setdefault(longer, [-math.inf, -math.inf])
                    entry[1] = _sum(entry[1], onward)
        best = sorted(following, key=lambda text: _sum(*following[text]) + said[text], reverse=True)[:width]
        kept = {text: (following[text][0], following[text][1]) for text in best}
        if len(said) > REMEMBERED:
            said = {text: said[text] for text in best}
        yield
    found = [
        Beam(text, _sum(*ends) + said[text] + (0.0 if language is None else language(text, None)))
        for text, ends in kept.items()
    ]
    return sorted(found, key=lambda beam: beam.score, reverse=True)


def _sum(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))


class Span(NamedTuple):
    """Where a character is said."""

    first: int
    """Its first place,"""
    last: int
    """and its last."""


def align(log_probabilities: torch.Tensor, characters: Sequence[int]) -> tuple[list[Span], float] | None:
    """Where each character of a text is said, by its likeliest way, and the log-probability of that.

    Args:
        log_probabilities: `[P, K]`, in nats.
        characters: U of them, none a blank.

    Returns:
        None: there are too few places for so many characters.
    """
    if not len(log_probabilities):
        return None if characters else ([], 0.0)
    states = torch.zeros(2 * len(characters) + 1, dtype=torch.int64)  # blanks around every character
    states[1::2] = torch.tensor(characters, dtype=torch.int64)
    # From two states before only to a character that differs from the one there.
    skips = torch.zeros(len(states), dtype=torch.bool)
    skips[3::2] = states[3::2] != states[1:-2:2]
    scores = torch.full((len(states),), -torch.inf, dtype=log_probabilities.dtype)
    scores[:2] = log_probabilities[0, states[:2]]
    came_from: list[torch.Tensor] = []
    for place in log_probabilities[1:]:
        before = torch.stack([scores, _shifted(scores, 1), _shifted(scores, 2).masked_fill(~skips, -torch.inf)])
        values, steps = before.max(0)
        scores = values + place[states]
        came_from.append(steps)
    ends = scores[-2:]
    at = len(states) - len(ends) + int(ends.argmax())
    score = float(scores[at])
    if score == -math.inf:
        return None
    way = [at]
    for steps in reversed(came_from):
        at -= int(steps[at])
        way.append(at)
    spans: dict[int, Span] = {}
    for place_, state in enumerate(reversed(way)):
        if state % 2:
            known = spans.get(state // 2)
            spans[state // 2] = Span(place_, place_) if known is None else Span(known.first, place_)
    return [spans[number] for number in range(len(characters))], score


def _shifted(scores: torch.Tensor, by: int) -> torch.Tensor:
    """What is so many states before."""
    return torch.cat([scores.new_full((by,), -torch.inf), scores])[: len(scores)]
