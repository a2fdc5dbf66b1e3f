"""Layer-wise relevance propagation as a backward pass with other rules: attention-aware, for every network.

Relevance is input times gradient, where the gradient passes (Achtibat et al. 2024, AttnLRP)

    a product with weights          as it is (the epsilon rule)
    x f(x) / x of an activation f   the quotient as a number (the identity rule)
    a norm                          its scale as a number (the identity rule)
    a product of two activations    half to each factor (the uniform rule); so do the two of attention
    a softmax                       as it is: x (R - s sum R) of its Taylor expansion
    an LSTM's output gate           half to what it lets out, half to what opened it, by its gradient
    its entry and forget gates      as numbers: what they let through has all (Arras et al. 2017)

A share taken where a memory goes on would be taken again at every place, and the beginning of a text forgotten. Of the
ways to share at the gates this one orders words best, by deletion and by insertion (`benchmarks/LOG.md`).

The forward pass stays the network's own: `Rules` is a mode that stands for torch's functions while it runs, so every
network that is made of them is explained without knowing it. float32 alone: fused kernels do not ask torch.
"""

# B rows  H heads  Q queries  K keys  E head width  T places of a sequence  D width

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

Function = Callable[..., Any]
SMALL = 1e-6
"""Where a quotient by x is taken as the one near it."""


class Rules(TorchFunctionMode):
    """While it runs, gradients are those of relevance; weights must not want any."""

    def __torch_function__(
        self, func: Function, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take the rule's place of a function that has one."""
        rule = RULES.get(func)
        given = kwargs or {}
        return func(*args, **given) if rule is None else rule(func, *args, **given)


def _wanted(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad


def half(x: torch.Tensor) -> torch.Tensor:
    """The same number, with half of its gradient."""
    part = 0.5 * x
    return part + part.detach()


def _identity(f: Function, x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
    """An activation that is 0 at 0."""
    if not _wanted(x):
        result: torch.Tensor = f(x, *arguments, **named)
        return result
    with torch.no_grad():
        near = torch.where(x.abs() < SMALL, torch.full_like(x, SMALL), x)
        quotient: torch.Tensor = f(near, *arguments, **named) / near
    return x * quotient


def _constant(f: Function, *arguments: Any, **named: Any) -> torch.Tensor:
    result: torch.Tensor = f(*arguments, **named)
    return result.detach()


def _product(f: Function, a: Any, b: Any, **named: Any) -> Any:
    if _wanted(a) and _wanted(b):
        a, b = half(a), half(b)
    return f(a, b, **named)


def _quotient(f: Function, a: Any, b: Any, **named: Any) -> Any:
    return f(a, b.detach() if _wanted(b) else b, **named)


def _layer_norm(
    f: Function,
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    over = tuple(range(-len(shape), 0))
    return _scaled(_normed(x, over, eps), weight, bias)


def _group_norm(
    f: Function,
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    grouped = x.reshape(x.shape[0], groups, -1)
    normed = _normed(grouped, (-1,), eps).reshape(x.shape)
    wide = (1, -1) + (1,) * (x.dim() - 2)
    return _scaled(normed, *(None if each is None else each.reshape(wide) for each in (weight, bias)))


def _normed(x: torch.Tensor, over: tuple[int, ...], epsilon: float) -> torch.Tensor:
    centred = x - x.mean(over, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(over, keepdim=True) + epsilon)
    return centred * scale.detach()


def _scaled(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _normalize(f: Function, x: torch.Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> torch.Tensor:
    length: torch.Tensor = x.norm(p, dim, keepdim=True).clamp_min(eps).detach()
    return x / length


def _attention(
    f: Function,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **named: Any,
) -> torch.Tensor:
    """softmax(q k / sqrt(E)) v over `[B, H, Q | K, E]`."""
    scores = half(query) @ half(key).transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return half(scores.softmax(-1)) @ half(value)


def _lstm(
    f: Function,
    x: torch.Tensor,
    states: Sequence[torch.Tensor],
    parameters: Sequence[torch.Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One direction, rows first: `[B, T, D]`; gates in torch's order, input, forget, candidate, output."""
    if bidirectional or not batch_first:
        raise NotImplementedError("LSTMs of one direction, with rows first, have a rule")
    each = 4 if has_biases else 2
    last_h, last_c = [], []
    for layer in range(layers):
        w_x, w_h, *biases = parameters[layer * each : (layer + 1) * each]
        h, c = states[0][layer], states[1][layer]
        inputs = F.linear(x, w_x, biases[0] if biases else None)
        outputs = []
        for place in range(x.shape[1]):
            gates = inputs[:, place] + F.linear(h, w_h, biases[1] if biases else None)
            entry, forget, candidate, out = gates.chunk(4, -1)
            new = entry.sigmoid().detach() * _identity(torch.tanh, candidate)
            c = forget.sigmoid().detach() * c + new
            h = half(out.sigmoid()) * half(_identity(torch.tanh, c))
            outputs.append(h)
        x = torch.stack(outputs, 1)
        last_h.append(h)
        last_c.append(c)
    return x, torch.stack(last_h), torch.stack(last_c)


RULES: dict[Function, Function] = {
    **dict.fromkeys((F.silu, F.gelu, torch.tanh, torch.Tensor.tanh), _identity),
    **dict.fromkeys((torch.sigmoid, torch.Tensor.sigmoid, torch.rsqrt, torch.Tensor.rsqrt), _constant),
    **dict.fromkeys((torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__), _product),
    **dict.fromkeys(
        (torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm), _product
    ),
    **dict.fromkeys((torch.div, torch.Tensor.div, torch.Tensor.__truediv__), _quotient),
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.normalize: _normalize,
    F.scaled_dot_product_attention: _attention,
    torch.lstm: _lstm,
}
"""What stands for which function."""
