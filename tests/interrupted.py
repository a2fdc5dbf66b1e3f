"""A run that is stopped and goes on, beside one that is not: what both leave has to be the same, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from steelyard.stages.train import train
from steelyard.train.config import TrainConfig


def ends_the_same(folder: Path, configuration: Callable[[Path], TrainConfig], cuts: Sequence[int]) -> None:
    """Train by a configuration twice, each in a folder of its own; once stopped after some steps.

    Args:
        folder: gets both.
        configuration: of a run in a folder.
        cuts: the steps after which it is stopped.
    """
    results = []
    for name, stops in (("straight", ()), ("cut", tuple(cuts))):
        (folder / name).mkdir()
        config = configuration(folder / name)
        for stop in stops:
            begun: list[Any] = []
            stopped = train(
                config,
                begun=lambda trainer, counts, begun=begun: begun.append(trainer),
                report=lambda progress, stop=stop, begun=begun: setattr(begun[0], "stopping", progress.step >= stop),
            )
            assert not stopped.finished
        results.append(train(config))
    straight, cut_off = (_tensors(Path(str(done.path))) for done in results)
    assert straight.keys() == cut_off.keys()
    assert len(straight) > 0
    for name, tensor in straight.items():
        assert torch.equal(tensor, cut_off[name]), name


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of a model or an adapter, as they are in its files."""
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in safetensors.torch.load_file(file).items()
    }
