"""A residual convolutional classifier (He et al. 2016), with group normalisation (Wu and He 2018).

Groups instead of batches: a row's result depends on no other row, in training as in use, so how a batch is cut into
forward passes changes nothing but rounding, and there are no running statistics to keep.
"""

# B rows  C channels  S side  K classes

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from steelyard.kernels.training import group_norm
from steelyard.models.dropout import Dropout
from steelyard.models.images import ImageConfig, normalised

GROUP = 8
"""Channels of a group, at most."""
EPSILON = 1e-5


class ConvNetConfig(ImageConfig, frozen=True, kw_only=True):
    """Sizes of the network."""

    widths: tuple[int, ...] = (32, 64, 128)
    """Channels of each stage; every stage after the first halves the image."""
    blocks: int = 2
    """Residual blocks of a stage."""
    dropout: float = 0.1
    """Of what the last layer reads, while it is trained."""


class _Norm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = channels // GROUP if channels % GROUP == 0 else 1
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor, relu: bool = False) -> torch.Tensor:
        return group_norm(x, self.weight, self.bias, self.groups, EPSILON, relu=relu)


class _Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = _Norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = _Norm(outputs)
        nn.init.zeros_(self.norm2.weight)  # a block begins as its shortcut (Goyal et al. 2017)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.norm1(self.conv1(x), relu=True)
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class ConvNet(nn.Module):
    """See the module."""

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(config.num_channels, config.widths[0], 3, padding=1, bias=False)
        self.norm = _Norm(config.widths[0])
        layers: list[nn.Module] = []
        inputs = config.widths[0]
        for stage, width in enumerate(config.widths):
            for block in range(config.blocks):
                layers.append(_Block(inputs, width, 2 if stage and not block else 1))
                inputs = width
        self.blocks = nn.Sequential(*layers)
        self.dropout = Dropout(config.dropout)
        self.classifier = nn.Linear(inputs, config.classes)

    def places(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[B, C, S, S]` uint8 -> what was seen where: `[B, last width, s, s]`."""
        x = normalised(images, self.config, self.stem.weight.dtype)
        seen: torch.Tensor = self.blocks(self.norm(self.stem(x), relu=True))
        return seen

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[B, C, S, S]` uint8 -> what was seen in them, the mean over all places: `[B, last width]`."""
        return self.places(images).mean((2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[B, C, S, S]` uint8 -> logits `[B, K]`."""
        logits: torch.Tensor = self.classifier(self.dropout(self.features(images)))
        return logits
