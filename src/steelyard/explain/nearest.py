"""Which rows a model learnt from are most like an input, by the gradients that they give its last layer.

Of a classifier that is delta h^T, delta = softmax(logits) - onehot and h what the layer reads (TracIn's last layer:
Pruthi et al. 2020, section 4.2); rows are alike by the cosine of these, <delta, delta'> <h, h'> over both lengths. Of a
decoder the head is as wide as the vocabulary, so it is that of a linear map before it, (W^T delta) h^T, summed over the
answer's tokens. Above 0: learning the row made what is explained likelier; below: less likely.
"""

# R rows  A answer tokens  C classes  D width

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steelyard.data.packing import bins
from steelyard.models.attention import PackedAttention
from steelyard.models.classifiers import Classifier
from steelyard.models.decoder import Adapters, Decoder

TOKENS = 2048
"""Of a forward pass."""


@dataclass(frozen=True)
class Gradient:
    """The sum over places of outer products."""

    deltas: torch.Tensor
    """`[A, C | D]`."""
    states: torch.Tensor
    """`[A, D]`."""

    def dot(self, other: Gradient) -> float:
        """Inner product of both."""
        return float(((self.deltas @ other.deltas.T) * (self.states @ other.states.T)).sum())


def nearest(own: Gradient, others: Sequence[Gradient], count: int) -> list[tuple[int, float]]:
    """The rows whose gradients point most along or against one: their numbers and cosines, the likest first."""
    length = own.dot(own) ** 0.5
    cosines = [own.dot(other) / max(length * other.dot(other) ** 0.5, 1e-30) for other in others]
    order = sorted(range(len(others)), key=lambda row: -abs(cosines[row]))[:count]
    return [(row, cosines[row]) for row in sorted(order, key=lambda row: -cosines[row])]


@torch.no_grad()
def of_classes(
    classifier: Classifier,
    examples: Sequence[Any],
    targets: Sequence[int],
    report: Callable[[int], None] = lambda done: None,
) -> list[Gradient]:
    """Of examples and their classes, by the last layer of a classifier in float32."""
    network: Any = classifier.network
    read: list[torch.Tensor] = []
    hook = network.classifier.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    found: list[Gradient] = []
    try:
        for example, target in zip(examples, targets, strict=True):
            delta = network(*classifier.inputs.batch([example])).softmax(-1)
            delta[0, target] -= 1
            found.append(Gradient(delta, read.pop()))
            report(len(found))
    finally:
        hook.remove()
    return found


def of_answers(
    decoder: Decoder,
    adapter: Adapters | None,
    rows: Sequence[tuple[list[int], list[int]]],
    report: Callable[[int], None] = lambda done: None,
) -> list[Gradient]:
    """Of prompts and their answers, as tokens, by a decoder in float32."""
    found: list[Gradient | None] = [None] * len(rows)
    done = 0
    for group in bins([len(prompt) + len(answer) for prompt, answer in rows], TOKENS):
        for row, gradient in zip(group, _of_pack(decoder, adapter, [rows[row] for row in group]), strict=True):
            found[row] = gradient
        done += len(group)
        report(done)
    return [gradient for gradient in found if gradient is not None]


@torch.no_grad()
def _of_pack(
    decoder: Decoder, adapter: Adapters | None, rows: Sequence[tuple[list[int], list[int]]]
) -> Iterator[Gradient]:
    whole = [prompt + answer[:-1] for prompt, answer in rows]
    lengths = [len(row) for row in whole]
    positions = torch.cat([torch.arange(length) for length in lengths])
    tokens = torch.tensor([token for row in whole for token in row])
    states = decoder(tokens, positions, PackedAttention(lengths), adapter)
    end = 0
    for (_, answer), length in zip(rows, lengths, strict=True):
        end += length
        read = states[end - len(answer) : end]
        delta = decoder.logits(read).float().softmax(-1)
        delta[torch.arange(len(answer)), torch.tensor(answer)] -= 1
        yield Gradient(delta @ decoder.lm_head.weight, read)
