"""Images as they might have been, too: mirrored, moved, partly hidden; drawn from torch's generator."""

# B rows  C channels  S side

from __future__ import annotations

import torch
import torch.nn.functional as F

from steelyard.data.augmentation import Augmentation


def augmented(images: torch.Tensor, config: Augmentation) -> torch.Tensor:
    """Images `[B, C, S, S]` uint8 -> the same, each changed in its own way."""
    count, _, side, _ = images.shape
    if config.flip:
        images = torch.where(torch.rand(count, 1, 1, 1) < 0.5, images.flip(-1), images)
    places = torch.arange(side)
    if config.shift:
        room = config.shift
        wide = F.pad(images.float(), (room,) * 4, mode="replicate").to(images.dtype)
        down, right = (torch.randint(0, 2 * room + 1, (count, 1)) + places for _ in range(2))
        images = wide[torch.arange(count)[:, None, None], :, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)
    if config.erase:
        sizes = torch.randint(0, config.erase + 1, (count, 1))
        tops, lefts = (torch.randint(0, side, (count, 1)) - sizes // 2 for _ in range(2))
        rows, columns = ((places >= start) & (places < start + sizes) for start in (tops, lefts))
        grey = images.float().mean((1, 2, 3), keepdim=True).to(images.dtype)
        images = torch.where((rows[:, None, :, None] & columns[:, None, None, :]), grey, images)
    return images
