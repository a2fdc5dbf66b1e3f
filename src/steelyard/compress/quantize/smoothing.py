"""SmoothQuant (Xiao et al. 2023, section 4): what few channels of the activations have much of moves into the weights.

Channel j of what layers read is divided by s_j, their weights of that channel are multiplied by it, with s_j = a_j^t /
w_j^(1 - t) (equation 4). Ours differs in two things. a_j is the largest of a typical row (the median over rows), not of
all data: every token has a scale of its own, so that what some odd token has much of costs no other anything. And s_j
is a power of two: moving it rounds nothing, and the model says what it said before, to the bit.
"""

# M inputs  N outputs  V vocabulary  D model width

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import torch
from torch import nn

from steelyard.compress.inputs import Magnitudes, Passing, Record, watching
from steelyard.data.packing import Pack
from steelyard.models.decoder import Block, Decoder

STRENGTH = 0.5
LEAST = 1e-5
MOST_EXPONENT = 12


class Smoothed(msgspec.Struct, frozen=True):
    """What has moved."""

    scales: dict[str, torch.Tensor]
    """See `models/smoothing.py`."""
    columns: torch.Tensor | None
    """`[D]`: by what a row of an embedding that shares its weights with the head has to be multiplied."""


class Rule(Protocol):
    """How much of each channel moves."""

    def record(self, layer: nn.Linear) -> Record:
        """What is to be known of what a layer reads."""
        ...

    def scales(self, seen: Any, layers: Sequence[nn.Linear]) -> torch.Tensor:
        """`[M]` powers of two, by what was recorded and by all layers that read the same."""
        ...


class Balance:
    """SmoothQuant's.

    Args:
        lengths: of the rows of each batch.
        strength: t, 0 to 1.
    """

    def __init__(self, lengths: Sequence[Sequence[int]], strength: float = STRENGTH) -> None:
        self._lengths, self._strength = lengths, strength

    def record(self, layer: nn.Linear) -> Magnitudes:
        """See `Rule`."""
        return Magnitudes(self._lengths)

    def scales(self, seen: Magnitudes, layers: Sequence[nn.Linear]) -> torch.Tensor:
        """See `Rule`."""
        weights = torch.stack([layer.weight.float().abs().amax(0) for layer in layers]).amax(0)
        exponents = self._strength * seen.typical().clamp_min(LEAST).log2()
        return powers(exponents - (1 - self._strength) * weights.clamp_min(LEAST).log2())


def powers(exponents: torch.Tensor) -> torch.Tensor:
    """Powers of two about 1, by real exponents `[M]`."""
    return (exponents - exponents.mean()).round().clamp(-MOST_EXPONENT, MOST_EXPONENT).exp2()


@torch.no_grad()
def smooth(
    decoder: Decoder,
    batches: Sequence[Pack],
    rule: Rule,
    *,
    head: bool,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Smoothed:
    """Move scales into a dense decoder's weights, in place.

    Args:
        decoder: changed. If its head is tied, and smoothed, its embedding is no longer what it was: see `Smoothed`.
        batches: calibration data.
        rule: how much moves.
        head: smooth what the head reads, too; by SmoothQuant's rule.
        report: told how many blocks are done, of how many.
    """
    lengths = [batch.lengths for batch in batches]
    passing = Passing(decoder, batches)
    scales: dict[str, torch.Tensor] = {}
    for number, block in enumerate(decoder.model.layers):
        assert isinstance(block, Block)
        attention, inner, name = block.self_attn, block.mlp, f"model.layers.{number}"
        readers: dict[str, list[nn.Linear]] = {
            "input_layernorm": [attention.q_proj, attention.k_proj, attention.v_proj],
            "post_attention_layernorm": [inner.gate_proj, inner.up_proj],
            "up_proj": [inner.down_proj],
        }
        firsts = {source: layers[0] for source, layers in readers.items()}
        with watching(firsts, rule.record) as seen:
            passing.states = passing.through(block)
        for source, layers in readers.items():
            found = scales[f"{name}.{source}"] = rule.scales(seen[source], layers)
            _multiply(layers, found)
            _divide(inner.up_proj if source == "up_proj" else getattr(block, source), found)
        report(number + 1, len(decoder.model.layers))
    if not head:
        return Smoothed(scales, None)
    balance = Balance(lengths)
    read = balance.record(decoder.lm_head)
    for x in passing.states:
        read.add(decoder.model.norm(x))
    found = balance.scales(read, [decoder.lm_head])
    _divide(decoder.model.norm, found)
    _multiply([decoder.lm_head], found)
    return Smoothed(scales, 1 / found if decoder.config.tied else None)


def _multiply(layers: Sequence[nn.Linear], scales: torch.Tensor) -> None:
    """What they do with each channel of their inputs."""
    for layer in layers:
        layer.weight.mul_(scales)


def _divide(layer: nn.Module, scales: torch.Tensor) -> None:
    """A norm's outputs, or a linear layer's."""
    for parameter in layer.parameters():
        parameter.div_(scales.view(-1, *(1 for _ in parameter.shape[1:])))
