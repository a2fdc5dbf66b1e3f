"""Quantised layers out of a checkpoint in the compressed-tensors layout: `int-quantized` and `pack-quantized`.

Weights are int8 or int4, symmetric, per output channel or per group of inputs. Activations are int8, made on the fly:
per token where weights are per channel, and by the weights' groups otherwise, also where the checkpoint leaves them in
floating point: a byte with a scale for each group loses less than the weights have lost.
"""

# N outputs  M inputs  G groups of inputs

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steelyard.checkpoint import manifest
from steelyard.errors import CheckpointError
from steelyard.models import smoothing
from steelyard.models.linear import HALVES, QuantizedEmbedding, QuantizedLinear, QuantizedWeight

COLUMNS = "column_scale"
STORED = {"Embedding", "Conv1d", "Conv2d", "LSTM"}
"""Layers of integers whose activations are numbers: rows that are looked up, and what becomes numbers again."""
PACKED, SHAPE = "weight_packed", "weight_shape"


def check(quantization: Mapping[str, Any], folder: Path) -> None:
    """Whether layers of this kind are computed here.

    Args:
        quantization: `quantization_config` of `config.json`.
        folder: whose.

    Raises:
        CheckpointError: they are not, with what they are.
    """
    method = quantization.get("quant_method")
    if method != "compressed-tensors":
        raise CheckpointError(f"'{folder}': quantisation '{method}' is not known here; known: compressed-tensors")
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else [groups]:
        weights, activations = _scheme(group, "weights"), _scheme(group, "input_activations")
        bits, strategy = weights.get("num_bits"), weights.get("strategy")
        known = (bits, strategy) in {(8, "channel"), (8, "group"), (4, "group"), (4, "channel")}
        if not _is_symmetric(weights) or not known or weights.get("actorder"):
            raise CheckpointError(
                f"'{folder}': only int8 and int4 weights, symmetric, per channel or group, in order, are read;"
                f" it has {weights}"
            )
        targets = group.get("targets") if isinstance(group, dict) else None
        stored = isinstance(targets, list) and set(map(str, targets)) <= STORED
        if stored or (strategy == "group" and not activations):
            continue
        whole = _is_symmetric(activations) and activations.get("num_bits") == 8 and activations.get("dynamic")
        if not whole or activations.get("strategy") not in ("token", "group" if strategy == "group" else "token"):
            raise CheckpointError(
                f"'{folder}': only int8 activations, symmetric, dynamic, per token or by the weights' groups, are"
                f" computed; it has {activations}"
            )


def place(network: nn.Module, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Replace the layers whose stored weights are integers; take their tensors out of `tensors`.

    Of a layer that is neither linear nor an embedding (a convolution, an LSTM) integers become numbers again, in
    `tensors`.

    Args:
        network: changed.
        tensors: of its checkpoint, by name; changed.
        dtype: of the layers' outputs.

    Raises:
        CheckpointError: sizes or scales that do not fit.
    """
    layers = dict(network.named_modules())
    paths = {name.removesuffix(f".{PACKED}") for name in tensors if name.endswith(f".{PACKED}")}
    for name in [name for name, tensor in tensors.items() if tensor.dtype == torch.int8]:
        path = name.removesuffix(".weight")
        if path != name and isinstance(layers.get(path), nn.Linear | nn.Embedding):
            paths.add(path)
        else:
            tensors[name] = _restored(name, tensors)
    for path in sorted(paths):
        layer = layers.get(path)
        if not isinstance(layer, nn.Linear | nn.Embedding):
            raise CheckpointError(f"'{path}' is quantised and is no linear layer, nor an embedding")
        weight = _weight(path, layer.weight.shape, tensors)
        scale = _scale(path, weight, tensors)
        bias, expected = tensors.pop(f"{path}.bias", None), getattr(layer, "bias", None)
        if (None if bias is None else bias.shape) != (None if expected is None else expected.shape):
            raise CheckpointError(f"'{path}' has another bias than config.json says")
        if isinstance(layer, nn.Linear):
            network.set_submodule(path, QuantizedLinear(weight, scale, bias, dtype))
            continue
        columns = tensors.pop(f"{path}.{COLUMNS}", None)
        if columns is not None:
            smoothing.check(columns, layer.weight.shape[1], f"'{path}.{COLUMNS}'")
        wide = None if columns is None else columns.float()
        network.set_submodule(path, QuantizedEmbedding(weight, scale, wide, dtype))


def plain(network: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a network without that of its layers of integers."""
    layers = [f"{name}." for name, layer in network.named_modules() if isinstance(layer, QuantizedWeight)]
    return {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(tuple(layers))}


def is_quantized(folder: Path) -> bool:
    """Whether a checkpoint has layers of integers."""
    return manifest.read_json(folder / "config.json").get("quantization_config") is not None


def restore(network: nn.Module) -> bool:
    """Replace layers of integers by the float32 numbers that they stand for; returns whether there were any."""
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, QuantizedWeight)]
    for name, layer in layers:
        network.set_submodule(name, _restored_layer(layer))
    return bool(layers)


