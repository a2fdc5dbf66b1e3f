"""int8: weights symmetric per output channel, activations symmetric per token when the layer runs.

Written in the compressed-tensors layout. Embedding and head are rows like any other; `portable` leaves them in the
base's dtype for readers that cannot look up an int8 embedding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from steelyard.checkpoint.manifest import read_json
from steelyard.compress.quantize.smoothing import Smoothed
from steelyard.errors import CheckpointError
from steelyard.kernels.reference import LIMIT
from steelyard.models import smoothing, weights
from steelyard.models.decoder import Decoder

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"


def quantize_channels(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round `[N, M]` to int8 by each row's largest magnitude.

    Returns:
        `[N, M]` int8 in -127..127 and `[N, 1]` bfloat16 scales. The scale is rounded first, so that the stored pair is
        what was rounded to.
    """
    wide = weight.float()
    scale = (wide.abs().amax(-1, keepdim=True) / LIMIT).to(torch.bfloat16)
    # The smallest normal bfloat16 for rows of zeros: any scale does, and readers divide by it.
    scale = scale.clamp_min(torch.finfo(torch.bfloat16).tiny)
    return (wide / scale.float()).round_().clamp_(-LIMIT, LIMIT).to(torch.int8), scale


def quantize(decoder: Decoder, portable: bool = False) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors, linear layers and embedding in int8, the rest as it is.

    Raises:
        CheckpointError: the model is quantised already.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in decoder.named_parameters():
        path, _, leaf = name.rpartition(".")
        layer = decoder.get_submodule(path)
        whole = isinstance(layer, nn.Linear | nn.Embedding) and leaf == "weight"
        if whole and not (portable and path in (EMBEDDING, HEAD)):
            tensors[name], tensors[f"{name}_scale"] = quantize_channels(parameter)
        else:
            tensors[name] = parameter.detach().contiguous()
    if any(not isinstance(layer, nn.Linear) for name, layer in decoder.named_modules() if name.endswith("_proj")):
        raise CheckpointError("the model is quantised already; start from its parent")
    return tensors


def quantization_config(portable: bool) -> dict[str, Any]:
    """`quantization_config` of the compressed-tensors format `int-quantized`."""
    scheme = {"num_bits": 8, "type": "int", "symmetric": True}
    activations = {**scheme, "strategy": "token", "dynamic": True}
    linear = {"targets": ["Linear"], "weights": {**scheme, "strategy": "channel"}, "input_activations": activations}
    groups: dict[str, Any] = {"group_0": linear}
    if not portable:
        groups["group_1"] = {"targets": ["Embedding"], "weights": {**scheme, "strategy": "channel"}}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [HEAD] if portable else [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def write(
    decoder: Decoder, folder: Path, parent: Path, portable: bool = False, smoothed: Smoothed | None = None
) -> None:
    """See `Method`."""
    tensors = quantize(decoder, portable)
    if smoothed is not None:
        smoothing.save(smoothed.scales, folder)
    if smoothed is not None and smoothed.columns is not None:
        tensors[f"{EMBEDDING}.{weights.COLUMNS}"] = smoothed.columns
    save_file(tensors, folder / weights.WEIGHTS, metadata={"format": "pt"})
    weights.copy_companions(parent, folder)
    config = read_json(parent / "config.json")
    config["quantization_config"] = quantization_config(portable)
    if smoothed is not None:
        config[smoothing.FIELD] = True
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
