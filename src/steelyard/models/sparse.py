"""Tensors with many zeros as they are stored: a bit for each weight, and those that are not 0."""

# N outputs  M inputs  K weights that are not 0

from __future__ import annotations

import numpy as np
import torch

from steelyard.errors import CheckpointError

BITS, VALUES, SHAPE = ".bitmask", ".nonzero", ".shape"
ENOUGH = 0.4
"""Bytes a weight that zeros have to take, so that a tensor is worth storing so."""


def stored(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by name; a matrix `[N, M]` with enough zeros as NAME.bitmask `[ceil(N M / 8)]` uint8, NAME.nonzero `[K]`
    in their order and NAME.shape `[2]` int64.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        there = tensor != 0
        weights = tensor.dim() == 2 and (tensor.is_floating_point() or tensor.dtype == torch.int8)
        if not weights or float(1 - there.float().mean()) * tensor.element_size() < ENOUGH:
            found[name] = tensor
            continue
        found[name + BITS] = torch.from_numpy(np.packbits(there.numpy(), bitorder="little"))
        found[name + VALUES] = tensor[there]
        found[name + SHAPE] = torch.tensor(tensor.shape)
    return found


def restored(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `stored` was given.

    Raises:
        CheckpointError: parts that are missing or do not fit each other; the tensor is named.
    """
    names = [name.removesuffix(BITS) for name in tensors if name.endswith(BITS)]
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith((BITS, VALUES, SHAPE))}
    if len(found) + 3 * len(names) != len(tensors):
        raise CheckpointError("a sparse tensor lacks its bits, its values or its shape")
    for name in names:
        bits, values, shape = (tensors.get(name + part) for part in (BITS, VALUES, SHAPE))
        if bits is None or values is None or shape is None:
            raise CheckpointError(f"'{name}' is sparse and lacks its values or its shape")
        sizes = shape.tolist() if shape.shape == (2,) and shape.dtype == torch.int64 else [0, 0]
        count = sizes[0] * sizes[1]
        fits = min(sizes) > 0 and bits.dtype == torch.uint8 and bits.shape == (-(-count // 8),)
        there = torch.from_numpy(np.unpackbits(bits.numpy(), bitorder="little")).bool() if fits else None
        if there is None or there[count:].any() or values.shape != (int(there.sum()),):
            raise CheckpointError(f"'{name}' is sparse, and its bits, values and shape do not fit each other")
        dense = torch.zeros(count, dtype=values.dtype)
        dense[there[:count]] = values
        found[name] = dense.view(sizes)
    return found
