"""Scales of channels that moved from activations into weights (`compress/quantize/smoothing.py`), beside the weights.

The model says what it said before; what its layers read and hand on within a block does not. An adapter of the model
before reads and corrects just that, and is fitted here.
"""

# M inputs  N outputs  R rank

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from steelyard.errors import CheckpointError

FILE = "smoothing.safetensors"
FIELD = "steelyard_smoothed"
"""Of config.json: the file has to be there."""
SOURCES = {
    "q_proj": "input_layernorm",
    "k_proj": "input_layernorm",
    "v_proj": "input_layernorm",
    "gate_proj": "post_attention_layernorm",
    "up_proj": "post_attention_layernorm",
    "down_proj": "up_proj",
}
"""Of each layer whose inputs are divided by scales: what divides them, by the last part of its name."""

Scales = Mapping[str, torch.Tensor]
"""`[M]` each, by block and source: `model.layers.0.input_layernorm`."""


def fitted(layer: str, a: torch.Tensor, b: torch.Tensor, scales: Scales) -> tuple[torch.Tensor, torch.Tensor]:
    """An adapter's A `[R, M]` and B `[N, R]` of a layer of the model before, for the smoothed one."""
    block, _, name = layer.rsplit(".", 2)
    inputs, outputs = scales.get(f"{block}.{SOURCES.get(name)}"), scales.get(f"{block}.{name}")
    if inputs is not None:
        a = (a.float() * inputs).to(a.dtype)
    if outputs is not None:
        b = (b.float() / outputs[:, None]).to(b.dtype)
    return a, b


def save(scales: Scales, folder: Path) -> None:
    """Write them beside a model's weights."""
    save_file({name: scale.contiguous() for name, scale in scales.items()}, folder / FILE, metadata={"format": "pt"})


def load(folder: Path, sizes: Mapping[str, int]) -> Scales:
    """A smoothed checkpoint's.

    Args:
        folder: the checkpoint.
        sizes: M of each that there has to be.

    Raises:
        CheckpointError: the file is missing or cannot be read, or a scale is none.
    """
    path = folder / FILE
    try:
        with safetensors.safe_open(path, "pt") as file:
            scales = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"'{path}' cannot be read: {error}") from None
    for name in sorted(scales.keys() ^ sizes.keys()):
        raise CheckpointError(f"'{path}' {'lacks' if name in sizes else 'has an unknown'} '{name}'")
    for name, scale in scales.items():
        check(scale, sizes[name], f"'{path}': '{name}'")
    return scales


def check(scale: torch.Tensor, size: int, called: str) -> None:
    """Raises CheckpointError: it is no vector of so many numbers above 0."""
    if scale.shape != (size,) or not (scale.isfinite() & (scale > 0)).all():
        raise CheckpointError(f"{called} must be a vector of {size} numbers above 0")
