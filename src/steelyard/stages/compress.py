"""Compress a checkpoint: open it, merge its adapter, write the smaller form aside, certify, hand on what passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from steelyard.atomic import folder_aside
from steelyard.checkpoint import manifest
from steelyard.compress.inputs import dense
from steelyard.compress.method import METHODS
from steelyard.compress.prune import decoders
from steelyard.compress.prune.decoders import PruneConfig, check
from steelyard.compress.quantize import smoothing
from steelyard.data import chat
from steelyard.data.packing import Pack
from steelyard.data.rows import TokenRow
from steelyard.data.tokenize import tokenized
from steelyard.errors import CheckpointError, ConfigError, DataError
from steelyard.evaluate import certificate
from steelyard.evaluate.certificate import MAX_TOKENS, Certificate, Thresholds
from steelyard.evaluate.likelihood import packs
from steelyard.models import lora, weights
from steelyard.models.decoder import Decoder
from steelyard.models.opening import Opened, open_checkpoint

CALIBRATION = 1 << 16
"""Tokens that are enough to judge weights by."""
SMOOTHING = 1 << 14
"""Tokens that are enough to smooth activations by."""


def compress(
    source: Path,
    output: Path,
    *,
    method: str = "int8",
    portable: bool = False,
    data: Path | None = None,
    tokens: int | None = None,
    strength: float | None = None,
    thresholds: Thresholds | None = None,
    accept: bool = False,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Certificate:
    """Write the compressed form of `source` (a model, or an adapter, which is merged first) to `output`.

    Args:
        source: the checkpoint.
        output: where the compressed checkpoint will be; replaced whole or left alone.
        method: one of `METHODS`.
        portable: for int8, leave embedding and head in the base's dtype.
        data: rows, as `train` reads them, by which activations are smoothed before they are rounded.
        tokens: how many of their tokens are read, at most; `SMOOTHING` by default.
        strength: how much of what activations have much of moves into the weights, 0 to 1; a half by default.
        thresholds: what may be lost.
        accept: hand it on past a threshold.
        report: told how many blocks and golden texts are done, of how many.

    Raises:
        DataError: a row, by file and line.
        ConfigError: an unknown method, a number out of its range, or an output that is the source or no checkpoint.
        CheckpointError: the source is missing, broken or compressed already.
        FidelityError: past a threshold; nothing is written.
    """
    if method not in METHODS:
        raise ConfigError(f"compression method '{method}' is not known; known: {', '.join(METHODS)}")

    if data is None and (tokens, strength) != (None, None):
        raise ConfigError("tokens and strength are of smoothing, which needs rows: give it some (--data FILE)")
    tokens = SMOOTHING if tokens is None else tokens
    strength = smoothing.STRENGTH if strength is None else strength
    if tokens < 1 or not 0 <= strength <= 1:
        raise ConfigError(f"smoothing reads at least 1 token, not {tokens}, with a strength of 0 to 1, not {strength}")
    digests = {} if data is None else {f"calibration: {data.name}": manifest.sha256_file(data)}

    def make(opened: Opened, folder: Path) -> Decoder:
        decoder, smoothed = opened.decoder, None
        if data is not None and not dense(decoder):
            raise CheckpointError("the model is quantised already; start from its parent")
        if data is not None:
            decoder = copy.deepcopy(decoder)
            batches = _calibration(opened, data, tokens)
            smoothed = smoothing.smooth(decoder, batches, strength, head=not portable, report=report)
        METHODS[method].write(decoder, folder, opened.base, portable, smoothed)
        return opened.decoder

    smooth = {} if data is None else {"tokens": tokens, "strength": strength}
    recipe = {"method": method, "portable": portable, **smooth}
    return _certified(source, output, make, recipe, digests, thresholds, accept, report)


def prune(
    source: Path,
    output: Path,
    config: PruneConfig,
    *,
    data: Path | None = None,
    tokens: int = CALIBRATION,
    zeros: bool = False,
    thresholds: Thresholds | None = None,
    accept: bool = False,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Certificate:
    """Write `source` with weights of its linear layers set to 0 to `output`; see `compress`.

    Args:
        source: the checkpoint.
        output: where the pruned one will be.
        config: what goes.
        data: rows by which wanda and sparsegpt judge, as `train` reads them.
        tokens: how many of their tokens are read, at most.
        zeros: store zeros like other weights, for other readers.
        thresholds: what may be lost.
        accept: hand it on past a threshold.
        report: told how many blocks and golden texts are done, of how many.

    Raises:
        DataError: a row, by file and line.
        ConfigError, CheckpointError, FidelityError: as `compress` does.
    """
    check(config)
    if data is None and config.method != "magnitude":
        raise ConfigError(f"{config.method} judges weights by what they read: give it rows (--data FILE)")
    if data is not None and config.method == "magnitude":
        raise ConfigError("magnitude reads no data: leave out --data, or name another method")
    if tokens < 1:
        raise ConfigError(f"{tokens} tokens to judge by: give at least 1")
    digests = {} if data is None else {f"calibration: {data.name}": manifest.sha256_file(data)}

    def make(opened: Opened, folder: Path) -> Decoder:
        pruned = copy.deepcopy(opened.decoder)
        batches = [] if data is None else _calibration(opened, data, tokens)
        decoders.prune(pruned, config, batches, report)
        weights.save(pruned, folder, opened.base, zeros=zeros)
        return opened.decoder

    recipe = {**msgspec.to_builtins(config), **({} if data is None else {"tokens": tokens})}
    return _certified(source, output, make, recipe, digests, thresholds, accept, report)


def _calibration(opened: Opened, data: Path, tokens: int) -> list[Pack]:
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
    return list(packs(rows))


def _certified(
    source: Path,
    output: Path,
    make: Callable[[Opened, Path], Decoder],
    recipe: dict[str, Any],
    data: dict[str, str],
    thresholds: Thresholds | None,
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
            thresholds or Thresholds(),
            accept,
            parent=parent.id,
            bytes_before=dense_bytes(before),
            bytes_after=certificate.weight_bytes(folder),
        )
        certificate.demand(found)
        values: dict[str, Any] = msgspec.to_builtins(found)
        whole = {**parent.recipe, "compress": recipe}
        manifest.complete(folder, parent=parent.id, data={**parent.data, **data}, recipe=whole, certificate=values)
    return found


def dense_bytes(decoder: Decoder) -> int:
    """Bytes of a dense model's weights, shared ones counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in decoder.parameters())
