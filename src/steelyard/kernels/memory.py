"""Memory that the kernels stream through: in huge pages where Linux gives them, so that few addresses miss the TLB."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch


def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros in memory of its own; its pages are taken when they are first written."""
    size = math.prod(shape) * dtype.itemsize
    if size < 1 << 21:
        return torch.zeros(*shape, dtype=dtype)
    area = mmap.mmap(-1, size)
    with contextlib.suppress(OSError, AttributeError):  # a kernel without them
        area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=dtype, count=math.prod(shape)).view(shape)
