"""Train by a configuration: read and split the data, open the base, fit, and leave best, last and a report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from steelyard import memory
from steelyard.atomic import write_file
from steelyard.checkpoint import manifest
from steelyard.checkpoint.sources import resolve
from steelyard.data import chat
from steelyard.data.rows import Conversation, TokenRow, token_counts
from steelyard.data.split import remove_duplicates, split
from steelyard.data.tokenize import tokenize
from steelyard.errors import ConfigError, DataError
from steelyard.evaluate import classification
from steelyard.evaluate.likelihood import negative_log_likelihood
from steelyard.models import weights
from steelyard.models.decoder import Decoder
from steelyard.models.lora import Adapter
from steelyard.runs import Run, clear
from steelyard.text.chat_template import ChatTemplate
from steelyard.text.tokenizer import Tokenizer
from steelyard.train import choice, lora
from steelyard.train.config import TrainConfig, check
from steelyard.train.language_model import Evaluator, LanguageModelling
from steelyard.train.report import training_report
from steelyard.train.trainer import Lineage, Progress, Trainer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


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
    base = resolve(config.model)
    config, learnt, validation = _conversations(config)
    output = Path(config.output)
    if fresh:
        clear(output)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    tokenizer, template = Tokenizer.load(base), ChatTemplate.load(base)
    rows = tokenize(learnt, tokenizer, template, config.data.max_length, config.data.too_long)
    validation_rows = tokenize(validation, tokenizer, template, config.data.max_length, config.data.too_long)
    run = Run(output, msgspec.to_builtins(config))
    try:
        decoder = weights.load(base, DTYPES[config.dtype])
        _check_dense(decoder)
        adapter = lora.start(decoder, config.lora, config.seed) if config.method == "lora" else None
        evaluator = _evaluator(validation_rows, validation, config, tokenizer, template)
        task = LanguageModelling(decoder, adapter, rows, base.resolve(), evaluator)
        config = _decided(config, task, run)
        lineage = Lineage(parent=manifest.read(base).id, data=_digests(config))
        trainer = Trainer(task, config, run, lineage)
        counts = {**token_counts(rows), "validation_rows": len(validation_rows)}
        run.log(f"data: {counts}")
        begun(trainer, counts)
        finished = trainer.fit(report)
        page = output / "report.html"
        write_file(page, training_report(config, run.metrics(), counts).html())
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
        data=counts,
        metrics=found.metrics if found else {},
        report=str(page),
    )


def _decided(config: TrainConfig, task: LanguageModelling, run: Run) -> TrainConfig:
    """With an optimizer, where it was left to us; why it is this one stands in the run's log."""
    if config.optimizer.name != choice.AUTO:
        return config
    batches = -(-task.rows // (config.batch_size or task.rows))
    situation = choice.Situation.of(
        task.parameters,
        adapter=task.adapter is not None,
        pretrained=True,
        steps=config.epochs * batches,
        whole=batches == 1,
        memory=memory.total(),
    )
    optimizer, why = choice.choose(config.optimizer, situation)
    run.log(f"optimizer: {why}")
    return msgspec.structs.replace(config, optimizer=optimizer)


def _check_dense(decoder: Decoder) -> None:
    if any(not tensor.is_floating_point() for tensor in decoder.buffers()):
        raise ConfigError("a quantised model cannot be trained, no gradient passes its rounding: take its parent")


def _conversations(config: TrainConfig) -> tuple[TrainConfig, list[Conversation], list[Conversation]]:
    """The rows to learn from and to validate on; and the configuration with the data's labels spelt out, so that the
    validation file is asked the same question, and the checkpoint knows what it can answer.
    """
    rows = chat.read(Path(config.data.train), config.data)
    data = config.data
    if rows[0].label is not None and not data.labels:
        data = msgspec.structs.replace(data, labels=classification.labels_of(rows))
        config = msgspec.structs.replace(config, data=data)
    if data.deduplicate:
        rows = remove_duplicates(rows)
    if data.validation is None:
        return (config, *split(rows, data.holdout, config.seed))
    if data.holdout:
        raise ConfigError("data.holdout and data.validation exclude each other: leave one out")
    held = chat.read(Path(data.validation), data)
    learnt = {row.prompt_key: row for row in rows}
    for row in held:
        if row.prompt_key in learnt:
            twin = learnt[row.prompt_key]
            reason = f"the same text is in the training file, line {twin.line}: the validation would be too kind"
            raise DataError(reason, file=row.file, line=row.line)
    return config, rows, held


def _evaluator(
    rows: list[TokenRow],
    conversations: list[Conversation],
    config: TrainConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
) -> Evaluator | None:
    """Validation loss, and for labelled rows accuracy and Matthews correlation."""
    if not rows:
        return None
    labels = config.data.labels if conversations[0].label is not None else ()
    asked = classification.questions(conversations, labels, tokenizer, template) if labels else []
    truth = [labels.index(str(conversation.label)) for conversation in conversations] if labels else []

    def measure(decoder: Decoder, adapter: Adapter | None) -> dict[str, float]:
        nats, tokens = negative_log_likelihood(decoder, adapter, rows)
        found = {"validation_loss": nats / tokens}
        if asked:
            predicted = classification.score(decoder, adapter, asked).argmax(1).tolist()
            counts = classification.confusion(truth, predicted, len(labels))
            found["validation_accuracy"] = classification.accuracy(counts)
            found["validation_mcc"] = classification.matthews(counts)
        return found

    return measure


def _digests(config: TrainConfig) -> dict[str, str]:
    files = [Path(config.data.train)] + ([Path(config.data.validation)] if config.data.validation else [])
    return {path.name: manifest.sha256_file(path) for path in files}
