"""Compress a checkpoint: open it, merge its adapter, write the smaller form aside, certify, hand on what passes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from steelyard.atomic import folder_aside
from steelyard.checkpoint import manifest
from steelyard.compress import sensitivity
from steelyard.compress.inputs import dense
from steelyard.compress.prune import decoders as pruning
from steelyard.compress.prune import structured
from steelyard.compress.prune.decoders import PruneConfig
from steelyard.compress.quantize import decoders, layout
from steelyard.compress.quantize.decoders import QuantizeConfig, check
from steelyard.data import chat
from steelyard.data.packing import Pack
from steelyard.data.rows import TokenRow
from steelyard.data.tokenize import tokenized
from steelyard.errors import CheckpointError, ConfigError, DataError
from steelyard.evaluate import certificate
from steelyard.evaluate.answers import AnswersCertificate
from steelyard.evaluate.certificate import MAX_TOKENS, Certificate, Thresholds
from steelyard.evaluate.likelihood import packs
from steelyard.models import config as decoder_config
from steelyard.models import lora, weights
from steelyard.models.decoder import Decoder
from steelyard.models.opening import Opened, open_checkpoint
from steelyard.stages import compress_networks
from steelyard.stages.certify import task_deltas

CALIBRATION = 1 << 16
"""Tokens that are enough to judge weights by."""
SMOOTHING = 1 << 14
"""Tokens that are enough to smooth activations by."""


def smooths(source: Path) -> bool:
    """Whether `source` is a decoder, or an adapter of one, that SmoothQuant and AWQ can take."""
    if compress_networks.is_network(source):
        return False
    return decoders.smooths(decoder_config.load(manifest.base_of(source)))


def quantize(
    source: Path,
    output: Path,
    config: QuantizeConfig = QuantizeConfig(),  # noqa: B008
    *,
    data: Path | None = None,
    tokens: int | None = None,
    tasks: Sequence[Path] = (),
    thresholds: Thresholds | None = None,
    accept: bool = False,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Certificate | AnswersCertificate:
    """Write the quantised form of `source` (a model of any kind, or an adapter, which is merged first) to `output`.

    Args:
        source: the checkpoint.
        output: where the quantised checkpoint will be; replaced whole or left alone.
        config: how.
        data: rows to judge by, as `train` reads them; all methods but nearest need them.
        tokens: how many of their tokens are read, at most; `SMOOTHING` by default.
        tasks: rows of tasks that decoders are judged on besides; see `certify.task_deltas`.
        thresholds: what may be lost.
        accept: hand it on past a threshold.
        report: told how many blocks and golden texts are done, of how many.

    Raises:
        DataError: a row, by file and line.
        ConfigError: a number out of its range, settings that do not go together or do not fit the model, or an output
            that is the source or no checkpoint.
        CheckpointError: the source is missing, broken or compressed already.
        FidelityError: past a threshold; nothing is written.
    """
    thresholds = thresholds or Thresholds()
    if data is None and config.method != "nearest":
        raise ConfigError(f"{config.method} judges by what layers read: give it rows (--data FILE)")
    if data is None and tokens is not None:
        raise ConfigError("tokens are those of rows: give it some (--data FILE)")
    if compress_networks.is_network(source):
        _refuse_of_decoders(tokens, tasks)
        agreement = thresholds.agreement
        return compress_networks.quantize(
            source, output, config, data, least_agreement=agreement, accept=accept, report=report
        )
    if data is not None and config.method == "nearest":
        raise ConfigError("nearest reads no data: leave out --data, or name another method")
    tokens = SMOOTHING if tokens is None else tokens
    if tokens < 1:
        raise ConfigError(f"{tokens} tokens to judge by: give at least 1")
    digests = {} if data is None else {f"calibration: {data.name}": manifest.sha256_file(data)}

    def make(opened: Opened, folder: Path) -> Decoder:
        check(config, opened.decoder)
        batches = [] if data is None else _calibration(opened, data, tokens)
        layout.write(opened.decoder, folder, opened.base, config, batches, report)
        return opened.decoder

    recipe = {**msgspec.to_builtins(config), **({} if data is None else {"tokens": tokens})}
    return _certified(source, output, make, recipe, digests, tasks, thresholds, accept, report)


def prune(
    source: Path,
    output: Path,
    config: PruneConfig,
    *,
    data: Path | None = None,
    tokens: int | None = None,
    tasks: Sequence[Path] = (),
    zeros: bool = False,
    thresholds: Thresholds | None = None,
    accept: bool = False,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Certificate | AnswersCertificate:
    """Write `source` with weights of its linear layers set to 0 to `output`; see `compress`.

    Args:
        source: the checkpoint.
        output: where the pruned one will be.
        config: what goes.
        data: rows by which wanda and sparsegpt judge, as `train` reads them.
        tokens: how many of their tokens are read, at most; `CALIBRATION` by default.
        zeros: store zeros like other weights, for other readers.
        tasks: rows of tasks that decoders are judged on besides; see `certify.task_deltas`.
        thresholds: what may be lost.
        accept: hand it on past a threshold.
        report: told how many blocks and golden texts are done, of how many.

    Raises:
        DataError: a row, by file and line.
        ConfigError, CheckpointError, FidelityError: as `compress` does.
    """
    pruning.check(config)
    thresholds = thresholds or Thresholds()
    if data is None and config.method not in ("magnitude", "even"):
        raise ConfigError(f"{config.method} judges weights by what they read: give it rows (--data FILE)")
    if compress_networks.is_network(source):
        _refuse_of_decoders(tokens, tasks)
        agreement = thresholds.agreement
        return compress_networks.prune(
            source, output, config, data, zeros=zeros, least_agreement=agreement, accept=accept, report=report
        )
    if data is not None and config.method in ("magnitude", "even"):
        raise ConfigError(f"{config.method} reads no data: leave out --data, or name another method")
    tokens = CALIBRATION if tokens is None else tokens
    if tokens < 1:
        raise ConfigError(f"{tokens} tokens to judge by: give at least 1")
    digests = {} if data is None else {f"calibration: {data.name}": manifest.sha256_file(data)}

    def make(opened: Opened, folder: Path) -> Decoder:
        if config.structure is not None:
            _cut(opened, config, [] if data is None else _calibration(opened, data, tokens), folder)
            return opened.decoder
        pruned = copy.deepcopy(opened.decoder)
        batches = [] if data is None else _calibration(opened, data, tokens)
        pruning.prune(pruned, config, batches, report)
        weights.save(pruned, folder, opened.base, zeros=zeros)
        return opened.decoder

    recipe = {**msgspec.to_builtins(config), **({} if data is None else {"tokens": tokens})}
    return _certified(source, output, make, recipe, digests, tasks, thresholds, accept, report)


def _refuse_of_decoders(tokens: int | None, tasks: Sequence[Path]) -> None:
    if tasks:
        raise ConfigError("rows of tasks are a decoder's: other networks are compared on --data")
    if tokens is not None:
        raise ConfigError("tokens are a decoder's: other networks read all rows, give fewer of them")


def _cut(opened: Opened, config: PruneConfig, batches: list[Pack], folder: Path) -> None:
    """Write what is left of a decoder without the parts of it that matter least."""
    if not dense(opened.decoder):
        raise CheckpointError("the model is quantised already; prune its parent")
    assert config.structure is not None
    rate = pruning.STRUCTURED_RATE if config.rate is None else config.rate
    if config.method == "even":
        layers = opened.decoder.config.layers
        found = structured.even(layers, round(layers * (1 - rate)))
    elif config.method == "divergence":
        # All distributions are held in memory: those of one pack.
        found = torch.tensor(sensitivity.of_blocks(copy.deepcopy(opened.decoder).float(), batches[:1]))
    else:
        judge: structured.Importance = "gradient" if config.method == "gradient" else "activation"
        found = structured.scores(opened.decoder, config.structure, judge, batches)
    smaller, fields = structured.cut(opened.decoder, config.structure, rate, found)
    weights.save(smaller, folder, opened.base)
    values = {**manifest.read_json(folder / "config.json"), **fields}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def _calibration(opened: Opened, data: Path, tokens: int) -> list[Pack]:
    return list(packs(token_rows(opened, data, tokens)))


def token_rows(opened: Opened, data: Path, tokens: int) -> list[TokenRow]:
    """The first `tokens` tokens of a file's rows, or a few more; a long text in parts, a long conversation cut off.

    Raises:
        DataError: a row, by file and line; or none has tokens.
    """
    rows: list[TokenRow] = []
    size = 0
    longest = min(MAX_TOKENS, opened.decoder.config.context)
    for row in tokenized(chat.iterate(data), opened.tokenizer, opened.template, longest, "truncate"):
        rows.append(row)
        size += len(row.tokens)
        if size >= tokens:
            break
    if not rows:
        raise DataError("none of its rows has tokens to judge by", file=data)
    return rows


def _certified(
    source: Path,
    output: Path,
    make: Callable[[Opened, Path], Decoder],
    recipe: dict[str, Any],
    data: dict[str, str],
    tasks: Sequence[Path],
    thresholds: Thresholds,
    accept: bool,
    report: Callable[[int, int], None],
) -> Certificate:
    """What `make` writes into a folder, measured against the decoder that it returns; at `output` if it passes."""
    manifest.check_output(output, source, manifest.base_of(source))
    opened = open_checkpoint(source)
    parent = manifest.read(source)
    if opened.adapter is not None:
        lora.merge(opened.decoder, opened.adapter)
    with folder_aside(output) as folder:
        before = make(opened, folder)
        measured = certificate.compare(before, weights.load(folder), opened.tokenizer, report)
        found = certificate.judge(
            measured,
            thresholds,
            accept,
            parent=parent.id,
            tasks=task_deltas(source, folder, tasks),
            bytes_before=certificate.dense_bytes(before),
            bytes_after=certificate.weight_bytes(folder),
        )
        certificate.demand(found)
        values: dict[str, Any] = msgspec.to_builtins(found)
        whole = {**parent.recipe, "compress": recipe}
        manifest.complete(folder, parent=parent.id, data={**parent.data, **data}, recipe=whole, certificate=values)
    return found
