"""The loss in chunks, with its gradient made on the way, against autograd over the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from steelyard.train import losses


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 2600])
@pytest.mark.parametrize("trained", ["both", "states", "head"])
def test_the_loss_in_chunks_is_the_loss(count: int, trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(count)
    states = torch.randn(count, 48, generator=generator, dtype=torch.float64)
    head = torch.randn(97, 48, generator=generator, dtype=torch.float64)
    targets = torch.randint(97, (count,), generator=generator)
    inputs = [states.requires_grad_(trained != "head"), head.requires_grad_(trained != "states")]
    learnt = [tensor for tensor in inputs if tensor.requires_grad]
    expected = F.cross_entropy(states @ head.T, targets, reduction="sum")
    wanted = torch.autograd.grad(expected / 7, learnt)
    rows: list[int] = []
    whole = losses.cross_entropy_
    monkeypatch.setattr(losses, "cross_entropy_", lambda logits, at: rows.append(len(logits)) or whole(logits, at))
    narrow = [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in inputs]
    found = losses.cross_entropy(*narrow, targets)
    assert max(rows) <= losses.CHUNK
    assert sum(rows) == count
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-4)
    (found / 7).backward()
    gradients = [tensor.grad for tensor in narrow if tensor.requires_grad]
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_it_is_near() -> None:
    generator = torch.Generator().manual_seed(0)
    states = (torch.randn(700, 64, generator=generator) / 4).bfloat16().requires_grad_(True)
    head = (torch.randn(1003, 64, generator=generator) / 4).bfloat16().requires_grad_(True)
    targets = torch.randint(1003, (700,), generator=generator)
    wide = [tensor.detach().double().requires_grad_(True) for tensor in (states, head)]
    expected = F.cross_entropy(wide[0] @ wide[1].T, targets, reduction="sum")
    expected.backward()
    found = losses.cross_entropy(states, head, targets)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-3)
    for ours, theirs in zip((states, head), wide, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert float(error) < 0.01, "bfloat16's digits"
