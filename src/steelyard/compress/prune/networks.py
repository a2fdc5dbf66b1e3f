"""Pruning of the linear layers of any network, each judged by what it reads while the whole one runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from steelyard.compress.inputs import Products, linears, watching
from steelyard.compress.prune.decoders import RATE, PruneConfig, check, pruned, smallest
from steelyard.errors import CheckpointError, ConfigError
from steelyard.models import weights
from steelyard.models.linear import QuantizedWeight

HEAD = "classifier"
"""The last layer, which stays."""


@torch.no_grad()
def prune(network: nn.Module, config: PruneConfig, run: Callable[[], object] | None = None) -> None:
    """Set weights of a network's linear layers to 0, in place.

    Args:
        network: changed.
        config: what goes.
        run: runs the network over calibration data; magnitude needs none.

    Raises:
        ConfigError: settings that do not go together, or do not fit the layers.
        CheckpointError: the network is quantised, or has no linear layers but the last.
    """
    few, rate = check(config), RATE if config.rate is None else config.rate
    if config.structure is not None:
        raise ConfigError("structures are a decoder's: of other networks single weights go")
    if any(isinstance(layer, QuantizedWeight) for layer in network.modules()):
        raise CheckpointError("the model is quantised already; prune its parent")
    layers = {name: layer for name, layer in linears(network).items() if not name.endswith(HEAD)}
    if not layers:
        raise CheckpointError("the network has no linear layers but its last: nothing can be pruned")
    if config.method == "magnitude":
        going = smallest({name: layer.weight for name, layer in layers.items()}, config.scope, rate, few)
        for name, layer in layers.items():
            layer.weight.masked_fill_(going[name], 0)
        return
    if run is None:
        raise ConfigError(f"{config.method} judges weights by what they read: calibration data are needed")
    seen: Mapping[str, Products]
    with watching(layers, lambda layer: Products(layer.in_features, config.method == "sparsegpt")) as seen:
        run()
    for name, layer in layers.items():
        layer.weight.copy_(pruned(layer.weight, seen[name], rate, few))


def write(network: nn.Module, folder: Path, parent: Path, *, zeros: bool) -> None:
    """Write a network into `folder`, with the other files of `parent`; see `weights.save`."""
    weights.write(network.state_dict(), folder, zeros=zeros)
    weights.copy_companions(parent, folder)
