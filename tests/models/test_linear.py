"""int8 layers: oneDNN against the integer reference, to the bit, at every number of rows."""

from __future__ import annotations

import pytest
import torch

from steelyard.compress.quantize.grid import rounded
from steelyard.kernels import onednn
from steelyard.kernels.reference import integer_product, quantize_rows
from steelyard.models import linear
from steelyard.models.linear import QuantizedEmbedding, QuantizedLinear, packed_halves

LIMIT = 127


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-LIMIT, LIMIT + 1, shape, dtype=torch.int8)


@pytest.mark.parametrize(("outputs", "inputs"), [(192, 576), (1, 1), (7, 33), (64, 1536)])
def test_onednn_equals_the_integers_at_every_row_count(outputs: int, inputs: int) -> None:
    if not onednn.is_exact():
        pytest.skip("oneDNN's int8 product is not exact on this machine: the reference runs instead")
    torch.manual_seed(0)
    weight, scale = integers(outputs, inputs), torch.rand(outputs) + 1e-3
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    zeros = torch.zeros(outputs, dtype=torch.int64)
    x = integers(256, inputs)
    expected = (x.long() @ weight.long().T).float() * scale
    assert torch.equal(integer_product(x, weight, scale), expected)
    for rows in [*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 255, 256]:
        assert torch.equal(onednn.product(x[:rows], packed, scale, zeros), expected[:rows]), rows


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 16), (8, 48), (4, None), (4, 32)])
def test_layer_is_near_the_dense_one_and_the_same_by_every_way(
    monkeypatch: pytest.MonkeyPatch, bits: int, group: int | None
) -> None:
    torch.manual_seed(1)
    dense, bias, x = torch.randn(50, 96) * 0.1, torch.randn(50), torch.randn(20, 96)
    x[3] = 0
    found = rounded(dense, bits, group)
    weight = found.values if bits == 8 else packed_halves(found.values)

    def layer() -> torch.Tensor:
        return QuantizedLinear(weight, found.scale, bias, torch.float32)(x)

    fast = layer()
    expected = x.double() @ dense.double().T + bias.double()
    assert float((fast - expected).norm() / expected.norm()) < (0.02 if bits == 8 else 0.2)  # 1.1% measured
    assert torch.equal(fast[3], bias)
    several = QuantizedLinear(weight, found.scale, bias, torch.float32)(x.view(4, 5, 96))
    assert torch.equal(several, fast.view(4, 5, 50))
    monkeypatch.setattr(linear, "load", lambda: None)
    assert torch.equal(layer(), fast)
    monkeypatch.setattr(onednn, "is_exact", lambda: False)
    assert torch.equal(layer(), fast)


@pytest.mark.parametrize("bits", [8, 4])
def test_groups_in_an_embedding(bits: int) -> None:
    found = rounded(torch.randn(10, 32), bits, 16)
    weight = found.values if bits == 8 else packed_halves(found.values)
    token_ids = torch.tensor([[3, 3], [9, 0]])
    layer = QuantizedEmbedding(weight, found.scale, None, torch.float32)
    assert torch.equal(layer(token_ids), found.restored()[token_ids])


def test_rounding_stays_within_half_a_step_and_the_range() -> None:
    torch.manual_seed(2)
    x = torch.randn(64, 100) * torch.logspace(-6, 6, 64)[:, None]
    x[5] = 0
    quantized, scale = quantize_rows(x)
    assert int(quantized.abs().max()) <= LIMIT
    assert bool(((quantized * scale - x).abs() <= scale * 0.5001).all())
    weight, channel = rounded(x, 8, None)
    assert int(weight.abs().max()) <= LIMIT
    # The scale is rounded to bfloat16 first: the largest value of a row can be clamped by 0.4%.
    assert bool(((weight * channel.float() - x).abs() <= channel.float() * 1.01).all())


def test_embedding_looks_up_what_was_rounded() -> None:
    weight, scale = rounded(torch.randn(10, 8), 8, None)
    token_ids = torch.tensor([3, 3, 9])
    expected = (weight[token_ids].float() * scale[token_ids].float()).bfloat16()
    assert torch.equal(QuantizedEmbedding(weight, scale, None, torch.bfloat16)(token_ids), expected)
    columns = torch.logspace(-3, 4, 8, base=2)
    found = QuantizedEmbedding(weight, scale, columns, torch.float32)(token_ids)
    assert torch.equal(found, weight[token_ids].float() * scale[token_ids].float() * columns)
