"""A learning rate for a configuration, before its run: the trial, and a page that shows it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from steelyard.atomic import write_file
from steelyard.report import Report
from steelyard.runs import Run
from steelyard.stages import train as stage
from steelyard.train import rate_finder
from steelyard.train.config import TrainConfig, check
from steelyard.train.trainer import Lineage, Trainer


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    learning_rate: float
    steps: int
    report: str


def find(config: TrainConfig, *, steps: int = 100, report: Callable[[int, int], None] = lambda done, of: None) -> Rate:
    """Try rising learning rates on a configuration's task; its run's folder is left alone.

    The page goes beside it, as `OUTPUT.rate.html`. Raises as `stages.train.train` does.
    """
    check(config)
    config = stage.settled(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    prepared = stage.TASKS[config.task](config)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), {})
        try:
            task = prepared.build(run)
            config = stage.decided(prepared, task.parameters, task.rows, run)
            trainer = Trainer(task, config, run, Lineage(parent=prepared.parent, data={}))
            found = rate_finder.find(trainer, steps, report)
        finally:
            run.close()
    page = Report(f"Learning rate for {config.output}")
    page.text(
        f"Suggested: {found.suggestion:g}, with {config.optimizer.name}. The rate rose at every step; where the loss "
        "falls fastest is a good one, where it is least is too high already."
    )
    page.lines(
        "Loss at each rate", {"loss": (found.rates, found.losses)}, "learning rate", "nats, smoothed", log_x=True
    )
    path = Path(f"{config.output}.rate.html")
    write_file(path, page.html())
    return Rate(learning_rate=found.suggestion, steps=len(found.rates), report=str(path))
