"""Memory that the kernels stream through: in huge pages where Linux gives them, so that few addresses miss the TLB."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Callable

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


POPULATE_WRITE = 23  # Linux 5.14


def populate(tensor: torch.Tensor, wanted: Callable[[], bool] = lambda: True) -> None:
    """Have the system give a tensor of `zeros` its pages now: at the first write they cost as much as the writing.

    A system that cannot does nothing. Other threads may use the tensor meanwhile. It ends early when it is no longer
    `wanted`.
    """
    page, piece = mmap.PAGESIZE, 1 << 25
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    begin = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    for at in range(begin, end, piece):
        if not wanted() or madvise(at, min(piece, end - at), POPULATE_WRITE) != 0:
            return


class Arena:
    """Memory for many tensors that stay: side by side, in huge pages where there are any.

    Args:
        chunk: bytes that are taken at a time; 0: of each tensor as many as it needs.
    """

    def __init__(self, chunk: int = 1 << 26) -> None:
        self.chunk = chunk
        self._room = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of zeros."""
        size = math.prod(shape) * dtype.itemsize
        if self._used + size > len(self._room):
            self._room, self._used = zeros(max(self.chunk, size), dtype=torch.uint8), 0
        part = self._room[self._used : self._used + size]
        self._used += -(-size // 64) * 64
        return part.view(dtype).view(shape)
