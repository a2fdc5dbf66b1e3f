"""Texts of a recogniser's places against every way of spelling, and where they are said against every way of one."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.infer.decoding import ctc


def spelt(way: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(character for character, _ in itertools.groupby(way) if character)


def every(log_probabilities: torch.Tensor) -> dict[tuple[int, ...], dict[tuple[int, ...], float]]:
    """Of each text its ways, with their log-probabilities."""
    places, characters = log_probabilities.shape
    found: dict[tuple[int, ...], dict[tuple[int, ...], float]] = defaultdict(dict)
    values = log_probabilities.tolist()
    for way in itertools.product(range(characters), repeat=places):
        found[spelt(way)][way] = sum(values[place][character] for place, character in enumerate(way))
    return found


def drawn(seed: int, places: int, characters: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(places, characters, generator=draw, dtype=torch.float64)).log_softmax(-1)


def language(text: tuple[int, ...], character: int | None) -> float:
    """Some function of what was said."""
    return math.sin(7.0 * len(text) + 3.0 * (character or 0) + sum(text)) - 0.5


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 6), st.integers(2, 4), st.booleans())
def test_beams_against_every_way(seed: int, places: int, characters: int, asked: bool) -> None:
    log_probabilities = drawn(seed, places, characters)
    expected = {}
    for text, ways in every(log_probabilities).items():
        score = float(torch.tensor(list(ways.values()), dtype=torch.float64).logsumexp(0))
        if asked:
            score += sum(language(text[:place], text[place]) for place in range(len(text))) + language(text, None)
        expected[text] = score
    found = ctc.beams(log_probabilities, 10**6, language if asked else None, least=-math.inf)
    assert {beam.characters for beam in found} == expected.keys()
    for beam in found:
        assert beam.score == pytest.approx(expected[beam.characters], abs=1e-9)
    assert [beam.score for beam in found] == sorted((beam.score for beam in found), reverse=True)
    assert len(ctc.beams(log_probabilities, 2, language if asked else None)) <= 2


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 6), st.lists(st.integers(1, 3), max_size=4))
def test_alignment_against_every_way(seed: int, places: int, text: list[int]) -> None:
    log_probabilities = drawn(seed, places, 4)
    ways = every(log_probabilities).get(tuple(text))
    found = ctc.align(log_probabilities, text)
    if ways is None:
        assert found is None
        return
    assert found is not None
    spans, score = found
    best = max(ways, key=ways.__getitem__)
    assert score == pytest.approx(ways[best])
    expected = []
    at = 0
    for character, run in itertools.groupby(best):
        length = len(list(run))
        if character:
            expected.append((at, at + length - 1))
        at += length
    assert [tuple(span) for span in spans] == expected


def test_a_narrow_beam_beats_the_best_path() -> None:
    """The text whose single best way is likeliest is not the likeliest text (Graves et al. 2006, figure 2)."""
    log_probabilities = torch.tensor([[0.6, 0.4], [0.6, 0.4]], dtype=torch.float64).log()
    (first, *_) = ctc.beams(log_probabilities, 2)
    assert first.characters == (1,)
    assert first.score == pytest.approx(math.log(0.64))
