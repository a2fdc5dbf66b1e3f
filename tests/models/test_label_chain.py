"""Chains of labels against all sequences, one after the other."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.models import chain
from steelyard.models.chain import Scores
from steelyard.models.hmm import HiddenMarkov


def drawn(seed: int, rows: int, longest: int, classes: int) -> tuple[Scores, torch.Tensor, torch.Tensor]:
    """A chain, emissions and lengths; some steps are never made."""
    draw = torch.Generator().manual_seed(seed)
    start, end = (torch.randn(classes, generator=draw, dtype=torch.float64) for _ in range(2))
    step = torch.randn(classes, classes, generator=draw, dtype=torch.float64)
    never = torch.rand(classes, classes, generator=draw) < 0.2
    never.fill_diagonal_(False)
    emissions = torch.randn(rows, longest, classes, generator=draw, dtype=torch.float64)
    lengths = torch.randint(1, longest + 1, (rows,), generator=draw)
    return Scores(start, step.masked_fill(never, -torch.inf), end), emissions, lengths


def every(scores: Scores, emissions: torch.Tensor) -> dict[tuple[int, ...], float]:
    """The score of every sequence of one row."""
    found = {}
    for labels in itertools.product(range(emissions.shape[1]), repeat=len(emissions)):
        score = float(scores.start[labels[0]] + scores.end[labels[-1]])
        score += sum(float(emissions[place, label]) for place, label in enumerate(labels))
        score += sum(float(scores.step[pair]) for pair in itertools.pairwise(labels))
        found[labels] = score
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 5))
def test_against_enumeration(seed: int, rows: int, longest: int, classes: int, k: int) -> None:
    scores, emissions, lengths = drawn(seed, rows, longest, classes)
    partition = chain.log_partition(scores, emissions, lengths)
    marginals = chain.log_marginals(scores, emissions, lengths)
    paths = chain.best(scores, emissions, lengths, k)
    for row, length in enumerate(lengths.tolist()):
        known = every(scores, emissions[row, :length])
        values = torch.tensor(list(known.values()), dtype=torch.float64)
        assert float(partition[row]) == pytest.approx(float(values.logsumexp(0)))
        weights = dict(zip(known, values.softmax(0).tolist(), strict=True))
        for place, label in itertools.product(range(length), range(classes)):
            expected = sum(weight for labels, weight in weights.items() if labels[place] == label)
            assert float(marginals[row, place, label].exp()) == pytest.approx(expected, abs=1e-9)
        possible = sorted((value for value in known.values() if value > -torch.inf), reverse=True)[:k]
        assert [path.score for path in paths[row]] == pytest.approx(possible)
        assert all(known[tuple(path.labels)] == pytest.approx(path.score) for path in paths[row])
        assert len({tuple(path.labels) for path in paths[row]}) == len(paths[row])
        likely = chain.log_likelihood(
            scores, emissions[row : row + 1], lengths[row : row + 1], _labels(paths[row][0].labels, longest)
        )
        assert float(likely[0]) == pytest.approx(possible[0] - float(values.logsumexp(0)), abs=1e-9)


def _labels(labels: list[int], longest: int) -> torch.Tensor:
    return torch.tensor([labels + [0] * (longest - len(labels))])


def test_the_gradient_is_the_marginals() -> None:
    """d log Z / d emission = p(label), which is what learning needs."""
    scores, emissions, lengths = drawn(3, 3, 6, 4)
    emissions.requires_grad_()
    chain.log_partition(scores, emissions, lengths).sum().backward()  # type: ignore[no-untyped-call]
    there = (torch.arange(6) < lengths[:, None])[..., None]
    expected = chain.log_marginals(scores, emissions.detach(), lengths).exp().where(there, 0)
    assert emissions.grad is not None
    torch.testing.assert_close(emissions.grad, expected)


def test_what_lies_behind_a_row_is_nothing_to_it() -> None:
    scores, emissions, lengths = drawn(5, 4, 7, 3)
    other = emissions.clone()
    for row, length in enumerate(lengths.tolist()):
        other[row, length:] = 1e3
    assert chain.best(scores, emissions, lengths, 3) == chain.best(scores, other, lengths, 3)
    torch.testing.assert_close(
        chain.log_partition(scores, emissions, lengths), chain.log_partition(scores, other, lengths)
    )


def test_what_begins_before_it_goes_on() -> None:
    """Of begin-inside-outside labels, only what can be said."""
    labels = ["O", "B-place", "I-place", "B-name", "I-name"]
    free = Scores(torch.zeros(5), torch.zeros(5, 5), torch.zeros(5))
    scores = chain.constrained(free, labels)
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        emissions = torch.randn(1, 9, 5, generator=draw)
        (path, *_) = chain.best(scores, emissions, torch.tensor([9]))[0]
        said = [labels[label] for label in path.labels]
        for before, after in zip(["O", *said], said, strict=False):
            assert not after.startswith("I-") or before in (f"B-{after[2:]}", after)
    assert torch.isfinite(chain.log_marginals(scores, emissions, torch.tensor([9])).exp()).all()
    assert chain.obeys([["O", "B-place", "I-place"], ["B-name"]])
    assert not chain.obeys([["O", "I-place"]])  # as some write what begins
    assert not chain.obeys([["B-place", "I-name"]])
    assert not chain.obeys([["nn", "vb"], ["I-x"]])
    assert not chain.obeys([["O", "B-place"]])  # nothing ever goes on


def test_a_hidden_markov_model_reads_tags() -> None:
    """What follows what decides where a word says nothing."""
    sentences = [(["the", "run", "ends"], ["at", "nn", "vb"]), (["they", "run"], ["pp", "vb"])] * 5
    sentences += [(["the", "walk", "ends"], ["at", "nn", "vb"])]
    model = HiddenMarkov(sentences)
    assert float(model.scores.start.exp().sum()) == pytest.approx(1, abs=1e-5)
    together = model.scores.step.exp().sum(1) + model.scores.end.exp()
    torch.testing.assert_close(together, torch.ones(4), rtol=1e-4, atol=1e-4)
    for words, wanted in (
        (["the", "run"], ["at", "nn"]),
        (["they", "run"], ["pp", "vb"]),
        (["the", "talk"], ["at", "nn"]),
    ):
        emissions = model.emissions(words)[None]
        path = chain.best(model.scores, emissions, torch.tensor([len(words)]))[0][0]
        assert [model.tags[label] for label in path.labels] == wanted
