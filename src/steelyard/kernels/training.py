"""What a network does between two products, forward and backward, fused; and beside each its twin in PyTorch.

bfloat16 in and out, float32 inside. What the native form does not take (another dtype, a width that is no multiple of
16, no compiler) runs as the twin, under autograd.
"""

# T tokens  D model width  F feed-forward width  H heads  E head width  N rows of logits  V vocabulary

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from steelyard.kernels import library
from steelyard.kernels.recompute import remake

LANES = 16
"""What widths, and lengths of rows, are to be multiples of."""
BLOCK = 128
"""Queries that causal attention takes together."""
SCORES = 1 << 22
"""Of attention in both directions, that are made together: what stays in the cache until it was used."""
PARTS = 16
"""Into which rows are cut where they are summed up, whatever the number of threads."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float = 0.0) -> torch.Tensor:
    """RMS normalisation, x / rms(x) * (offset + weight), over the last dimension (Zhang and Sennrich 2019).

    Without an offset the quotient is rounded before the product, as Llama does; with one only the product is, as
    Gemma does.
    """
    if _is_native(x, x.shape[-1]) and weight.dtype == x.dtype:
        normed: torch.Tensor = _RmsNorm.apply(x.contiguous(), weight, epsilon, offset)  # type: ignore[no-untyped-call]
        return remake(normed, partial(rms_norm, x.detach(), weight.detach(), epsilon, offset))
    return rms_norm_twin(x, weight, epsilon, offset)


def rms_norm_twin(x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float = 0.0) -> torch.Tensor:
    """See `rms_norm`."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * (offset + weight.float())).to(x.dtype) if offset else weight * wide.to(x.dtype)


def group_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, epsilon: float, *, relu: bool = False
) -> torch.Tensor:
    """Each of some groups of channels brought to mean 0 and deviation 1, then scaled and shifted (Wu and He 2018).

    Args:
        x: `[B, C, ...]`, of any size.
        weight: `[C]`.
        bias: `[C]`.
        groups: how many; a divisor of C.
        epsilon: added to the variance.
        relu: whether what is below zero becomes zero.
    """
    fits = x.numel() > 0 and weight.shape == bias.shape == x.shape[1:2] and x.shape[1] % groups == 0
    if _is_native(x, LANES) and fits and weight.dtype == bias.dtype == x.dtype:
        arguments = (x.contiguous(), weight.contiguous(), bias.contiguous(), groups, epsilon, relu)
        normed: torch.Tensor = _GroupNorm.apply(*arguments)  # type: ignore[no-untyped-call]
        return normed
    return group_norm_twin(x, weight, bias, groups, epsilon, relu=relu)


def group_norm_twin(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, epsilon: float, *, relu: bool = False
) -> torch.Tensor:
    """See `group_norm`."""
    normed = F.group_norm(x, groups, weight, bias, epsilon)
    return F.relu(normed) if relu else normed


