"""Compress a checkpoint: open it, merge its adapter, write the smaller form aside, certify, hand on what passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from steelyard.atomic import folder_aside
from steelyard.checkpoint import manifest
from steelyard.compress.method import METHODS
from steelyard.errors import ConfigError
from steelyard.evaluate import certificate
from steelyard.evaluate.certificate import Certificate, Thresholds
from steelyard.models import lora, weights
from steelyard.models.decoder import Decoder
from steelyard.models.opening import open_checkpoint


def compress(
    source: Path,
    output: Path,
    *,
    method: str = "int8",
    portable: bool = False,
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
        thresholds: what may be lost.
        accept: hand it on past a threshold.
        report: told how many golden texts are done, of how many.

    Raises:
        ConfigError: an unknown method, or an output that is the source or no checkpoint.
        CheckpointError: the source is missing, broken or compressed already.
        FidelityError: past a threshold; nothing is written.
    """
    if method not in METHODS:
        raise ConfigError(f"compression method '{method}' is not known; known: {', '.join(METHODS)}")
    manifest.check_output(output, source, manifest.base_of(source))
    opened = open_checkpoint(source)
    parent = manifest.read(source)
    if opened.adapter is not None:
        lora.merge(opened.decoder, opened.adapter)
    with folder_aside(output) as folder:
        METHODS[method].write(opened.decoder, folder, opened.base, portable)
        measured = certificate.compare(opened.decoder, weights.load(folder), opened.tokenizer, report)
        found = certificate.judge(
            measured,
            thresholds or Thresholds(),
            accept,
            parent=parent.id,
            bytes_before=dense_bytes(opened.decoder),
            bytes_after=certificate.weight_bytes(folder),
        )
        certificate.demand(found)
        recipe = {**parent.recipe, "compress": {"method": method, "portable": portable}}
        values: dict[str, Any] = msgspec.to_builtins(found)
        manifest.complete(folder, parent=parent.id, data=parent.data, recipe=recipe, certificate=values)
    return found


def dense_bytes(decoder: Decoder) -> int:
    """Bytes of a dense model's weights, shared ones counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in decoder.parameters())
