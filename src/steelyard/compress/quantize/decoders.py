"""Quantisation of a decoder: what moves between layers first, then each layer's weights to integers, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import msgspec
import torch
from torch import nn

from steelyard.compress.inputs import Passing, Products, dense, linears, watching
from steelyard.compress.quantize import awq, gptq, grid, smoothing
from steelyard.compress.quantize.grid import Integers
from steelyard.compress.quantize.smoothing import Smoothed
from steelyard.data.packing import Pack
from steelyard.errors import CheckpointError, ConfigError
from steelyard.models.config import DecoderConfig
from steelyard.models.decoder import Decoder

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
GROUPS = (64, 96, 128, 32, 48, 16)
"""Inputs that share a scale, the best first where nothing else is asked for."""
LEAST_OF_BYTES = 32
"""Of 8 bits, where nothing else is asked for: in smaller groups scales take more than they give."""
Group = int | Literal["auto"] | None
Method = Literal["nearest", "smoothquant", "awq", "gptq"]
LANES = 16
"""Groups are multiples of it."""


class QuantizeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How weights become integers."""

    bits: Literal[8, 4] = 8
    """Of the linear layers' weights; embedding and head have 8."""
    group: Group = None
    """Inputs that share a scale, of weights and of activations; None: all, by output channel and by token; auto: the
    first of `GROUPS` that divides the inputs of all layers, or all."""
    method: Method = "nearest"
    """All but nearest need calibration data."""
    strength: float = smoothing.STRENGTH
    """smoothquant: how much of what activations have much of moves into the weights, 0 to 1."""
    portable: bool = False
    """Leave embedding and head as they are, and activations of int4: for other readers."""
    int8_layers: tuple[str, ...] = ()
    """Linear layers that have 8 bits where the others have 4: paths, or patterns of them such as `*.down_proj`."""
    group_layers: tuple[str, ...] = ()
    """Of 8 bits: linear layers that alone have groups, the others are by channel; none: all have. Those that need it
    most cost least: what reads an input together (q, k, v; gate and up) has them or not."""

    def bits_of(self, path: str) -> Literal[8, 4]:
        """Of the weights of one linear layer."""
        return 8 if self.bits == 8 or any(fnmatchcase(path, pattern) for pattern in self.int8_layers) else 4

    def group_of(self, path: str) -> Group:
        """Of the weights of one linear layer: other readers take 8 bits by channel alone."""
        if self.group_layers and not any(fnmatchcase(path, pattern) for pattern in self.group_layers):
            return None
        return None if self.portable and self.bits != self.bits_of(path) else self.group

    @classmethod
    def chosen(
        cls,
        bits: int,
        group: str | None,
        method: Method | None,
        *,
        strength: float = smoothing.STRENGTH,
        portable: bool = False,
        int8_layers: Sequence[str] = (),
        group_layers: Sequence[str] = (),
        rows: bool,
        decoder: bool = True,
        smooth: bool = True,
    ) -> QuantizeConfig:
        """What somebody asked for, with what fits where he said nothing.

        Args:
            bits: 8 or 4.
            group: a number or "all"; None: auto, but all in a portable int8 model.
            method: None: by whether there are `rows`.
            strength: see above.
            portable: see above.
            int8_layers: see above.
            group_layers: see above.
            rows: whether there are any to judge by.
            decoder: whether the model is one.
            smooth: whether scales can move into its norms.

        Raises:
            ConfigError: bits or group that there are not.
        """
        if bits not in (8, 4):
            raise ConfigError(f"{bits} bits: 8 and 4 are possible")
        if group is not None and group != "all" and not group.isdecimal():
            raise ConfigError(f"group '{group}': a number of inputs, or all")
        default: Literal["auto"] | None = None if portable and bits == 8 else "auto"
        size = default if group is None else None if group == "all" else int(group)
        best: Method = "nearest"
        if rows and bits == 4:
            best = "gptq"
        elif rows and decoder:
            best = "smoothquant" if smooth else "gptq"
        return cls(
            bits=bits,  # type: ignore[arg-type]
            group=size,
            method=method or best,
            strength=strength,
            portable=portable,
            int8_layers=tuple(int8_layers),
            group_layers=tuple(group_layers),
        )


class Quantized(msgspec.Struct, frozen=True):
    """A decoder's weights as integers."""

    integers: dict[str, Integers]
    """By the layer's path."""
    smoothed: Smoothed | None
    """What has moved before."""


def check(config: QuantizeConfig, decoder: Decoder) -> None:
    """Whether the decoder can be quantised so.

    Raises:
        ConfigError: settings that do not go together, or do not fit its layers.
        CheckpointError: it is quantised.
    """
    if not dense(decoder):
        raise CheckpointError("the model is quantised already; start from its parent")
    check_strength(config)
    if config.method in ("smoothquant", "awq") and not smooths(decoder.config):
        raise ConfigError(
            f"{config.method} moves scales into norms, and those of {decoder.config.model_type} add"
            f" {decoder.config.norm_offset:g} to their weights: take gptq, or nearest"
        )
    if config.group is not None and config.portable and config.bits == 8:
        raise ConfigError("a portable int8 model has a scale per channel: leave out the group")
    check_group(decoder, config.group)
    paths = [path for path in linears(decoder) if path != HEAD]
    check_int8_layers(config, paths)
    _check_group_layers(config, paths)
    if config.portable:
        _check_together(config.bits_of, paths, "int8_layers", ", in a portable model")


