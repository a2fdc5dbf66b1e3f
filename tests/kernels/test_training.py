"""The fused kernels of training against their twins, forward and backward, in every native form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from native_forms import native
from steelyard.kernels import library, recompute, training
from steelyard.kernels.library import Library

__all__ = ["native"]  # a fixture

Function = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True)
def _in_this_form(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: native)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).bfloat16()


def compare(function: Function, twin: Function, inputs: list[torch.Tensor], *rest: Any, forward: float) -> None:
    """Both on the same inputs; the twin in float64 is the truth for gradients."""
    ours = [tensor.clone().requires_grad_(True) for tensor in inputs]
    found = function(*ours, *rest)
    with torch.no_grad():
        torch.testing.assert_close(found.float(), twin(*inputs, *rest).float(), rtol=forward, atol=forward)
    upstream = randn(*found.shape, seed=9)
    found.backward(upstream)
    truth = [tensor.double().requires_grad_(True) for tensor in inputs]
    twin(*truth, *rest).backward(upstream.double())
    for mine, theirs in zip(ours, truth, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        error = (mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert float(error) < 0.006, "bfloat16's digits"


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (40, 576), (17, 128)])
def test_rms_norm(shape: tuple[int, int], offset: float) -> None:
    compare(training.rms_norm, training.rms_norm_twin, [randn(*shape), randn(shape[1])], 1e-5, offset, forward=0.008)


def test_rms_norm_of_heads() -> None:
    compare(training.rms_norm, training.rms_norm_twin, [randn(5, 3, 32), randn(32)], 1e-6, forward=0.008)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"), [((1, 1, 4, 4), 1), ((3, 12, 5, 5), 3), ((2, 16, 28, 28), 2), ((4, 6, 3), 6), ((5, 8), 2)]
)
def test_group_norm(shape: tuple[int, ...], groups: int, relu: bool) -> None:
    def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return training.group_norm(x, weight, bias, groups, 1e-5, relu=relu)

    def twin(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return training.group_norm_twin(x, weight, bias, groups, 1e-5, relu=relu)

    inputs = [3 * randn(*shape) + 2, randn(shape[1]), randn(shape[1], seed=1)]
    compare(ours, twin, inputs, forward=0.02)


@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (40, 1536)])
def test_silu_mul(shape: tuple[int, int]) -> None:
    compare(training.silu_mul, training.silu_mul_twin, [3 * randn(*shape), randn(*shape, seed=1)], forward=0.008)


@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (40, 1536)])
def test_gelu_mul(shape: tuple[int, int]) -> None:
    compare(training.gelu_mul, training.gelu_mul_twin, [3 * randn(*shape), randn(*shape, seed=1)], forward=0.008)


@pytest.mark.parametrize("shape", [(1, 1, 32), (7, 3, 64), (33, 9, 128)])
def test_rotate(shape: tuple[int, int, int]) -> None:
    angles = torch.rand(shape[0], 1, shape[2] // 2, generator=torch.Generator().manual_seed(1)) * 7
    compare(training.rotate, training.rotate_twin, [randn(*shape)], angles.cos(), angles.sin(), forward=0.008)


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 16), (5, 97), (64, 1003), (3, 15)])
def test_cross_entropy(rows: int, vocabulary: int) -> None:
    logits = 5 * randn(rows, vocabulary)
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(rows))
    ours, theirs = logits.clone(), logits.clone()
    found, expected = training.cross_entropy_(ours, targets), training.cross_entropy_twin_(theirs, targets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.008, atol=1e-4)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "size"), [(1, 1, 16, 16), (6, 2, 48, 32), (9, 3, 272, 64), (4, 4, 400, 128)]
)
def test_causal_attention(heads: int, kv_heads: int, length: int, size: int) -> None:
    inputs = [randn(2, count, length, size, seed=seed) for seed, count in enumerate((heads, kv_heads, kv_heads), 11)]
    compare(training.causal_attention, training.causal_attention_twin, inputs, forward=0.02)


def test_attention_of_a_length_that_the_native_form_does_not_take() -> None:
    inputs = [randn(1, 2, 13, 16), randn(1, 1, 13, 16), randn(1, 1, 13, 16, seed=3)]
    compare(training.causal_attention, training.causal_attention_twin, inputs, forward=0.02)


@pytest.mark.parametrize(
    ("rows", "heads", "length", "size"), [(3, 1, 5, 16), (3, 2, 13, 32), (5, 4, 48, 20), (2, 3, 257, 64)]
)
@pytest.mark.parametrize("padded", [False, True])
def test_attention(
    rows: int, heads: int, length: int, size: int, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SCORES", 3 * 64 * 64)  # several heads together, and one alone
    inputs = [randn(rows, heads, length, size, seed=seed) for seed in range(3)]
    lengths = torch.randint(1, length + 1, (rows,), generator=torch.Generator().manual_seed(1)) if padded else None
    compare(training.attention, training.attention_twin, inputs, lengths, forward=0.02)


def test_attention_sees_nothing_behind_a_row() -> None:
    queries, keys, values = (randn(2, 2, 20, 16, seed=seed).requires_grad_(True) for seed in range(3))
    lengths = torch.tensor([7, 20])
    mixed = training.attention(queries, keys, values, lengths)
    mixed.sum().backward()
    assert keys.grad is not None
    assert values.grad is not None
    assert not keys.grad[0, :, 7:].any()
    assert not values.grad[0, :, 7:].any()
    assert values.grad[0, :, :7].all()


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
@pytest.mark.parametrize("function", [training.attention, training.causal_attention])
def test_what_is_not_finite_is_not_hidden(function: Function, fault: float) -> None:
    queries, keys, values = (randn(1, 2, 32, 16, seed=seed).requires_grad_(True) for seed in range(3))
    with torch.no_grad():
        queries[0, 1, 5, 3] = fault
    mixed = function(queries, keys, values)
    assert mixed[0, 1, 5].isnan().all()
    assert mixed[0, 0].isfinite().all()


def test_attention_over_nothing() -> None:
    for shape in ((0, 2, 16, 16), (1, 2, 0, 16)):
        inputs = [torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)] * 3
        assert training.attention(*inputs).shape == shape
        assert training.causal_attention(*inputs).shape == shape


def test_lengths_beyond_the_row_are_the_row() -> None:
    inputs = [randn(2, 2, 20, 16, seed=seed).requires_grad_(True) for seed in range(3)]
    assert torch.equal(training.attention(*inputs, torch.tensor([20, 999])), training.attention(*inputs))


@pytest.mark.parametrize("count", [1, 16, 33, 1000])
def test_accumulate(count: int) -> None:
    total, x = torch.randn(count), randn(count)
    expected = total + x.float()
    training.accumulate_(total, x)
    assert torch.equal(total, expected)


def test_gradients_do_not_depend_on_threads() -> None:
    def gradients(threads: int) -> list[torch.Tensor | None]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            weight, bias = (randn(64, seed=seed).requires_grad_(True) for seed in range(2))
            training.rms_norm(randn(333, 64), weight, 1e-5).backward(randn(333, 64, seed=2))
            x = randn(33, 64, 3, 5).requires_grad_(True)
            training.group_norm(x, weight, bias, 8, 1e-5, relu=True).backward(randn(33, 64, 3, 5, seed=2))
            inputs = [randn(5, 4, 33, 16, seed=seed).requires_grad_(True) for seed in range(3)]
            training.attention(*inputs, torch.tensor([33, 1, 20, 32, 16])).backward(randn(5, 4, 33, 16, seed=9))
            return [tensor.grad for tensor in (weight, bias, x, *inputs)]
        finally:
            torch.set_num_threads(before)

    for one, two in zip(gradients(1), gradients(2), strict=True):
        assert one is not None
        assert two is not None
        assert torch.equal(one, two)


def test_what_the_native_form_does_not_take_runs_as_the_twin() -> None:
    for x in (torch.randn(3, 20).bfloat16(), torch.randn(3, 32)):
        weight = torch.randn(x.shape[1]).to(x.dtype)
        assert torch.equal(training.rms_norm(x, weight, 1e-5), training.rms_norm_twin(x, weight, 1e-5))
        if x.dtype == torch.float32:
            assert torch.equal(training.silu_mul(x, x), training.silu_mul_twin(x, x))


@pytest.mark.parametrize("again", [False, True])
def test_what_is_made_again_is_not_kept_and_changes_no_bit(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gated layer after a norm."""
    inputs = [randn(64, 48), randn(48), randn(96, 48), randn(96, 48, seed=1), randn(48, 96)]
    kept: list[int] = []

    def gradients(pack: Callable[[torch.Tensor], Any]) -> list[torch.Tensor | None]:
        def keep(tensor: torch.Tensor) -> Any:
            packed = pack(tensor)
            kept.extend([packed.data_ptr()] if isinstance(packed, torch.Tensor) else [])
            return packed

        monkeypatch.setattr(recompute, "_pack", keep)
        x, scale, gate, up, down = (tensor.clone().requires_grad_(True) for tensor in inputs)
        with recompute.recomputing():
            normed = training.rms_norm(x, scale, 1e-5)
            gated = training.silu_mul(normed @ gate.T, normed @ up.T)
            out = gated @ down.T
        found = sum(pointer in (normed.data_ptr(), gated.data_ptr()) for pointer in kept)
        assert found == (0 if again else 3), "the norm twice, the gated once"
        out.backward(randn(64, 48, seed=5))
        return [tensor.grad for tensor in (x, scale, gate, up, down)]

    packing = recompute._pack
    found = gradients(packing if again else lambda tensor: tensor)
    kept.clear()
    again = not again
    other = gradients(packing if again else lambda tensor: tensor)
    assert all(
        torch.equal(one, two) for one, two in zip(found, other, strict=True) if one is not None and two is not None
    )
