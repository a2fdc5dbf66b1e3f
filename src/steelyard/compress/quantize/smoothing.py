"""SmoothQuant (Xiao et al. 2023, section 4): what few channels of the activations have much of moves into the weights.

Channel j of what layers read is divided by s_j, their weights of that channel are multiplied by it, with s_j = a_j^t /
w_j^(1 - t) (equation 4). Ours differs in two things. a_j is the largest of a typical row (the median over rows), not of
all data: every token has a scale of its own, so that what some odd token has much of costs no other anything. And s_j
is a power of two: moving it rounds nothing, and the model says what it said before, to the bit.
"""

# M inputs  N outputs  V vocabulary  D model width

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import torch
from torch import nn

from steelyard.compress.inputs import Magnitudes, Passing, watching
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


@torch.no_grad()
def smooth(
    decoder: Decoder,
    batches: Sequence[Pack],
    strength: float,
    *,
    head: bool,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Smoothed:
    """Move scales into a dense decoder's weights, in place.

    Args:
        decoder: changed. If its head is tied, and smoothed, its embedding is no longer what it was: see `Smoothed`.
        batches: calibration data.
        strength: t, 0 to 1.
        head: smooth what the head reads, too.
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
        with watching(firsts, lambda _: Magnitudes(lengths)) as seen:
            passing.states = passing.through(block)
        for source, layers in readers.items():
            found = scales[f"{name}.{source}"] = _scales(seen[source].typical(), layers, strength)
            _multiply(layers, found)
            _divide(inner.up_proj if source == "up_proj" else getattr(block, source), found)
        report(number + 1, len(decoder.model.layers))
    if not head:
        return Smoothed(scales, None)
    read = Magnitudes(lengths)
    for x in passing.states:
        read.add(decoder.model.norm(x))
    found = _scales(read.typical(), [decoder.lm_head], strength)
    _divide(decoder.model.norm, found)
    _multiply([decoder.lm_head], found)
    return Smoothed(scales, 1 / found if decoder.config.tied else None)


def _scales(seen: torch.Tensor, layers: Sequence[nn.Linear], strength: float) -> torch.Tensor:
    """`[M]`: powers of two about 1."""
    weights = torch.stack([layer.weight.float().abs().amax(0) for layer in layers]).amax(0)
    exponents = strength * seen.clamp_min(LEAST).log2() - (1 - strength) * weights.clamp_min(LEAST).log2()
    return (exponents - exponents.mean()).round().clamp(-MOST_EXPONENT, MOST_EXPONENT).exp2()


def _multiply(layers: Sequence[nn.Linear], scales: torch.Tensor) -> None:
    """What they do with each channel of their inputs."""
    for layer in layers:
        layer.weight.mul_(scales)


def _divide(layer: nn.Module, scales: torch.Tensor) -> None:
    """A norm's outputs, or a linear layer's."""
    for parameter in layer.parameters():
        parameter.div_(scales.view(-1, *(1 for _ in parameter.shape[1:])))
