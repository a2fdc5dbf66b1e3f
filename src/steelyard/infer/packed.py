"""Packed weights by name, and the file that keeps them from one start of an engine to the next.

The file is a safetensors file in the cache, named by the checkpoint's id, its weights' sizes and times, and the layout,
which is the same on every processor. It can be thrown away at any time. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch

from steelyard.checkpoint import manifest
from steelyard.checkpoint.safetensors import write
from steelyard.checkpoint.sources.cache import default_cache
from steelyard.kernels.memory import Arena
from steelyard.kernels.packing import LAYOUT, PANEL, Form, PackedWeight
from steelyard.kernels.reference import padded

log = logging.getLogger(__name__)

DTYPES = {torch.uint8: "U8", torch.bfloat16: "BF16", torch.float32: "F32"}
STALE_SECONDS = 30 * 24 * 3600
"""A file that no start has used for so long goes when another is written."""


class PackedWeights:
    """Packed weights by name.

    Args:
        path: the file that keeps them; None keeps them in memory alone.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.arena = path, Arena()
        self._stored = {} if path is None else _read(path)
        self._packed: dict[str, PackedWeight] = {}
        self._complete = True

    def find(self, name: str, form: Form, pack: Callable[[], PackedWeight]) -> PackedWeight:
        """The weight called `name`: from the file if it is there and fits, or packed now."""
        weight = self._restore(name, form)
        if weight is None:
            self._complete = False
            weight = pack()
        self._packed[name] = weight
        return weight

    def keep(self) -> None:
        """Write the file if anything had to be packed; a cache that cannot be written is said, not fatal."""
        self._stored = {}
        if self.path is None or self._complete:
            return
        tensors = [
            (f"{name}.{part}", DTYPES[tensor.dtype], tuple(tensor.shape), tensor.view(torch.uint8).numpy())
            for name, weight in self._packed.items()
            for part, tensor in (("data", weight.data), ("scale", weight.scale), ("bias", weight.bias))
            if tensor is not None
        ]
        try:
            write(self.path, tensors, {})
            for other in self.path.parent.glob("*.safetensors"):
                if other.stat().st_mtime < self.path.stat().st_mtime - STALE_SECONDS:
                    other.unlink(missing_ok=True)
        except OSError as error:
            log.warning("the packed weights are not kept (%s): the next start packs them again", error)

    def _restore(self, name: str, form: Form) -> PackedWeight | None:
        data, scale, bias = (self._stored.get(f"{name}.{part}") for part in ("data", "scale", "bias"))
        if data is None or (scale is None) != form.dense:
            return None
        known = [(data, form.data)]
        if scale is not None and form.scale is not None:
            known.append((scale, form.scale))
        if bias is not None:
            known.append((bias, ((padded(form.outputs, PANEL),), torch.float32)))
        if any((tensor.shape, tensor.dtype) != sizes for tensor, sizes in known):
            return None
        shape, dtype = form.data
        copy = self.arena.take(*shape, dtype=dtype)
        copy.copy_(data)
        scale, bias = (None if vector is None else vector.clone() for vector in (scale, bias))
        return PackedWeight(copy, scale, bias, form)


def packed_file(folder: Path) -> Path:
    """Where the packed weights of a checkpoint are kept."""
    known = [manifest.read(folder).id, LAYOUT]
    for file in sorted(folder.glob("model*.safetensors")):
        state = file.stat()
        known.append(f"{file.name} {state.st_size} {state.st_mtime_ns}")
    name = hashlib.sha256("\n".join(known).encode()).hexdigest()
    return default_cache() / "packed" / f"{name}.safetensors"


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, mapped; none of one that is missing or broken."""
    try:
        os.utime(path)  # it is in use
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError):
        return {}
