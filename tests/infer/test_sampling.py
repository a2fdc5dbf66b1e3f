"""Draws against the exact probabilities, the filters against a naive reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.infer.decoding import sampling
from steelyard.infer.request import Sampling
from steelyard.kernels.draw import Draw, candidates, draw_tokens, uniform
from steelyard.kernels.library import load


def row(choice: int = 0, position: int = 0, counts: dict[int, int] | None = None, **fields: object) -> sampling.Row:
    return sampling.Row(Sampling(**fields), 7, choice, position, counts or {})  # type: ignore[arg-type]


def test_draws_have_the_right_frequencies() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    count = 20_000
    rows = [row(position=position, temperature=0.8) for position in range(count)]
    drawn = [one.token for one in sampling.draw(logits.expand(count, -1), rows) if one is not None]
    expected = (logits.double() / 0.8).softmax(-1) * count
    found = torch.tensor(drawn).bincount(minlength=5)
    chi_square = float(((found - expected) ** 2 / expected).sum())
    assert chi_square < 18.5  # 0.1% of samples exceed it with 4 degrees of freedom; the draws are fixed by the seed


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=20),
    top_k=st.integers(0, 21),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 1),
)
def test_filters_keep_the_tokens_that_they_should(values: list[float], top_k: int, top_p: float, min_p: float) -> None:
    tokens, weights = candidates(torch.tensor(values), Draw(0, 0, 0, 1.0, top_p, min_p, top_k))
    ids = tokens.tolist()
    kept = {token for token, weight in zip(ids, weights.tolist(), strict=True) if weight > 0}
    exact = torch.tensor(values).double().softmax(-1)
    order = exact.argsort(descending=True, stable=True).tolist()[: top_k or None]
    # At least as likely as every one that is left out, the likeliest always there, and never empty.
    assert kept
    assert max(exact[ids].tolist()) == max(float(exact[token]) for token in kept)
    left = set(range(len(values))) - kept
    assert all(float(exact[a]) >= float(exact[b]) - 1e-12 for a in kept for b in left)
    total = sum(float(exact[token]) for token in order)
    needed = next(
        n for n in range(1, len(order) + 1) if sum(float(exact[t]) for t in order[:n]) >= top_p * total - 1e-9
    )
    strong = [token for token in order[:needed] if float(exact[token]) >= min_p * float(exact[order[0]]) * (1 - 1e-9)]
    assert abs(len(kept) - len(strong)) <= 1  # one that stands on the border can fall to either side


def test_penalties_and_biases_follow_the_formula() -> None:
    found = torch.zeros(6)
    sampling.adjust(
        found, row(counts={2: 3, 4: 1}, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={1: 2.0, 2: -1.0})
    )
    assert found.tolist() == [0.0, 2.0, -1.0 - 0.5 - 0.75, 0.0, -0.75, 0.0]


def test_numbers_depend_on_their_arguments_alone() -> None:
    bits = np.random.Philox(key=np.array([7, 1], np.uint64), counter=np.array([5, 0, 0, 0], np.uint64)).random_raw()
    assert uniform(7, 1, 5) == (int(bits) >> 11) / 2**53
    many = {uniform(seed, choice, place) for seed in range(5) for choice in range(5) for place in range(40)}
    assert len(many) == 1000
    assert 0 <= min(many) < 0.01
    assert 0.99 < max(many) < 1


def test_greedy_takes_the_likeliest_and_logprobs_are_the_models() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(3))
    logits[2, 0] = float("nan")
    drawn = sampling.draw(logits, [row(temperature=0.0, logprobs=2) for _ in range(3)])
    assert drawn[2] is None
    for index, one in enumerate(drawn[:2]):
        assert one is not None
        assert one.token == int(logits[index].argmax())
        assert one.logprob == float(logits[index].log_softmax(-1)[one.token])
        assert [token for token, _ in one.top] == logits[index].topk(2).indices.tolist()


@pytest.mark.parametrize("vocabulary", [2, 16, 97, 300, 5000])
def test_native_draws_what_the_twin_draws(vocabulary: int) -> None:
    library = load()
    if library is None:
        pytest.skip("the native kernels were not built: no C++ compiler")
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(400, vocabulary, generator=generator) * torch.logspace(-1, 1.5, 400)[:, None]
    logits[::7] = (logits[::7] * 2).round()  # with ties
    draws = []
    for place in range(400):
        top_k, top_p, min_p = (0, 1, 5, 70, 6000)[place % 5], (1.0, 0.9, 0.3)[place % 3], (0.0, 0.05)[place % 2]
        temperature = (0.0, 0.7, 1.0, 2.5, 1e-30)[place % 11 % 5]
        draws.append(Draw(place * 0x9E3779B97F4A7C15 % 2**64, place % 4, place * 31, temperature, top_p, min_p, top_k))
    assert draw_tokens(logits, draws, library) == draw_tokens(logits, draws, None)
    logits[3, 1], logits[5, 0], logits[8, -1] = float("nan"), float("inf"), float("-inf")
    found = draw_tokens(logits, draws, library)
    assert [place for place, token in enumerate(found) if token < 0] == [3, 5, 8]
    assert found == draw_tokens(logits, draws, None)