def silu_mul(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """silu(gate) * value, elementwise."""
    if _is_native(gate, gate.numel()):
        product: torch.Tensor = _GatedMul.apply(gate.contiguous(), value.contiguous(), "silu")  # type: ignore[no-untyped-call]
        return remake(product, partial(silu_mul, gate.detach(), value.detach()))
    return silu_mul_twin(gate, value)


def silu_mul_twin(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """See `silu_mul`."""
    return F.silu(gate) * value


def gelu_mul(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * value, elementwise, gelu by its approximation with tanh (Hendrycks and Gimpel 2016)."""
    if _is_native(gate, gate.numel()):
        product: torch.Tensor = _GatedMul.apply(gate.contiguous(), value.contiguous(), "gelu")  # type: ignore[no-untyped-call]
        return remake(product, partial(gelu_mul, gate.detach(), value.detach()))
    return gelu_mul_twin(gate, value)


def gelu_mul_twin(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """See `gelu_mul`."""
    return F.gelu(gate, approximate="tanh") * value


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Each pair `(x[i], x[i + E / 2])` of `[T, H, E]` turned by its row's angle.

    Args:
        x: of any dtype.
        cos: `[T, 1, E / 2]` float32.
        sin: likewise.
    """
    if _is_native(x, x.shape[-1] // 2):
        turned: torch.Tensor = _Rotate.apply(x.contiguous(), cos.contiguous(), sin.contiguous(), 1.0)  # type: ignore[no-untyped-call]
        return turned
    return rotate_twin(x, cos, sin)


def rotate_twin(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See `rotate`."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[target] of each row, `[N]` float32; `logits` `[N, V]` become its gradient, softmax - onehot.

    No autograd passes through it: the caller takes the gradient on.
    """
    if _is_native(logits, LANES) and logits.is_contiguous():
        losses = torch.empty(len(logits), dtype=torch.float32)
        _library().cross_entropy(logits, targets, losses)
        return losses
    return cross_entropy_twin_(logits, targets)


def cross_entropy_twin_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """See `cross_entropy_`."""
    shares = logits.float().log_softmax(-1)
    rows = torch.arange(len(targets))
    losses = -shares[rows, targets]
    shares.exp_()
    shares[rows, targets] -= 1
    logits.copy_(shares)
    return losses


def accumulate_(total: torch.Tensor, x: torch.Tensor) -> None:
    """Add `x` to `total`, which is float32; both contiguous."""
    if _is_native(x, LANES) and x.is_contiguous() and total.is_contiguous():
        _library().accumulate(total, x)
    else:
        total += x


def causal_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Each query over the keys up to its own place, softmax(q k / sqrt(E)) v.

    Made in blocks of queries, between products of whole groups of heads; the backward pass makes the probabilities
    again from their log-sums (Dao et al. 2022). Without gradients it is torch's own.

    Args:
        queries: `[B, H, L, E]`.
        keys: `[B, K, L, E]`, each for H / K heads of queries.
        values: likewise.
    """
    if _is_native(queries, queries.shape[2]) and queries.numel() and torch.is_grad_enabled():
        mixed: torch.Tensor = _CausalAttention.apply(queries, keys, values)  # type: ignore[no-untyped-call]
        return mixed
    return causal_attention_twin(queries, keys, values)


def causal_attention_twin(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """See `causal_attention`."""
    groups = queries.shape[1] // keys.shape[1]
    if groups > 1:
        keys, values = (tensor.repeat_interleave(groups, dim=1) for tensor in (keys, values))
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        rows, kv_heads, length, size = keys.shape
        groups = queries.shape[1] // kv_heads
        grouped = (rows * kv_heads, groups, length, size)
        q = queries.reshape(grouped)
        k, v = (tensor.reshape(len(q), length, size) for tensor in (keys, values))
        # Laid out as the next product reads it, so that both keep the same memory for the backward pass.
        mixed = torch.empty(rows, length, kv_heads, groups, size, dtype=q.dtype)
        apart, lse = mixed.permute(0, 2, 3, 1, 4), torch.empty(grouped[:3])
        for begin in range(0, length, BLOCK):
            end = min(begin + BLOCK, length)
            scores = torch.bmm(_part(q, begin, end), k[:, :end].transpose(1, 2))
            sums = torch.empty(len(q), groups, end - begin)
            _library().attention_forward(scores, _causal(sums, begin), sums, size**-0.5)
            found = torch.bmm(scores, v[:, :end])
            apart[:, :, :, begin:end] = found.view(rows, kv_heads, groups, end - begin, size)
            lse[:, :, begin:end] = sums
        ctx.save_for_backward(q, k, v, mixed, lse)
        ctx.shapes = queries.shape, keys.shape
        return mixed.flatten(2, 3).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v, mixed, lse = ctx.saved_tensors
        dout = gradient.reshape(q.shape)
        delta = (
            (mixed.flatten(2, 3).float() * gradient.transpose(1, 2).float()).sum(-1).transpose(1, 2).reshape(lse.shape)
        )
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(k.shape, dtype=torch.float32) for _ in range(2))
        for begin in range(0, q.shape[2], BLOCK):
            end = min(begin + BLOCK, q.shape[2])
            part, dpart = _part(q, begin, end), _part(dout, begin, end)
            scores = torch.bmm(part, k[:, :end].transpose(1, 2))
            dp = torch.bmm(dpart, v[:, :end].transpose(1, 2))
            sums, shift = (tensor[:, :, begin:end].contiguous() for tensor in (lse, delta))
            _library().attention_backward(scores, dp, _causal(sums, begin), sums, shift, q.shape[3] ** -0.5)
            dv[:, :end] += torch.bmm(scores.transpose(1, 2), dpart)
            dk[:, :end] += torch.bmm(dp.transpose(1, 2), part)
            dq[:, :, begin:end] = torch.bmm(dp, k[:, :end]).view(dpart.shape[0], q.shape[1], end - begin, q.shape[3])
        queries, keys = ctx.shapes
        return dq.view(queries), dk.to(k.dtype).view(keys), dv.to(v.dtype).view(keys)


def _part(x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """`[N, G, L, E]` -> `[N, G (end - begin), E]`: some places of every head of a group."""
    return x[:, :, begin:end].reshape(len(x), -1, x.shape[3])


def _causal(sums: torch.Tensor, begin: int) -> torch.Tensor:
    """How many keys each query of a block `[N, G, end - begin]` sees, which begins at a place: flat, int32."""
    return torch.arange(begin + 1, begin + 1 + sums.shape[2], dtype=torch.int32).expand(sums.shape).reshape(-1)


def attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Each query over all keys of its row, in both directions: softmax(q k / sqrt(E)) v, made as `causal_attention` is.

    Args:
        queries: `[B, H, L, E]`.
        keys: likewise.
        values: likewise.
        lengths: `[B]` int64, at least 1: keys from there on are not seen; None: all are.
    """
    if _is_native(queries, LANES) and queries.numel() and queries.shape == keys.shape and torch.is_grad_enabled():
        mixed: torch.Tensor = _Attention.apply(queries, keys, values, lengths)  # type: ignore[no-untyped-call]
        return mixed
    return attention_twin(queries, keys, values, lengths)


def attention_twin(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """See `attention`."""
    seen = None if lengths is None else (torch.arange(keys.shape[2]) < lengths[:, None])[:, None, None, :]
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor | None
    ) -> torch.Tensor:
        rows, heads, length, size = queries.shape
        q, k, v = (_widened(tensor) for tensor in (queries, keys, values))
        if lengths is None:
            lengths = torch.full((rows,), length)
        seen = lengths.clamp(max=length).to(torch.int32).repeat_interleave(heads * q.shape[1]).view(len(q), -1)
        mixed, lse = torch.empty_like(q), torch.empty(q.shape[:2])
        for part in _parts(q):
            scores = torch.bmm(q[part], k[part].transpose(1, 2))
            _library().attention_forward(scores, seen[part], lse[part], size**-0.5)
            torch.bmm(scores, v[part], out=mixed[part])
        ctx.save_for_backward(q, k, v, mixed, lse, seen)
        return mixed[:, :length].view(queries.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        q, k, v, mixed, lse, seen = ctx.saved_tensors
        dout = _widened(gradient)
        delta = (mixed.float() * dout.float()).sum(-1)
        dq, dk, dv = (torch.empty_like(tensor) for tensor in (q, k, v))
        for part in _parts(q):
            scores = torch.bmm(q[part], k[part].transpose(1, 2))
            dp = torch.bmm(dout[part], v[part].transpose(1, 2))
            _library().attention_backward(scores, dp, seen[part], lse[part], delta[part], q.shape[2] ** -0.5)
            torch.bmm(scores.transpose(1, 2), dout[part], out=dv[part])
            torch.bmm(dp.transpose(1, 2), q[part], out=dk[part])
            torch.bmm(dp, k[part], out=dq[part])
        dq, dk, dv = (tensor[:, : gradient.shape[2]].view(gradient.shape) for tensor in (dq, dk, dv))
        return dq, dk, dv, None


def _widened(x: torch.Tensor) -> torch.Tensor:
    """`[B, H, L, E]` -> `[B H, length, E]` with a length that the native form takes, 0 behind the row's."""
    rows, heads, length, size = x.shape
    widened = x.new_empty(rows, heads, -(-length // LANES) * LANES, size)
    widened[:, :, :length] = x
    widened[:, :, length:] = 0
    return widened.flatten(0, 1)


def _parts(q: torch.Tensor) -> list[slice]:
    """Of the heads of all rows, those that are taken together."""
    step = max(1, SCORES // q.shape[1] ** 2)
    return [slice(begin, begin + step) for begin in range(0, len(q), step)]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float) -> torch.Tensor:
        y, inverse = torch.empty_like(x), torch.empty(x.numel() // x.shape[-1], dtype=torch.float32)
        _library().rms_norm(x, weight, epsilon, offset, y, inverse)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        dx = torch.empty_like(x)
        dw = torch.zeros(PARTS, x.shape[-1]) if ctx.needs_input_grad[1] else None
        _library().rms_norm_backward(x, weight, ctx.offset, inverse, gradient.contiguous(), dx, dw)
        return dx, None if dw is None else dw.sum(0).to(weight.dtype), None, None


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        groups: int,
        epsilon: float,
        relu: bool,
    ) -> torch.Tensor:
        y = torch.empty_like(x)
        means, inverses = (torch.empty(len(x), groups) for _ in range(2))
        _library().group_norm(x, weight, bias, epsilon, relu, y, means, inverses)
        ctx.save_for_backward(x, weight, bias, means, inverses)
        ctx.relu = relu
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, means, inverses = ctx.saved_tensors
        dx = torch.empty_like(x)
        dw, db = (torch.empty(x.shape[:2]) for _ in range(2))
        _library().group_norm_backward(x, weight, bias, means, inverses, gradient.contiguous(), ctx.relu, dx, dw, db)
        return dx, dw.sum(0).to(weight.dtype), db.sum(0).to(bias.dtype), None, None, None


class _GatedMul(torch.autograd.Function):
    """activation(gate) * value; the kernels are called by the activation."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, value: torch.Tensor, activation: str) -> torch.Tensor:
        y = torch.empty_like(gate)
        getattr(_library(), f"{activation}_mul")(gate, value, y)
        ctx.save_for_backward(gate, value)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        gate, value = ctx.saved_tensors
        dgate, dvalue = torch.empty_like(gate), torch.empty_like(value)
        getattr(_library(), f"{ctx.activation}_mul_backward")(gate, value, gradient.contiguous(), dgate, dvalue)
        return dgate, dvalue, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: float) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        y = torch.empty_like(x)
        _library().rotate(x, cos, sin, direction, y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        gradient = gradient.contiguous()
        turned = torch.empty_like(gradient)
        _library().rotate(gradient, cos, sin, -1.0, turned)
        return turned, None, None, None


class Calls:
    """The native functions, called with tensors; all are contiguous."""

    def __init__(self, native: ctypes.CDLL) -> None:
        self._native = native

    def rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        epsilon: float,
        offset: float,
        y: torch.Tensor,
        inverse: torch.Tensor,
    ) -> None:
        """See training.cpp, as for the others."""
        rows, width = inverse.numel(), x.shape[-1]
        numbers = ctypes.c_float(epsilon), ctypes.c_float(offset)
        self._native.steelyard_rms_norm(
            _at(x), _at(weight), ctypes.c_int64(rows), width, *numbers, _at(y), _at(inverse)
        )

    def rms_norm_backward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        offset: float,
        inverse: torch.Tensor,
        dy: torch.Tensor,
        dx: torch.Tensor,
        dw: torch.Tensor | None,
    ) -> None:
        rows, width = inverse.numel(), x.shape[-1]
        self._native.steelyard_rms_norm_backward(
            *(_at(tensor) for tensor in (x, weight, inverse, dy)),
            ctypes.c_int64(rows),
            width,
            ctypes.c_float(offset),
            _at(dx),
            None if dw is None else _at(dw),
            PARTS,
        )

    def group_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        epsilon: float,
        relu: bool,
        y: torch.Tensor,
        means: torch.Tensor,
        inverses: torch.Tensor,
    ) -> None:
        images, channels = x.shape[:2]
        self._native.steelyard_group_norm(
            *(_at(tensor) for tensor in (x, weight, bias)),
            *(images, channels, means.shape[1], x.numel() // (images * channels)),
            ctypes.c_float(epsilon),
            int(relu),
            *(_at(tensor) for tensor in (y, means, inverses)),
        )

    def group_norm_backward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        means: torch.Tensor,
        inverses: torch.Tensor,
        dy: torch.Tensor,
        relu: bool,
        dx: torch.Tensor,
        dw: torch.Tensor,
        db: torch.Tensor,
    ) -> None:
        images, channels = x.shape[:2]
        self._native.steelyard_group_norm_backward(
            *(_at(tensor) for tensor in (x, weight, bias, means, inverses, dy)),
            *(images, channels, means.shape[1], x.numel() // (images * channels)),
            int(relu),
            *(_at(tensor) for tensor in (dx, dw, db)),
        )

    def silu_mul(self, gate: torch.Tensor, value: torch.Tensor, y: torch.Tensor) -> None:
        self._native.steelyard_silu_mul(_at(gate), _at(value), ctypes.c_int64(gate.numel()), _at(y))

    def silu_mul_backward(
        self, gate: torch.Tensor, value: torch.Tensor, dy: torch.Tensor, dgate: torch.Tensor, dvalue: torch.Tensor
    ) -> None:
        count = ctypes.c_int64(gate.numel())
        self._native.steelyard_silu_mul_backward(_at(gate), _at(value), _at(dy), count, _at(dgate), _at(dvalue))

    def gelu_mul(self, gate: torch.Tensor, value: torch.Tensor, y: torch.Tensor) -> None:
        self._native.steelyard_gelu_mul(_at(gate), _at(value), ctypes.c_int64(gate.numel()), _at(y))

    def gelu_mul_backward(
        self, gate: torch.Tensor, value: torch.Tensor, dy: torch.Tensor, dgate: torch.Tensor, dvalue: torch.Tensor
    ) -> None:
        count = ctypes.c_int64(gate.numel())
        self._native.steelyard_gelu_mul_backward(_at(gate), _at(value), _at(dy), count, _at(dgate), _at(dvalue))

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: float, y: torch.Tensor) -> None:
        tokens, heads, size = x.shape
        self._native.steelyard_rotate(
            *(_at(tensor) for tensor in (x, cos, sin)),
            ctypes.c_int64(tokens),
            heads,
            size // 2,
            ctypes.c_float(direction),
            _at(y),
        )

    def cross_entropy(self, logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor) -> None:
        rows, vocabulary = logits.shape
        self._native.steelyard_cross_entropy(_at(logits), _at(targets), ctypes.c_int64(rows), vocabulary, _at(losses))

    def accumulate(self, total: torch.Tensor, x: torch.Tensor) -> None:
        """See training.cpp."""
        self._native.steelyard_accumulate(_at(total), _at(x), ctypes.c_int64(x.numel()))

    def attention_forward(self, scores: torch.Tensor, seen: torch.Tensor, lse: torch.Tensor, scale: float) -> None:
        """See training.cpp."""
        rows, keys = lse.numel(), scores.shape[-1]
        self._native.steelyard_attention_forward(
            _at(scores), _at(seen), ctypes.c_int64(rows), keys, ctypes.c_float(scale), _at(lse)
        )

    def attention_backward(
        self,
        scores: torch.Tensor,
        dp: torch.Tensor,
        seen: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        scale: float,
    ) -> None:
        """See training.cpp."""
        rows, keys = lse.numel(), scores.shape[-1]
        self._native.steelyard_attention_backward(
            *(_at(tensor) for tensor in (scores, dp, seen, lse, delta)),
            ctypes.c_int64(rows),
            keys,
            ctypes.c_float(scale),
        )


def _at(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _is_native(x: torch.Tensor, width: int) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and width % LANES == 0 and library.load() is not None


def _library() -> Calls:
    found = library.load()
    assert found is not None
    return Calls(found.native)
