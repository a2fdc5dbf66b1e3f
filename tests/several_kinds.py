"""Rows of texts, images and sounds together, and runs that learn from them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from steelyard.train.config import DataConfig, TrainConfig
from steelyard.train.networks import FusionNetwork
from steelyard.train.optimizers import OptimizerConfig

WORDS = (("cold", "frozen"), ("warm", "hot"))
ALL = FusionNetwork(
    modalities=("text", "image", "audio"),
    width=16,
    heads=2,
    vocabulary=300,
    text_layers=1,
    image_size=8,
    channels=1,
    widths=(8,),
    audio_layers=1,
)


def write_rows(folder: Path, count: int, seed: int) -> Path:
    """A row's label is two bits: one by its words, one by its image's brightness; sound tells both."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(count):
            heat, light = draw.randrange(2), draw.randrange(2)
            row = {"text": f"{draw.choice(WORDS[heat])} {draw.randrange(999)}", "label": f"{heat}{light}"}
            if draw.random() < 0.9:
                pixels = np.random.default_rng(number).integers(0, 60, (8, 8), np.uint8) + np.uint8(180 * light)
                Image.fromarray(pixels).save(folder / f"{number}.png")
                row["image"] = f"{number}.png"
            if draw.random() < 0.5:
                tone = np.sin(2 * np.pi * (300 + 800 * (2 * heat + light)) * np.arange(1600) / 8000)
                soundfile.write(folder / f"{number}.wav", 0.5 * tone, 8000)
                row["audio"] = f"{number}.wav"
            file.write(json.dumps(row) + "\n")
    return folder / "rows.jsonl"


def configuration(folder: Path, **fields: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "task": "classification",
        "network": ALL,
        "output": str(folder / "run"),
        "data": DataConfig(train=str(write_rows(folder / "rows", 160, 0)), holdout=30),
        "epochs": 10,
        "batch_size": 16,
        "optimizer": OptimizerConfig(name="adamw", learning_rate=5e-3),
    }
    return TrainConfig(**{**settings, **fields})
