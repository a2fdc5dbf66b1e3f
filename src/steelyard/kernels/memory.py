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
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets no huge pages
    with contextlib.suppress(OSError, AttributeError):  # a kernel without them
        area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=dtype, count=math.prod(shape)).view(shape)


class Arena:
    """Memory for many tensors that stay: side by side, in huge pages where there are any."""

    CHUNK = 1 << 26

    def __init__(self) -> None:
        self._room = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of zeros."""
        size = math.prod(shape) * dtype.itemsize
        if self._used + size > len(self._room):
            self._room, self._used = zeros(max(self.CHUNK, size), dtype=torch.uint8), 0
        part = self._room[self._used : self._used + size]
        self._used += -(-size // 64) * 64
        return part.view(dtype).view(shape)
