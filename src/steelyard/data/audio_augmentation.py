"""Sound as it might have been, too: faster or slower, partly unheard. Drawn from torch's generator."""

# M mel bands  F frames

from __future__ import annotations

import torch
import torch.nn.functional as F

from steelyard.data.augmentation import Augmentation

MASKS = 2
"""Of each kind (Park et al. 2019, section 2)."""


def augmented(features: torch.Tensor, config: Augmentation, longest: int) -> torch.Tensor:
    """Log-mel features `[M, F]` -> the same, changed: their number of frames, too, up to the `longest`."""
    if config.tempo:
        factor = 1 + config.tempo * (2 * float(torch.rand(())) - 1)
        frames = min(longest, max(8, round(features.shape[-1] / factor)))
        features = F.interpolate(features[None], frames, mode="linear")[0]
    bands, frames = features.shape
    mean = features.mean()
    for most, total, axis in ((config.mask_bands, bands, 0), (min(config.mask_frames, frames // 4), frames, 1)):
        for _ in range(MASKS if most else 0):
            width = int(torch.randint(0, most + 1, ()))
            start = int(torch.randint(0, max(1, total - width), ()))
            features = features.clone()
            features.narrow(axis, start, width).fill_(mean)
    return features
