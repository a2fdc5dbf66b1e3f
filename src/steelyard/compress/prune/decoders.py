"""Pruning of a decoder's linear layers, block by block: each is judged by what the pruned blocks before it hand on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec
import torch

from steelyard.compress.inputs import Passing, Products, dense, linears, watching
from steelyard.compress.prune import magnitude, masks, sparse_gpt, wanda
from steelyard.compress.prune.masks import Pattern
from steelyard.compress.prune.structured import Structure
from steelyard.data.packing import Pack
from steelyard.errors import CheckpointError, ConfigError
from steelyard.models.decoder import Decoder

RATE = 0.5
"""Where neither a rate nor a pattern is asked for."""
STRUCTURED_RATE = 0.25


Judge = Literal["magnitude", "wanda", "sparsegpt", "activation", "gradient", "divergence", "even"]


class PruneConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What goes."""

    method: Judge = "sparsegpt"
    """How they are judged: weights by magnitude, wanda or sparsegpt, structures by activation or gradient,
    blocks also by divergence (what is lost without each, measured) or even: the first, the last, and some between."""
    structure: Structure | None = None
    """Instead of single weights these go whole; the model is a smaller one."""
    rate: float | None = None
    """Share of the weights of linear layers that goes, a half by default, of structures a quarter; embedding and head
    stay."""
    pattern: str | None = None
    """Instead of a rate: so many of every few weights of a row stay, such as 2:4."""
    scope: Literal["layer", "model"] = "layer"
    """magnitude: the rate is that of every layer, or of all together."""


def check(config: PruneConfig) -> Pattern | None:
    """The pattern, if there is one.

    Raises:
        ConfigError: settings that do not go together.
    """
    if config.rate is not None and config.pattern is not None:
        raise ConfigError("rate and pattern exclude each other: leave one out")
    if config.rate is not None and not 0 < config.rate < 1:
        raise ConfigError(f"rate {config.rate}: a share of the weights is needed, above 0 and below 1")
    if (config.structure is not None) != (config.method in ("activation", "gradient", "divergence", "even")):
        raise ConfigError(
            "structures are judged by activation or gradient (blocks also by divergence or even), weights by the others"
        )
    if config.method in ("divergence", "even") and config.structure != "blocks":
        raise ConfigError(f"{config.method} is for blocks: {config.structure} are judged by activation or gradient")
    if config.structure is not None and config.pattern is not None:
        raise ConfigError("structures have no pattern: say the rate")
    if config.scope == "model" and (config.method != "magnitude" or config.pattern is not None):
        raise ConfigError("scope 'model' is magnitude's alone, and has no pattern")
    return None if config.pattern is None else masks.pattern(config.pattern)


@torch.no_grad()
def prune(
    decoder: Decoder,
    config: PruneConfig,
    batches: Sequence[Pack] = (),
    report: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Set weights of a dense decoder's linear layers to 0, in place.

    Args:
        decoder: changed.
        config: what goes.
        batches: calibration data; magnitude needs none.
        report: told how many blocks are done, of how many.

    Raises:
        ConfigError: settings that do not go together, or do not fit the layers.
        CheckpointError: the decoder is quantised.
    """
    few, rate = check(config), RATE if config.rate is None else config.rate
    assert config.structure is None, "see `structured`"
    if not dense(decoder):
        raise CheckpointError("the model is quantised already; prune its parent")
    if config.method == "magnitude":
        layers = linears(decoder.model.layers)
        going = smallest({name: layer.weight for name, layer in layers.items()}, config.scope, rate, few)
        for name, layer in layers.items():
            layer.weight.masked_fill_(going[name], 0)
        return
    if not batches:
        raise ConfigError(f"{config.method} judges weights by what they read: calibration data are needed")
    passing = Passing(decoder, batches)
    for number, block in enumerate(decoder.model.layers):
        layers = linears(block)
        with watching(layers, lambda layer: Products(layer.in_features, config.method == "sparsegpt")) as seen:
            passing.through(block)
        for name, layer in layers.items():
            layer.weight.copy_(pruned(layer.weight, seen[name], rate, few))
        passing.states = passing.through(block)
        report(number + 1, len(decoder.model.layers))


def smallest(
    weights: Mapping[str, torch.Tensor], scope: str, rate: float, few: Pattern | None
) -> dict[str, torch.Tensor]:
    """What goes by magnitude: bool, of the shape of each weight."""
    scores = {name: magnitude.scores(weight) for name, weight in weights.items()}
    if scope == "model":
        return masks.lowest_of_all(scores, rate)
    if few is not None:
        return {name: masks.lowest_of_few(layer, few) for name, layer in scores.items()}
    return {name: masks.lowest_of_layer(layer, rate) for name, layer in scores.items()}


def pruned(weight: torch.Tensor, seen: Products, rate: float, few: Pattern | None) -> torch.Tensor:
    """A weight `[N, M]` with a share of it 0, by what the layer has seen."""
    if seen.gram is not None:
        return sparse_gpt.prune(weight, seen.gram, rate, few)
    scores = wanda.scores(weight, seen.squares)
    going = masks.lowest(scores, rate) if few is None else masks.lowest_of_few(scores, few)
    return weight.masked_fill(going, 0)
