"""Dropout: what it hides, how much, and that a seed decides it."""

from __future__ import annotations

import pytest
import torch

from steelyard.errors import CheckpointError
from steelyard.models.dropout import Dropout, dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
def test_share_and_size(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x = torch.ones(401, 997, dtype=dtype, requires_grad=True)
    y = dropout(x, p)
    share = float((y == 0).float().mean())
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5 + 1 / 65536)
    kept = y.detach()[y != 0]
    assert float(kept.min()) == float(kept.max()) == pytest.approx(1 / (1 - p), rel=0.004)
    y.sum().backward()
    assert torch.equal(x.grad, y), "the gradient is hidden likewise"
    lanes = (y.detach().flatten()[: y.numel() // 4 * 4].view(-1, 4) == 0).double()
    assert torch.allclose(lanes.mean(0), torch.full((4,), p, dtype=torch.float64), atol=0.005), (
        "none of the four is special"
    )
    assert float(torch.corrcoef(lanes.T).triu(1).abs().max()) < 0.02


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 0), (5, 7)])
def test_shapes(shape: tuple[int, ...]) -> None:
    assert dropout(torch.ones(shape), 0.5).shape == shape


@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_what_is_no_probability(p: float) -> None:
    with pytest.raises(CheckpointError, match="no probability"):
        Dropout(p)


def test_a_seed_decides() -> None:
    x = torch.randn(33)
    torch.manual_seed(1)
    first = dropout(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.5), first)
    assert not torch.equal(dropout(x, 0.5), first)


def test_nothing_is_hidden_unless_it_is_trained() -> None:
    x = torch.randn(5)
    layer = Dropout(0.5)
    assert layer.eval()(x) is x
    assert Dropout(0)(x) is x
    assert not Dropout(1.0)(x).any()
