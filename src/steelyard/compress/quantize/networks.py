"""Quantisation of networks that are no decoders: their linear layers and embeddings run on integers; what else is large
(a convolution, an LSTM) has integers on disk, and becomes numbers again when it is opened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from steelyard.checkpoint.manifest import read_json
from steelyard.compress.inputs import Products, linears, watching
from steelyard.compress.quantize import gptq, grid
from steelyard.compress.quantize.decoders import QuantizeConfig, check_group, check_int8_layers, check_strength
from steelyard.compress.quantize.layout import FORMATS, activations, by_weight, stored
from steelyard.errors import CheckpointError, ConfigError
from steelyard.models import sparse, weights
from steelyard.models.linear import QuantizedWeight

FEWEST_ROWS = 64
"""Of an embedding: shorter ones are left alone."""
LEAST = 1024
"""Numbers of a parameter of another layer: fewer are left alone."""
PLACES = "embed_positions"
"""Embeddings that are taken whole, and not by rows: they stay as they are."""
HEAD = "classifier"
"""The last layer, which has 8 bits."""


def check(network: nn.Module, config: QuantizeConfig) -> None:
    """Whether a network can be quantised so.

    Raises:
        ConfigError: settings that do not go together, or do not fit its layers.
        CheckpointError: it is quantised.
    """
    if any(isinstance(layer, QuantizedWeight) for layer in network.modules()):
        raise CheckpointError("the model is quantised already; start from its parent")
    check_strength(config)
    if config.method not in ("nearest", "gptq"):
        raise ConfigError(f"{config.method} is for decoders: nearest and gptq are for any network")
    if config.portable:
        raise ConfigError("portable is for decoders: no other program reads this network")
    if config.group_layers:
        raise ConfigError("group_layers is for decoders: other networks have groups everywhere, or nowhere")
    check_group(network, config.group)
    check_int8_layers(config, list(linears(network)))


@torch.no_grad()
def quantize(
    network: nn.Module, config: QuantizeConfig, run: Callable[[], object] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a network's quantised form.

    Args:
        network: stays as it is.
        config: how.
        run: runs the network over calibration data; gptq needs it.

    Raises:
        ConfigError, CheckpointError: see `check`.
    """
    check(network, config)
    assert config.group != "auto", "see `settled`"
    layers = linears(network)
    grams: Mapping[str, Products] = {}
    if config.method == "gptq":
        if run is None:
            raise ConfigError("gptq judges by what layers read: calibration data are needed")
        with watching(layers, lambda layer: Products(layer.in_features, whole=True, even=True)) as grams:
            run()
    tensors: dict[str, torch.Tensor] = {}
    modules = dict(network.named_modules())
    for name, tensor in network.state_dict().items():
        path, _, leaf = name.rpartition(".")
        layer, bits = modules[path], 8 if path.endswith(HEAD) else config.bits_of(path)
        if isinstance(layer, nn.Linear) and leaf == "weight":
            gram = grams[path].gram if path in grams else None
            judged = gram is not None and bool(gram.any())
            found = (
                gptq.rounded(tensor, gram, bits, config.group)  # type: ignore[arg-type]
                if judged
                else grid.rounded(tensor, bits, config.group)
            )
            tensors |= {f"{path}.{part}": value for part, value in stored(found, bits).items()}
        elif isinstance(layer, nn.Embedding) and len(tensor) >= FEWEST_ROWS and not path.endswith(PLACES):
            fits = config.group is not None and tensor.shape[1] % config.group == 0
            found = grid.rounded(tensor, 8, config.group if fits else None)
            tensors |= {f"{path}.{part}": value for part, value in stored(found, 8).items()}
        elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.LSTM) and tensor.dim() > 1 and tensor.numel() >= LEAST:
            found = grid.rounded(tensor.flatten(1), 8, None)
            tensors[name], tensors[f"{name}_scale"] = found.values.view(tensor.shape), found.scale
        else:
            tensors[name] = tensor.detach().contiguous()
    return tensors


def write(tensors: dict[str, torch.Tensor], config: QuantizeConfig, folder: Path, parent: Path) -> None:
    """Write what `quantize` found into `folder`, with the other files of `parent`."""
    save_file(sparse.stored(tensors), folder / weights.WEIGHTS, metadata={"format": "pt"})
    weights.copy_companions(parent, folder)
    values = read_json(parent / "config.json")
    values["quantization_config"] = quantization_config(
        config, [name.removesuffix(".weight_scale") for name in tensors]
    )
    (folder / "config.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def quantization_config(config: QuantizeConfig, paths: Sequence[str] = ()) -> dict[str, Any]:
    """`quantization_config` of `config.json`, in the words of compressed-tensors.

    Args:
        config: how.
        paths: of the network's layers, others among them.
    """
    whole = {"type": "int", "symmetric": True}
    eight = {**whole, "num_bits": 8}
    groups: dict[str, dict[str, Any]] = {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**whole, "num_bits": config.bits, **by_weight(config.group)},
            "input_activations": activations(config.group),
            "format": FORMATS[config.bits],
        },
        "group_1": {"targets": ["Embedding"], "weights": {**eight, **by_weight(config.group)}},
        "group_2": {"targets": ["Conv1d", "Conv2d", "LSTM"], "weights": {**eight, **by_weight(None)}},
    }
    if config.bits == 4:
        head = {
            **groups["group_0"],
            "weights": {**eight, **by_weight(config.group)},
            "format": FORMATS[8],
        }
        wider = [path for path in paths if any(fnmatchcase(path, pattern) for pattern in config.int8_layers)]
        groups["group_3"] = {**head, "targets": [HEAD, *wider]}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMATS[config.bits],
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }
