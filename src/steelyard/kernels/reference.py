"""The kernels' arithmetic in PyTorch, operation by operation: the truth in the tests, and the path without a compiler.

Float32 sums go over sixteen lanes and then a tree (8, 4, 2, 1), or in a stated order, exactly as the native code does;
`fma` rounds once. Integer sums are exact and need no order.
"""

# T tokens  N outputs  M inputs  W width, padded to a multiple of 16

from __future__ import annotations

import torch

LANES = 16
LIMIT = 127.0
TINY = torch.finfo(torch.float32).tiny


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """A * b + c in float32, rounded once.

    The product is exact in float64; the sum is rounded there and again to float32, which differs from one rounding
    about once in 2**29 operations.
    """
    return (a.double() * b.double() + c.double()).float()


def lane_sum(x: torch.Tensor) -> torch.Tensor:
    """`[..., 16 n]` -> `[...]`: each lane in order, then the lanes as a tree."""
    lanes = torch.zeros_like(x[..., :LANES])
    for part in x.split(LANES, dim=-1):  # type: ignore[no-untyped-call]
        lanes = lanes + part
    return tree_sum(lanes)


def tree_sum(lanes: torch.Tensor) -> torch.Tensor:
    """`[..., 16]` -> `[...]`: 8, 4, 2, 1."""
    width = LANES // 2
    while width:
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
        width //= 2
    return lanes[..., 0]


def exp(x: torch.Tensor) -> torch.Tensor:
    """e^x as the kernels compute it: Cephes' polynomial after x = n ln 2 + r; 0 below -87.3, x at most 88."""

    def value(number: float) -> torch.Tensor:
        return torch.tensor(number, dtype=torch.float32)

    small = x < value(-87.3)
    x = torch.minimum(torch.maximum(x, value(-87.3)), value(88.0))
    n = (x * value(1.44269504088896341)).round()
    r = fma(n, value(-0.693359375), x)
    r = fma(n, value(2.12194440e-4), r)
    p = value(1.9875691500e-4)
    for coefficient in (
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    ):
        p = fma(p, r, value(coefficient))
    p = fma(p, r * r, r) + value(1.0)
    power = ((n.to(torch.int32) + 127) << 23).view(torch.float32)
    return torch.where(small, value(0.0), p * power)


GELU_SLOPE, GELU_BEND = (torch.tensor(number, dtype=torch.float32) for number in (1.5957691216, 0.0713548163))


def silu(x: torch.Tensor) -> torch.Tensor:
    """X / (1 + e^-x)."""
    return x / (1.0 + exp(-x))


def gelu(x: torch.Tensor) -> torch.Tensor:
    """X / (1 + e^-u), u = 2 sqrt(2 / pi) (x + 0.044715 x^3): gelu by its approximation with tanh."""
    return x / (1.0 + exp(-(x * fma(x * x, GELU_BEND, GELU_SLOPE))))


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row of `[T, M]` to int8 by its largest magnitude.

    Returns:
        `[T, M]` int8 in -127..127 and `[T, 1]` float32 scales, with x ~ q * scale. A row of zeros has scale 0, and so
        has one of magnitudes below 1.5e-36.
    """
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / LIMIT
    scale.masked_fill_(scale < TINY, 0.0)
    inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    return (wide * inverse).round_().clamp_(-LIMIT, LIMIT).to(torch.int8), scale


def integer_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int8 `[T, M]` times int8 `[N, M]` transposed, exactly, times the channel scales `[N]`.

    float64 holds every sum of up to 2**38 products exactly. One rounding to float32 before the scale and one
    after, as oneDNN does.
    """
    return (x.double() @ weight.double().T).float() * scale


