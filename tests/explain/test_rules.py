"""Relevance by gradients against relevance that is passed back by its rules, layer after layer, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from steelyard.explain.rules import Rules

N, D = 5, 6


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def numbers(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def relevance(x: torch.Tensor, function: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Input times gradient under the rules, with all of the outputs' numbers as their relevance; and the outputs."""
    leaf = x.clone().requires_grad_()
    with Rules():
        y = function(leaf)  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return x * gradient, y.detach()


def through_linear(x: torch.Tensor, weight: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
    """R_i = sum_j x_i w_ji / z_j R_j, by loops."""
    z = x @ weight.T
    found = torch.zeros_like(x)
    for row in range(x.shape[0]):
        for j in range(weight.shape[0]):
            for i in range(weight.shape[1]):
                found[row, i] += x[row, i] * weight[j, i] / z[row, j] * above[row, j]
    return found


@pytest.mark.parametrize("activation", [F.silu, F.gelu, torch.tanh, F.relu])
def test_activations_hand_on_what_they_get(draw: torch.Generator, activation: object) -> None:
    x, first, second = (numbers(*shape, generator=draw) for shape in ((N, D), (8, D), (3, 8)))
    found, y = relevance(x, lambda x: F.linear(activation(F.linear(x, first)), second))  # type: ignore[operator]
    inner = activation(x @ first.T)  # type: ignore[operator]
    expected = through_linear(x, first, through_linear(inner, second, y))
    assert torch.allclose(found, expected, atol=1e-9)
    assert torch.allclose(found.sum(1), y.sum(1))


def test_a_product_of_activations_is_shared(draw: torch.Generator) -> None:
    x, gate, up = (numbers(*shape, generator=draw) for shape in ((N, D), (8, D), (8, D)))
    found, y = relevance(x, lambda x: F.silu(F.linear(x, gate)) * F.linear(x, up))
    expected = through_linear(x, gate, y / 2) + through_linear(x, up, y / 2)
    assert torch.allclose(found, expected, atol=1e-9)


def test_norms_hand_on_what_they_get(draw: torch.Generator) -> None:
    x, weight = numbers(N, D, generator=draw), numbers(D, generator=draw)
    found, y = relevance(x, lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight)
    assert torch.allclose(found, y, atol=1e-9)
    found, y = relevance(x, lambda x: F.layer_norm(x, (D,), weight))
    scale = torch.rsqrt(x.var(-1, keepdim=True, correction=0) + 1e-5)
    centring = (torch.eye(D) - 1 / D).double()
    expected = torch.stack([x[row] * ((weight * scale[row]) @ centring) for row in range(N)])
    assert torch.allclose(found, expected, atol=1e-9)
    found, y = relevance(x.view(1, N * D, 1), lambda x: F.group_norm(x, 5))
    assert torch.allclose(found.sum(), y.sum(), atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_shares_between_values_and_weights(draw: torch.Generator, causal: bool) -> None:
    q, k, v = (numbers(1, 1, N, D, generator=draw) for _ in range(3))
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    with Rules():
        y = F.scaled_dot_product_attention(*leaves, is_causal=causal)
    gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
    found = [tensor * gradient for tensor, gradient in zip((q, k, v), gradients, strict=True)]
    scores = (q @ k.transpose(-1, -2) / math.sqrt(D))[0, 0]
    if causal:
        scores = scores.masked_fill(~torch.ones(N, N).tril().bool(), -math.inf)
    shares, above = scores.softmax(-1), y.detach()[0, 0]
    # the values' half, and that of the weights, place by place
    values, weights = torch.zeros(N, D).double(), torch.zeros(N, N).double()
    for at in range(N):
        for to in range(N):
            for place in range(D):
                part = shares[at, to] * v[0, 0, to, place] / above[at, place] * above[at, place] / 2
                values[to, place] += part
                weights[at, to] += part
    # a softmax: x (R - s sum R); where nothing is seen there is nothing
    seen = scores.masked_fill(scores == -math.inf, 0.0)
    by_score = seen * (weights - shares * weights.sum(-1, keepdim=True))
    queries, keys = torch.zeros(N, D).double(), torch.zeros(N, D).double()
    for at in range(N):
        for to in range(N):
            if scores[at, to] == -math.inf:
                continue
            for place in range(D):
                part = q[0, 0, at, place] * k[0, 0, to, place] / math.sqrt(D) / seen[at, to] * by_score[at, to] / 2
                queries[at, place] += part
                keys[to, place] += part
    for own, expected in zip(found, (queries, keys, values), strict=True):
        assert torch.allclose(own[0, 0], expected, atol=1e-9)


def test_gates_of_an_lstm_take_nothing_but_the_last(draw: torch.Generator) -> None:
    """Relevance through time by loops (Arras et al. 2017, half to the output gate), and outputs that are torch's."""
    size, length = 4, 3
    lstm = torch.nn.LSTM(D, size, batch_first=True).double().requires_grad_(False)
    x = numbers(1, length, D, generator=draw)
    plain, _ = lstm(x)
    leaf = x.clone().requires_grad_()
    with Rules():
        y, (h, _) = lstm(leaf)
    assert torch.allclose(y, plain)
    assert torch.allclose(h[0], plain[:, -1])
    (gradient,) = torch.autograd.grad(h.sum(), leaf)
    w_x, w_h, b_x, b_h = lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0, lstm.bias_hh_l0
    hidden, cells, gates = [torch.zeros(size).double()], [torch.zeros(size).double()], []
    for place in range(length):
        i, f, g, o = (w_x @ x[0, place] + b_x + w_h @ hidden[-1] + b_h).chunk(4)
        gates.append((i.sigmoid(), f.sigmoid(), g, o.sigmoid()))
        cells.append(gates[-1][1] * cells[-1] + gates[-1][0] * g.tanh())
        hidden.append(gates[-1][3] * cells[-1].tanh())
    expected = torch.zeros(length, D).double()
    above_h, above_c = hidden[-1].clone(), torch.zeros(size).double()
    for place in reversed(range(length)):
        i, f, g, o = gates[place]
        whole, out = above_h / 2 + above_c, above_h / 2 * (1 - o)  # z sigma'(z) / sigma(z) = z (1 - sigma(z))
        candidate = whole * i * g.tanh() / cells[place + 1]
        above_c = whole * f * cells[place] / cells[place + 1]
        rows = slice(2 * size, 3 * size)
        last = slice(3 * size, 4 * size)
        expected[place] = x[0, place] * (candidate / g @ w_x[rows] + out @ w_x[last])
        above_h = hidden[place] * (candidate / g @ w_h[rows] + out @ w_h[last])
    assert torch.allclose((x * gradient)[0], expected, atol=1e-9)


def test_a_quotient_near_zero_is_finite() -> None:
    for activation in (F.silu, F.gelu, torch.tanh):
        found, _ = relevance(torch.tensor([[0.0, 1e-12, -1e-30]]), activation)
        assert bool(found.isfinite().all())


def test_an_lstm_of_both_directions_is_refused() -> None:
    lstm = torch.nn.LSTM(3, 2, batch_first=True, bidirectional=True)
    with Rules(), pytest.raises(NotImplementedError, match="one direction"):
        lstm(torch.zeros(1, 2, 3))
