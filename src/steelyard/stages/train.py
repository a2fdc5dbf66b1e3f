"""Train by a configuration: read and split the data, open the base, fit, and leave best, last and a report."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from steelyard import memory
from steelyard.atomic import write_file
from steelyard.checkpoint import manifest
from steelyard.checkpoint.sources import resolve
from steelyard.compress.quantize.aware import Rounding
from steelyard.data import augmentation
from steelyard.errors import ConfigError
from steelyard.models.classifiers import reads_images
from steelyard.runs import Run, clear
from steelyard.stages.tasks import (
    classifier,
    encoder,
    fusion,
    image_classifier,
    language_model,
    preference,
    tagger,
    transcriber,
)
from steelyard.stages.tasks.prepared import Prepared
from steelyard.train import choice, demand
from steelyard.train.config import OF_IMAGES, OF_LABELLED_TEXTS, OF_TEXTS, DataConfig, TrainConfig, check, refuse
from steelyard.train.networks import IMAGES, DecoderNetwork, FusionNetwork
from steelyard.train.report import training_report
from steelyard.train.trainer import Lineage, Progress, Trainer


def _classifier(config: TrainConfig) -> Prepared:
    """Of what the network reads, or the one that it begins from."""
    if isinstance(config.network, FusionNetwork):
        refuse(config, OF_LABELLED_TEXTS, "a classifier of several modalities")
        return fusion.prepare(config)
    seen = isinstance(config.network, IMAGES) or (config.model is not None and reads_images(resolve(config.model)))
    augmentation.check(config.augment, augmentation.IMAGE if seen else ())
    refuse(config, OF_IMAGES if seen else OF_TEXTS, f"a classifier of {'images' if seen else 'texts'}")
    return image_classifier.prepare(config) if seen else classifier.prepare(config)


TASKS: dict[str, Callable[[TrainConfig], Prepared]] = {
    "generation": language_model.prepare,
    "classification": _classifier,
    "tagging": tagger.prepare,
    "masked": encoder.prepare_masked,
    "contrastive": encoder.prepare_contrastive,
    "transcription": transcriber.prepare,
    "preference": preference.prepare,
}


class Trained(msgspec.Struct, frozen=True, kw_only=True):
    """What a run left behind."""

    run: str
    path: str | None
    """The best checkpoint by validation loss; without validation, the last. None before the first evaluation."""
    id: str | None
    steps: int
    learnt: int
    """Steps of this call; 0 if the run had been finished before."""
    finished: bool
    """False if it was interrupted: the same command goes on."""
    data: dict[str, int]
    """Rows, tokens, trained tokens, longest row."""
    metrics: dict[str, Any]
    report: str


def train(
    config: TrainConfig,
    *,
    fresh: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    begun: Callable[[Trainer, dict[str, int]], None] = lambda trainer, counts: None,
) -> Trained:
    """Run a configuration to its end, going on where an earlier call was cut off.

    Args:
        config: the run.
        fresh: throw away what an earlier call left in the output folder.
        report: told after every step.
        begun: given the trainer and the data's counts before the first step; may set `trainer.stopping` later.

    Raises:
        ConfigError: a setting; the key is named.
        DataError: a row; file, line and field are named.
        CheckpointError: the base model.
        TrainingError: the run cannot go on.
    """
    check(config)
    config = settled(config)
    prepared = TASKS[config.task](config)
    output = Path(config.output)
    if fresh:
        clear(output)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    defaults = msgspec.to_builtins(TrainConfig(output="", data=DataConfig(train="")))
    run = Run(output, msgspec.to_builtins(prepared.config), defaults)
    try:
        task = prepared.build(run)
        config = decided(prepared, task.parameters, task.rows, run)
        wanted = demand.measure(task, config)
        run.log(f"memory: about {wanted.bytes / 1e9:.2f} GB besides the network's {_size(task.parameters) / 1e9:.2f}")
        demand.demand_room(wanted, memory.available(), config)
        lineage = Lineage(parent=prepared.parent, data=prepared.digests)
        trainer = Trainer(task, config, run, lineage, _rounding(config, task.parameters))
        run.log(f"data: {prepared.counts}")
        begun(trainer, prepared.counts)
        finished = trainer.fit(report)
        if finished:
            shutil.rmtree(output / "prepared", ignore_errors=True)  # made again if it is wanted again
        page = output / "report.html"
        write_file(page, training_report(config, run.metrics(), prepared.counts).html())
    finally:
        run.close()
    path = output / ("best" if (output / "best").is_dir() else "last")
    found = manifest.read(path) if path.is_dir() else None  # none before the first evaluation
    return Trained(
        run=str(output),
        path=str(path) if found else None,
        id=found.id if found else None,
        steps=trainer.step,
        learnt=trainer.step - trainer.first,
        finished=finished,
        data=prepared.counts,
        metrics=found.metrics if found else {},
        report=str(page),
    )


def _rounding(config: TrainConfig, parameters: dict[str, torch.Tensor]) -> Rounding | None:
    """What rounds the weights for the forward pass. Raises ConfigError: groups that do not divide them."""
    asked = config.rounding
    if not asked.bits:
        return None
    for name, parameter in parameters.items():
        if name.endswith("_proj.weight") and parameter.shape[1] % (asked.group or 1):
            raise ConfigError(
                f"rounding.group {asked.group} does not divide the {parameter.shape[1]} inputs of '{name}'"
            )
    return Rounding(parameters, asked.bits, asked.group)


def _size(parameters: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in parameters.values())


def settled(config: TrainConfig) -> TrainConfig:
    """With what follows from what the run begins from."""
    plain = config.network is not None and not isinstance(config.network, DecoderNetwork)
    if config.dtype == "auto":
        config = msgspec.structs.replace(config, dtype="float32" if plain else "bfloat16")
    if isinstance(config.network, DecoderNetwork):  # there is no base for an adapter
        config = msgspec.structs.replace(config, method="full")
    return config


def decided(prepared: Prepared, parameters: dict[str, torch.Tensor], rows: int, run: Run) -> TrainConfig:
    """With an optimizer, where it was left to us; why it is this one stands in the run's log."""
    config = prepared.config
    if config.optimizer.name != choice.AUTO:
        return config
    batches = -(-rows // (config.batch_size or rows))
    situation = choice.Situation.of(
        parameters,
        adapter=config.task in ("generation", "preference") and config.method == "lora",
        pretrained=prepared.parent is not None,
        steps=config.epochs * batches,
        whole=batches == 1,
        memory=memory.total(),
    )
    optimizer, why = choice.choose(config.optimizer, situation)
    run.log(f"optimizer: {why}")
    return msgspec.structs.replace(config, optimizer=optimizer)
