"""What networks that read images share: their sizes, and pixels as numbers around zero."""

# B rows  C channels  S side

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
import torch

from steelyard.errors import CheckpointError

MAX_SIDE = 2048


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an image network reads."""

    image_size: int
    """Pixels of a side."""
    num_channels: int = 3
    """1: grey. 3: red, green, blue."""
    image_mean: tuple[float, ...] = (0.5,)
    """Of each channel, or of all, where white is 1."""
    image_std: tuple[float, ...] = (0.5,)
    classes: int = 0
    """0: no classifier."""


T = TypeVar("T", bound=ImageConfig)


def parse(raw: Mapping[str, Any], classes: int, kind: type[T]) -> T:
    """Read a `config.json`'s fields.

    Raises:
        CheckpointError: one that is missing, out of range or not known here.
    """
    try:
        known = {name: raw[name] for name in kind.__struct_fields__ if name in raw and name != "classes"}
        config = msgspec.convert({**known, "classes": classes}, kind)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"config.json: {error}") from None
    if not 1 <= config.image_size <= MAX_SIDE or config.num_channels not in (1, 3):
        raise CheckpointError(f"config.json: image_size must be 1 to {MAX_SIDE}, num_channels 1 or 3")
    for values in (config.image_mean, config.image_std):
        if len(values) not in (1, config.num_channels):
            raise CheckpointError("config.json: image_mean and image_std must have a number for each channel, or one")
    if min(config.image_std) <= 0:
        raise CheckpointError("config.json: image_std must be above 0")
    return config


def normalised(images: torch.Tensor, config: ImageConfig, dtype: torch.dtype) -> torch.Tensor:
    """Images `[B, C, S, S]` uint8 -> the same as numbers around 0, as the configuration says."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
    return ((images.float() / 255 - mean) / std).to(dtype)