def quantize_groups(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` of each `group` values of a row: `[T, M]` -> `[T, M]` int8 and scales `[T, M / group]`."""
    quantized, scale = quantize_rows(x.reshape(-1, group))
    return quantized.view(x.shape), scale.view(len(x), -1)


def grouped_product(x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int8 `[T, M]` with scales `[T, G]` times int8 `[N, M]` with scales `[N, G]`, transposed.

    The sum within a group is exact: float32 holds those of up to 1,024 products of bytes. It is rounded to float32,
    multiplied by the weights' scale and by that of x, and added: groups in order from 0.
    """
    groups = scale.shape[1]
    wide = torch.float32 if x.shape[1] // groups <= 1024 else torch.float64
    rows = x.view(len(x), groups, -1).transpose(0, 1).to(wide)  # [G, T, M / G]
    columns = weight.view(len(weight), groups, -1).permute(1, 2, 0)  # [G, M / G, N]
    total = torch.zeros(len(x), len(weight))
    for group in range(groups):
        part = (rows[group] @ columns[group].to(wide)).float()
        total += part.mul_(scale[:, group]).mul_(x_scale[:, group, None])
    return total


def normalize(x: torch.Tensor, weight: torch.Tensor, size: int, epsilon: float) -> torch.Tensor:
    """X / rms(x) * weight over `[..., W]` of which `size` are no padding."""
    mean = lane_sum(x * x) / float(size) + torch.tensor(epsilon, dtype=torch.float32)
    # torch's float32 square root is not always the nearest; float64's, rounded, is.
    return x * (1.0 / mean.double().sqrt().float())[..., None] * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, factor: float) -> torch.Tensor:
    """Pairs `(x[i], x[i + E / 2])` of `[T, heads, E]` turned by cos and sin `[T, 1, E / 2]`, times a factor."""
    first, second = x.chunk(2, dim=-1)
    scale = torch.tensor(factor, dtype=torch.float32)
    return torch.cat([(first * cos - second * sin) * scale, (second * cos + first * sin) * scale], dim=-1)


def low_rank(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Y + scale * B (A x): x `[T, W]`, y `[T, N]`, A `[R, W]`, B transposed `[R, N]`, both bfloat16."""
    hidden = []
    for row in a.float():
        lanes = torch.zeros(len(x), LANES)
        for part, weight in zip(x.split(LANES, dim=-1), row.split(LANES), strict=True):  # type: ignore[no-untyped-call]
            lanes = fma(part, weight, lanes)
        hidden.append(tree_sum(lanes))
    total = torch.zeros_like(y)
    for value, row in zip(hidden, b.float(), strict=True):
        total = fma(value[:, None], row, total)
    return fma(torch.tensor(scale, dtype=torch.float32), total, y)


BLOCK, PARTITION, MASKED = 32, 256, -1e30
SMALLEST = 2.0**-50
"""Of what attention multiplies: smaller numbers are 0, so that no product or sum is subnormal."""
LARGEST_BF16 = torch.finfo(torch.bfloat16).max


def storable(x: torch.Tensor) -> torch.Tensor:
    """What is written to the cache: finite, nothing between 0 and `SMALLEST`; not a number becomes the largest."""
    x = x.nan_to_num(LARGEST_BF16).clamp(-LARGEST_BF16, LARGEST_BF16)
    return torch.where(x.abs() < SMALLEST, torch.zeros_like(x), x)


def pair_sum(a: torch.Tensor, b: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Total + the sum of 32 products along the last dimension of a and b `[..., 32]`.

    Those of even place by fma in order from 0, those of odd place likewise, then both sums together: what a tile of AMX
    does with bfloat16 (Intel's manual, TDPBF16PS).
    """
    even, odd = torch.zeros_like(total), torch.zeros_like(total)
    for place in range(0, a.shape[-1], 2):
        even = fma(a[..., place], b[..., place], even)
        odd = fma(a[..., place + 1], b[..., place + 1], odd)
    return total + (even + odd)


def dense_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """bfloat16 `[T, M]` times bfloat16 `[N, M]` transposed -> `[T, N]` float32, 32 products at a time by `pair_sum`."""
    total = torch.zeros(len(x), len(weight))
    for k in range(0, x.shape[1], BLOCK):
        total = pair_sum(x[:, None, k : k + BLOCK].float(), weight[None, :, k : k + BLOCK].float(), total)
    return total


def attend(
    queries: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    window: int,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention of some queries over one sequence's cache.

    Args:
        queries: `[Q, G, E]` bfloat16 of one key-value head, already times 1 / sqrt(E); E padded to a multiple of 32.
        positions: `[Q]` int64.
        keys: `[blocks, E / 2, 32, 2]` bfloat16 or int8 of that head.
        values: `[blocks, 16, E, 2]`.
        window: most tokens seen, itself included; 0 means all.
        scales: `[blocks, 32]` float32 of int8 keys and of values.

    Returns:
        `[Q, G, E]` float32.
    """
    wide_keys = keys.float().permute(0, 2, 1, 3).flatten(0, 1).flatten(1)  # [tokens of the blocks, E]
    wide_values = values.float().permute(0, 1, 3, 2).flatten(0, 2)
    token_scales = None if scales is None else (scales[0].flatten(), scales[1].flatten())
    out = torch.empty(queries.shape)
    for place, position in enumerate(positions.tolist()):
        first = (position - window + 1) // PARTITION if window and position >= window else 0
        parts = [
            _attend_partition(queries[place].float(), position, wide_keys, wide_values, window, part, token_scales)
            for part in range(first, position // PARTITION + 1)
        ]
        peak = torch.stack([part[1] for part in parts]).amax(0)  # [G]
        total, mixed = torch.zeros_like(peak), torch.zeros(queries[place].shape)
        for part_mixed, part_peak, part_total in parts:
            factor = exp(part_peak - peak)
            total = total + part_total * factor
            mixed = fma(factor[:, None], part_mixed, mixed)
        out[place] = mixed / total[:, None]
    return out


def _attend_partition(
    queries: torch.Tensor,
    position: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    window: int,
    part: int,
    scales: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries `[G, E]` over 256 tokens: weighted values `[G, E]`, largest score `[G]`, sum of weights `[G]`."""
    begin = part * PARTITION
    tokens = slice(begin, begin + padded(min(position + 1 - begin, PARTITION), BLOCK))
    keys, values = keys[tokens], values[tokens]
    scores = torch.zeros(len(queries), len(keys))
    for e in range(0, queries.shape[1], BLOCK):
        scores = pair_sum(queries[:, None, e : e + BLOCK], keys[None, :, e : e + BLOCK], scores)
    if scales is not None:
        scores = scores * scales[0][tokens]
    places = begin + torch.arange(len(keys))
    hidden = places > position
    if window:
        hidden |= places + window <= position
    scores = scores.masked_fill(hidden, MASKED)
    peak = scores.amax(-1)
    weights = exp(scores - peak[:, None])
    total = lane_sum(weights)
    if scales is not None:
        weights = weights * scales[1][tokens]
    weights = torch.where(weights < SMALLEST, torch.zeros_like(weights), weights).bfloat16().float()
    mixed = torch.zeros_like(queries)
    for token in range(0, len(keys), BLOCK):
        block = values[token : token + BLOCK].T[None]  # [1, E, 32]
        mixed = pair_sum(weights[:, None, token : token + BLOCK], block, mixed)
    return mixed, peak, total


def padded(size: int, to: int = LANES) -> int:
    """`size` rounded up to a multiple of `to`."""
    return -(-size // to) * to