def _restored_layer(layer: QuantizedWeight) -> nn.Module:
    rows, columns = layer.out_features, layer.in_features
    kind = nn.Embedding if isinstance(layer, QuantizedEmbedding) else nn.Linear
    made = kind(rows, columns, device="meta") if kind is nn.Embedding else kind(columns, rows, device="meta")
    made.weight = nn.Parameter(layer.numbers(), requires_grad=False)
    if isinstance(layer, QuantizedLinear):
        bias = None if layer.bias is None else nn.Parameter(layer.bias.float(), requires_grad=False)
        made.register_parameter("bias", bias)
    return made


def demand_dense(network: nn.Module, folder: Path) -> None:
    """Refuse to train on integers.

    Raises:
        CheckpointError: the network has layers of them.
    """
    if any(isinstance(layer, QuantizedWeight) for layer in network.modules()):
        raise CheckpointError(f"'{folder}' is quantised: train on the model that it was made from")


def _restored(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """A parameter `[N, ...]` that has a scale for each of its N."""
    values, scale = tensors[name], tensors.pop(f"{name}_scale", None)
    if scale is None or not scale.is_floating_point() or scale.shape != (values.shape[0], 1):
        raise CheckpointError(f"'{name}' is int8 without a scale per output channel")
    return values.float() * scale.float().view(-1, *(1 for _ in values.shape[1:]))


def _weight(path: str, shape: torch.Size, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """int8 `[N, M]`, or int32 `[N, M / 8]` of int4."""
    weight = tensors.pop(f"{path}.{PACKED}", None)
    if weight is None:
        weight = tensors.pop(f"{path}.weight")
        if weight.shape != shape:
            raise CheckpointError(f"'{path}' is {tuple(weight.shape)}, config.json says {tuple(shape)}")
        return weight
    stored = tensors.pop(f"{path}.{SHAPE}", None)
    if stored is not None and tuple(stored.tolist()) != tuple(shape):
        raise CheckpointError(f"'{path}' is {tuple(stored.tolist())}, config.json says {tuple(shape)}")
    if weight.dtype != torch.int32 or shape[1] % HALVES or weight.shape != (shape[0], shape[1] // HALVES):
        raise CheckpointError(
            f"'{path}.{PACKED}' is {weight.dtype} {tuple(weight.shape)}: int4 weights {tuple(shape)} are int32, eight"
            " to each, along the inputs"
        )
    return weight


def _scale(path: str, weight: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """`[N, G]`."""
    scale = tensors.pop(f"{path}.weight_scale", None)
    inputs = weight.shape[1] * (1 if weight.dtype == torch.int8 else HALVES)
    if scale is None or not scale.is_floating_point() or scale.dim() != 2 or scale.shape[0] != weight.shape[0]:
        raise CheckpointError(f"'{path}' is quantised without a scale per output channel")
    if not 0 < scale.shape[1] <= inputs or inputs % scale.shape[1]:
        raise CheckpointError(
            f"'{path}' has {scale.shape[1]} scales a channel: {inputs} inputs cannot be cut into so many"
        )
    if scale.shape[1] > 1 or weight.dtype == torch.int32:
        rounded = scale.to(torch.bfloat16)
        if not torch.equal(rounded.to(scale.dtype), scale):
            raise CheckpointError(f"'{path}' has scales of groups in {scale.dtype} that no bfloat16 holds")
        return rounded
    return scale


def _scheme(group: Any, part: str) -> dict[str, Any]:
    found = group.get(part) if isinstance(group, dict) else None
    return found if isinstance(found, dict) else {}


def _is_symmetric(scheme: dict[str, Any]) -> bool:
    return scheme.get("type") == "int" and bool(scheme.get("symmetric", True))
