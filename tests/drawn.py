"""Images of lines and spots, and runs that learn to tell them apart."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from steelyard.train.config import DataConfig, TrainConfig
from steelyard.train.networks import ConvNetwork, VitNetwork
from steelyard.train.optimizers import OptimizerConfig

CONV = ConvNetwork(image_size=12, channels=1, widths=(8, 16), blocks=1)
VIT = VitNetwork(image_size=12, channels=1, patch=3, hidden=32, layers=2, heads=2, dropout=0.0)


def draw(folder: Path, count: int, seed: int, labels: tuple[str, ...] = ("lines", "spots")) -> Path:
    """Images of flat lines and of spots, somewhere."""
    chance = random.Random(seed)
    for number in range(count):
        label = labels[number % len(labels)]
        image = Image.new("L", (16, 16), chance.randrange(60))
        pen = ImageDraw.Draw(image)
        x, y = chance.randrange(1, 9), chance.randrange(1, 13)
        if label == "lines":
            pen.line((x, y, x + 6, y), 200 + chance.randrange(50), 2)
        else:
            pen.ellipse((x, min(y, 9), x + 5, min(y, 9) + 5), 200 + chance.randrange(50))
        place = folder / label / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        image.save(place)
    return folder


def configuration(folder: Path, **fields: Any) -> TrainConfig:
    rows = folder / "images"
    if not rows.is_dir():
        draw(rows, 120, 0)
    settings: dict[str, Any] = {
        "task": "classification",
        "network": CONV,
        "output": str(folder / "run"),
        "data": DataConfig(train=str(rows), holdout=30),
        "epochs": 8,
        "batch_size": 16,
        "optimizer": OptimizerConfig(name="adamw", learning_rate=5e-3),
        **fields,
    }
    return TrainConfig(**settings)
