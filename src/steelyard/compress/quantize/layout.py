"""Quantised decoders as files, in the compressed-tensors layout: int8 as `int-quantized`, int4 as `pack-quantized`."""

# N outputs  M inputs

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from steelyard.checkpoint.manifest import read_json
from steelyard.compress.inputs import linears
from steelyard.compress.quantize.decoders import EMBEDDING, HEAD, Group, QuantizeConfig, check, quantize, settled
from steelyard.compress.quantize.grid import Integers
from steelyard.data.packing import Pack
from steelyard.models import quantized as layers
from steelyard.models import smoothing, sparse, weights
from steelyard.models.decoder import Decoder
from steelyard.models.linear import packed_halves

FORMATS = {8: "int-quantized", 4: "pack-quantized"}


def write(
    decoder: Decoder,
    folder: Path,
    parent: Path,
    config: QuantizeConfig = QuantizeConfig(),  # noqa: B008
    batches: Sequence[Pack] = (),
    report: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Write the quantised form of a decoder into `folder`, with the tokenizer and configuration of `parent`.

    Args:
        decoder: dense; stays as it is.
        folder: exists and is empty.
        parent: folder of the model that it was loaded from.
        config: how.
        batches: calibration data, where the method wants them.
        report: told how many blocks are done, of how many.

    Raises:
        ConfigError, CheckpointError: see `decoders.quantize`.
    """
    check(config, decoder)
    config = settled(config, decoder)
    changed = copy.deepcopy(decoder)
    found = quantize(changed, config, batches, report)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in changed.named_parameters():
        path = name.removesuffix(".weight")
        if path in found.integers:
            bits = 8 if path in (EMBEDDING, HEAD) else config.bits_of(path)
            tensors |= {f"{path}.{leaf}": tensor for leaf, tensor in stored(found.integers[path], bits).items()}
        else:
            tensors[name] = parameter.detach().contiguous()
    if found.smoothed is not None:
        smoothing.save(found.smoothed.scales, folder)
        if found.smoothed.columns is not None:
            tensors[f"{EMBEDDING}.{layers.COLUMNS}"] = found.smoothed.columns
    save_file(
        tensors if config.portable else sparse.stored(tensors), folder / weights.WEIGHTS, metadata={"format": "pt"}
    )
    weights.copy_companions(parent, folder)
    values = read_json(parent / "config.json")
    paths = [path for path in linears(decoder) if path != HEAD]
    values["quantization_config"] = quantization_config(config, paths)
    if found.smoothed is not None:
        values[smoothing.FIELD] = True
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def stored(found: Integers, bits: int) -> dict[str, torch.Tensor]:
    """A layer's tensors, by the last part of their names."""
    if bits == 8:
        return {"weight": found.values, "weight_scale": found.scale}
    return {
        layers.PACKED: packed_halves(found.values),
        "weight_scale": found.scale,
        layers.SHAPE: torch.tensor(found.values.shape),
    }


def quantization_config(config: QuantizeConfig, paths: Sequence[str] = ()) -> dict[str, Any]:
    """`quantization_config` of `config.json`.

    Args:
        config: how.
        paths: of the decoder's linear layers.
    """
    whole = {"type": "int", "symmetric": True}
    grouped = [path for path in paths if config.group_layers and config.group_of(path) is not None]
    most = None if grouped else config.group
    linear: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": {**whole, "num_bits": config.bits, **by_weight(most)},
        "input_activations": None if config.portable and config.bits == 4 else activations(most),
    }
    groups = {"group_0": linear}
    form = FORMATS[config.bits]
    bytes_ = {**whole, "num_bits": 8, **by_weight(most)}
    if grouped:
        by_group = {"weights": {**bytes_, **by_weight(config.group)}, "input_activations": activations(config.group)}
        groups["group_3"] = {**linear, **by_group, "targets": grouped}
    eight = [path for path in paths if config.bits_of(path) != config.bits]
    if eight:
        # Readers ask for a layer's name before they ask for its class.
        form, linear["format"] = "mixed-precision", FORMATS[4]
        groups["group_3"] = {**linear, "targets": eight, "weights": bytes_, "format": FORMATS[8]}
        if config.portable:
            by_channel = {
                "weights": {**whole, "num_bits": 8, **by_weight(None)},
                "input_activations": activations(None),
            }
            groups["group_3"] |= by_channel
    if not config.portable:
        groups["group_1"] = {"targets": ["Embedding"], "weights": bytes_}
        if config.bits == 4:
            form = "mixed-precision"
            linear["format"] = FORMATS[4]
            groups["group_1"]["format"] = FORMATS[8]
            groups["group_2"] = {
                "targets": [HEAD],
                "weights": bytes_,
                "input_activations": activations(config.group),
                "format": FORMATS[8],
            }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [HEAD] if config.portable else [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def by_weight(group: Group) -> dict[str, Any]:
    """How weights share scales."""
    return {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}


def activations(group: Group) -> dict[str, Any]:
    """How activations are rounded."""
    shared = {"strategy": "token"} if group is None else {"strategy": "group", "group_size": group}
    return {"type": "int", "symmetric": True, "num_bits": 8, **shared, "dynamic": True}
