"""Pruning: what goes, how much, and that what is left makes good what it can; against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steelyard.compress.prune import decoders, magnitude, masks, sparse_gpt, wanda
from steelyard.compress.prune.decoders import PruneConfig
from steelyard.compress.prune.masks import Pattern
from steelyard.errors import ConfigError


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(tokens: int, size: int) -> torch.Tensor:
    """Inputs of unlike sizes that say much the same."""
    return (normal(tokens, 5, seed=1) @ normal(5, size, seed=2) + 0.3 * normal(tokens, size, seed=3)) * (
        1 + 4 * torch.rand(size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    )


@given(st.integers(1, 9), st.integers(1, 40), st.floats(0.01, 0.99), st.integers(0, 9))
def test_the_lowest_share_goes(rows: int, columns: int, rate: float, seed: int) -> None:
    scores = normal(rows, columns, seed=seed).round(decimals=1)  # some are equal
    for going, scored in (
        (masks.lowest(scores, rate), scores),
        (masks.lowest_of_layer(scores, rate).flatten()[None], scores.flatten()[None]),
    ):
        assert (going.sum(-1) == round(rate * scored.shape[-1])).all()
        for gone, row in zip(going, scored, strict=True):
            if gone.any() and not gone.all():
                assert row[gone].max() <= row[~gone].min()


def test_of_a_whole_model() -> None:
    scores = {"large": 10 + normal(8, 4).abs(), "small": normal(4, 8).abs()}
    going = masks.lowest_of_all(scores, 0.5)
    assert not going["large"].any()
    assert going["small"].all()


@pytest.mark.parametrize("text", ["2:4", "1:2", "4:8"])
def test_of_every_few(text: str) -> None:
    few = masks.pattern(text)
    scores = normal(6, 16).abs()
    going = masks.lowest_of_few(scores, few).view(6, -1, few.of)
    assert (going.sum(-1) == few.of - few.kept).all()
    kept = scores.view(6, -1, few.of)
    assert (kept.masked_fill(going, torch.inf).amin(-1) >= kept.masked_fill(~going, -1).amax(-1)).all()


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "2-4", "a:b", ""])
def test_what_is_no_pattern(text: str) -> None:
    with pytest.raises(ConfigError, match="2:4"):
        masks.pattern(text)
    with pytest.raises(ConfigError, match="no multiple"):
        masks.lowest_of_few(torch.zeros(2, 6), Pattern(2, 4))


def test_a_column_that_goes_is_made_good_by_those_behind_it() -> None:
    """The columns before it stay as they are: it is least squares over the others."""
    x, weight = normal(200, 12, seed=5) @ normal(12, 12, seed=6), normal(3, 12)
    weight[:, 4] = 1e-3  # goes first, whatever the others are
    found = sparse_gpt.prune(weight, x.T @ x, 1 / 12, damping=0.0)
    assert torch.equal(found == 0, torch.arange(12).expand(3, 12) == 4)
    wanted = x @ weight.T - x[:, :4] @ weight[:, :4].T
    expected = torch.linalg.lstsq(x[:, 5:], wanted).solution.T
    torch.testing.assert_close(found[:, 5:], expected)
    assert torch.equal(found[:, :4], weight[:, :4])
    assert not torch.equal(found[:, 5:], weight[:, 5:])


@pytest.mark.parametrize("few", [None, Pattern(2, 4)])
def test_by_what_they_read_less_is_lost(few: Pattern | None) -> None:
    x, weight = correlated(400, 64), normal(32, 64)
    gram = x.T @ x

    def going(scores: torch.Tensor) -> torch.Tensor:
        return masks.lowest(scores, 0.5) if few is None else masks.lowest_of_few(scores, few)

    pruned = {
        "magnitude": weight.masked_fill(going(magnitude.scores(weight)), 0),
        "wanda": weight.masked_fill(going(wanda.scores(weight, gram.diagonal())), 0),
        "sparsegpt": sparse_gpt.prune(weight, gram, 0.5, few, block=16),
    }
    lost = {name: float((x @ (weight - found).T).square().sum()) for name, found in pruned.items()}
    assert lost["sparsegpt"] < lost["wanda"] < lost["magnitude"]
    for found in pruned.values():
        assert float((found == 0).double().mean()) == pytest.approx(0.5, abs=0.01)
        if few is not None:
            assert ((found.view(32, -1, 4) == 0).sum(-1) == 2).all()


def test_inputs_that_are_always_zero() -> None:
    x = correlated(50, 16)
    x[:, 3] = 0
    found = sparse_gpt.prune(normal(4, 16), x.T @ x, 0.25)
    assert found.isfinite().all()
    assert not found[:, 3].any()


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"rate": 0.0}, "above 0"),
        ({"rate": 0.3, "pattern": "2:4"}, "exclude each other"),
        ({"rate": 1.0}, "below 1"),
        ({"scope": "model"}, "magnitude's alone"),
        ({"method": "magnitude", "scope": "model", "pattern": "2:4"}, "no pattern"),
        ({"pattern": "x"}, "2:4"),
    ],
)
def test_settings_that_do_not_go_together(fields: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        decoders.check(PruneConfig(**fields))  # type: ignore[arg-type]
