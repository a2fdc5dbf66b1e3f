"""Sparse tensors as they are stored: whole again to the bit, smaller, and nothing that is damaged is believed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steelyard.errors import CheckpointError
from steelyard.models import sparse


@given(
    st.integers(1, 9),
    st.integers(1, 30),
    st.floats(0, 1),
    st.integers(0, 99),
    st.sampled_from([torch.bfloat16, torch.int8]),
)
def test_whole_again(rows: int, columns: int, share: float, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(rows, columns, generator=generator).mul(9).to(dtype)
    tensor[torch.rand(rows, columns, generator=generator) < share] = 0
    tensors = {"a.weight": tensor, "norm": torch.zeros(7), "counts": torch.zeros(3, 3, dtype=torch.int64)}
    kept = sparse.stored(tensors)
    found = sparse.restored(kept)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    if float((tensor == 0).float().mean()) * tensor.element_size() < sparse.ENOUGH - 1e-6:
        assert kept.keys() == tensors.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_half_of_it_is_a_little_over_half(dtype: torch.dtype) -> None:
    tensor = torch.randint(1, 9, (128, 128)).to(dtype)
    tensor[:, ::2] = 0
    kept = sparse.stored({"w": tensor})
    size = sum(part.numel() * part.element_size() for part in kept.values())
    assert size == 128 * 128 * (dtype.itemsize / 2 + 1 / 8) + 16
    assert torch.equal(sparse.restored(kept)["w"], tensor)


def damaged(part: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    kept = sparse.stored({"w": torch.eye(5)})
    if value is None:
        del kept["w" + part]
    else:
        kept["w" + part] = value
    return kept


@pytest.mark.parametrize(
    ("part", "value"),
    [
        (sparse.BITS, None),
        (sparse.VALUES, None),
        (sparse.SHAPE, None),
        (sparse.BITS, torch.full((4,), 255, dtype=torch.uint8)),
        (sparse.BITS, torch.full((3,), 1, dtype=torch.uint8)),
        (sparse.BITS, torch.zeros(4)),
        (sparse.VALUES, torch.ones(4)),
        (sparse.VALUES, torch.ones(5, 1)),
        (sparse.SHAPE, torch.tensor([5, 1 << 62])),
        (sparse.SHAPE, torch.tensor([-5, -5])),
        (sparse.SHAPE, torch.tensor([5.0, 5.0])),
        (sparse.SHAPE, torch.tensor([0, 5])),
    ],
)
def test_what_is_damaged(part: str, value: torch.Tensor | None) -> None:
    with pytest.raises(CheckpointError, match="sparse"):
        sparse.restored(damaged(part, value))