def _check_group_layers(config: QuantizeConfig, paths: Sequence[str]) -> None:
    if not config.group_layers:
        return
    if config.bits != 8 or config.group is None:
        raise ConfigError("group_layers are those that have groups among layers of 8 bits: set bits to 8, and a group")
    if config.method == "awq":
        raise ConfigError("awq judges all layers by groups: leave group_layers out, or take smoothquant")
    for pattern in config.group_layers:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ConfigError(f"group_layers: no linear layer is '{pattern}'; one is '{paths[0] if paths else 'none'}'")
    _check_together(config.group_of, paths, "group_layers")  # what is read is rounded once for all of them


def _check_together(form: Callable[[str], object], paths: Sequence[str], field: str, where: str = "") -> None:
    """Layers that read the same are joined, and have one form."""
    for path in paths:
        block, _, name = path.rpartition(".")
        for joined in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            if name in joined and len({form(f"{block}.{other}") for other in joined}) > 1:
                raise ConfigError(f"{field}: of {', '.join(joined)} in '{block}' all or none{where}")


def check_int8_layers(config: QuantizeConfig, paths: Sequence[str]) -> None:
    """Whether what is to have 8 bits is there, among layers of 4. Raises ConfigError: it is not."""
    if config.int8_layers and config.bits == 8:
        raise ConfigError("int8_layers are those that have 8 bits among layers of 4: set bits to 4")
    for pattern in config.int8_layers:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ConfigError(f"int8_layers: no linear layer is '{pattern}'; one is '{paths[0] if paths else 'none'}'")


def smooths(config: DecoderConfig) -> bool:
    """Whether scales can move into a decoder's norms: their weights are all that they multiply by."""
    return config.norm_offset == 0


def check_strength(config: QuantizeConfig) -> None:
    """Whether a strength means anything. Raises ConfigError: it does not, or is out of its range."""
    if not 0 <= config.strength <= 1:
        raise ConfigError(f"strength {config.strength}: 0 to 1 is possible")
    if config.method != "smoothquant" and config.strength != smoothing.STRENGTH:
        raise ConfigError(f"strength is smoothquant's: {config.method} has none")


def settled(config: QuantizeConfig, network: nn.Module) -> QuantizeConfig:
    """The configuration with a group that fits the network, where it was left open."""
    if config.group != "auto":
        return config
    sizes = [layer.in_features for layer in linears(network).values()]
    least = LANES if config.bits == 4 else LEAST_OF_BYTES
    fit = (group for group in GROUPS if group >= least and all(size % group == 0 for size in sizes))
    return msgspec.structs.replace(config, group=next(fit, None))


def check_group(network: nn.Module, group: Group) -> None:
    """Whether groups of so many inputs divide those of all linear layers. Raises ConfigError: one that they do not."""
    if group is None or group == "auto":
        return
    if group < LANES or group % LANES:
        raise ConfigError(f"group {group}: a multiple of {LANES} is needed")
    for path, layer in linears(network).items():
        if layer.in_features % group:
            fit = [size for size in range(LANES, layer.in_features + 1, LANES) if layer.in_features % size == 0]
            raise ConfigError(
                f"group {group} does not divide the {layer.in_features} inputs of '{path}'; groups that do: "
                + (", ".join(map(str, fit)) or "none")
            )


@torch.no_grad()
def quantize(
    decoder: Decoder,
    config: QuantizeConfig,
    batches: Sequence[Pack] = (),
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Quantized:
    """Quantise a dense decoder; its own weights become what their integers stand for.

    Args:
        decoder: changed.
        config: how.
        batches: calibration data.
        report: told how many blocks are done, of how many.

    Raises:
        ConfigError, CheckpointError: see `check`; or there are no data where the method needs them.
    """
    check(config, decoder)
    config = settled(config, decoder)
    assert config.group != "auto"
    if (config.method != "nearest") != bool(batches):
        wants = "reads no data" if batches else "judges by what layers read: calibration data are needed"
        raise ConfigError(f"{config.method} {wants}")
    smoothed = None
    if config.method == "smoothquant":
        rule: smoothing.Rule = smoothing.Balance([batch.lengths for batch in batches], config.strength)
        smoothed = smoothing.smooth(decoder, batches, rule, head=not config.portable, report=report)
    elif config.method == "awq":
        rule = awq.Awq(config.bits, config.group)
        smoothed = smoothing.smooth(decoder, batches, rule, head=not config.portable, report=report)
    integers: dict[str, Integers] = {}
    if not config.portable:
        around = None if config.group_layers else config.group
        integers[EMBEDDING] = grid.rounded(decoder.model.embed_tokens.weight, 8, around)
        if not decoder.config.tied:
            integers[HEAD] = grid.rounded(decoder.lm_head.weight, 8, around)
    judged, whole = config.method in ("awq", "gptq"), config.method == "gptq"
    passing = Passing(decoder, batches if judged else ())
    for number, block in enumerate(decoder.model.layers):
        layers = linears(block)
        with watching(layers, lambda layer: Products(layer.in_features, whole, even=whole)) as seen:
            passing.through(block)
        for name, layer in layers.items():
            path = f"model.layers.{number}.{name}"
            bits = config.bits_of(path)
            group = config.group_of(path)
            assert group != "auto"
            found = integers[path] = _rounded(layer.weight, seen[name], config.method, bits, group)
            layer.weight.copy_(found.restored())
        passing.states = passing.through(block)
        report(number + 1, len(decoder.model.layers))
    return Quantized(integers, smoothed)


def _rounded(weight: torch.Tensor, seen: Products, method: Method, bits: int, group: int | None) -> Integers:
    if seen.gram is not None:
        return gptq.rounded(weight, seen.gram, bits, group)
    return grid.rounded(weight, bits, group, seen.squares if method == "awq" else None)
