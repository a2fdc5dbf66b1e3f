"""The exact int8 product where no kernel of ours is: oneDNN's, through torch's inner operators, or float64.

Those operators are wrapped here, checked once against the reference, and left alone where they differ.
"""

from __future__ import annotations

import functools
import logging

import torch

from steelyard.kernels.reference import LIMIT, integer_product

log = logging.getLogger(__name__)


class ExactProduct:
    """int8 rows times an int8 weight, exactly, times the channel scales.

    Args:
        weight: `[N, M]` int8.
        scale: `[N]` float32.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        self.weight, self.scale = weight, scale.float().flatten().contiguous()
        self._packed: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, M]` int8 -> `[T, N]` float32."""
        if not is_exact():
            return integer_product(x, self.weight, self.scale)
        if self._packed is None:
            self._packed = torch.ops.onednn.qlinear_prepack(self.weight.contiguous(), None)
            self._zeros = torch.zeros(self.weight.shape[0], dtype=torch.int64)
        return product(x, self._packed, self.scale, self._zeros)


def product(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """`integer_product` by oneDNN: unit activation scale, zero point 128, weights prepacked."""
    shifted = (x.to(torch.int16) + 128).to(torch.uint8)
    result: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, 128, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return result


@functools.cache
def is_exact() -> bool:
    """Whether oneDNN's int8 product is here and equals the reference to the bit on random input."""
    generator, limit = torch.Generator().manual_seed(0), int(LIMIT)
    try:
        for rows, inputs, outputs in ((1, 64, 48), (7, 576, 192), (33, 1536, 64)):
            x = torch.randint(-limit, limit + 1, (rows, inputs), dtype=torch.int8, generator=generator)
            weight = torch.randint(-limit, limit + 1, (outputs, inputs), dtype=torch.int8, generator=generator)
            scale = torch.rand(outputs, generator=generator) + 1e-3
            packed = torch.ops.onednn.qlinear_prepack(weight, None)
            fast = product(x, packed, scale, torch.zeros(outputs, dtype=torch.int64))
            if not torch.equal(fast, integer_product(x, weight, scale)):
                log.warning("oneDNN's int8 product differs from the reference here; using the slower reference")
                return False
    except (AttributeError, RuntimeError) as error:
        log.warning("oneDNN's int8 product is not to be had here (%s); using the slower reference", error)
        return False
    return True
