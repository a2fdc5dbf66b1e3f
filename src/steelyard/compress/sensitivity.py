"""What a decoder loses when one part of it alone is made smaller: by that, parts are chosen.

Measured, not estimated: the part is changed, calibration data go through what follows it, and the distributions that
come out are compared with those of the whole: KL(whole || changed), nats a token.
"""

# N trained tokens  D model width  V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from steelyard.compress.inputs import Passing, linears
from steelyard.data.packing import Pack
from steelyard.models.decoder import Decoder


@torch.inference_mode()
def of_layers(
    decoder: Decoder,
    batches: Sequence[Pack],
    change: Callable[[torch.Tensor], torch.Tensor],
    report: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, float]:
    """Of every linear layer inside the blocks, by its path.

    Args:
        decoder: dense; stays as it is. In float32: what bfloat16 rounds is more than some layers lose.
        batches: calibration data; the distributions at all their trained tokens are held in memory.
        change: what becomes of a weight `[N, M]`.
        report: told how many blocks are done, of how many.
    """
    found: dict[str, float] = {}
    whole = _Whole(decoder, batches)
    passing = Passing(decoder, batches)
    for number, block in enumerate(decoder.model.layers):
        for name, layer in linears(block).items():
            with _changed(layer, change(layer.weight)):
                found[f"model.layers.{number}.{name}"] = whole.divergence(_rest(decoder, passing, number))
        passing.states = passing.through(block)
        report(number + 1, len(decoder.model.layers))
    return found


@torch.inference_mode()
def of_blocks(
    decoder: Decoder, batches: Sequence[Pack], report: Callable[[int, int], None] = lambda done, of: None
) -> list[float]:
    """Of every block, were it not there; see `of_layers`."""
    found: list[float] = []
    whole = _Whole(decoder, batches)
    passing = Passing(decoder, batches)
    for number, block in enumerate(decoder.model.layers):
        found.append(whole.divergence(_rest(decoder, passing, number + 1)))
        passing.states = passing.through(block)
        report(number + 1, len(decoder.model.layers))
    return found


class _Whole:
    """The distributions of the decoder as it is, at the tokens that are trained."""

    def __init__(self, decoder: Decoder, batches: Sequence[Pack]) -> None:
        self.decoder, self.batches = decoder, batches
        states = _rest(decoder, Passing(decoder, batches), 0)
        self._known = [self._logits(x, batch).log_softmax(-1) for x, batch in zip(states, batches, strict=True)]
        """`[N, V]` float32 each."""
        self._tokens = sum(len(batch.places) for batch in batches)

    def divergence(self, states: Sequence[torch.Tensor]) -> float:
        """From states `[T, D]` after the last block: the mean KL."""
        total = 0.0
        for x, batch, known in zip(states, self.batches, self._known, strict=True):
            changed = self._logits(x, batch).log_softmax(-1)
            total += float((known.exp() * (known - changed)).sum(-1).double().sum())
        return total / self._tokens

    def _logits(self, x: torch.Tensor, batch: Pack) -> torch.Tensor:
        return self.decoder.logits(self.decoder.model.norm(x)[batch.places]).float()


def _rest(decoder: Decoder, passing: Passing, begin: int) -> list[torch.Tensor]:
    """What the states `[T, D]` of now become by the blocks from `begin` on; what passes stays where it is."""
    kept = passing.states
    for block in decoder.model.layers[begin:]:
        passing.states = passing.through(block)
    states, passing.states = passing.states, kept
    return states


@contextmanager
def _changed(layer: nn.Linear, weight: torch.Tensor) -> Iterator[None]:
    kept, layer.weight.data = layer.weight.data, weight.to(layer.weight.dtype)
    try:
        yield
    finally:
        layer.weight.data = kept
