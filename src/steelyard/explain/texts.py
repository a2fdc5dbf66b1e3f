"""A text and the class that a classifier puts it into, explained by its tokens."""

# W windows  L longest window  R rows  U units  C classes

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch

from steelyard.explain.rules import Rules
from steelyard.explain.subject import PIECE, Steps, Taken, Watch, log_odds
from steelyard.models.classifiers import Classifier
from steelyard.models.inputs import around, padded

Row = tuple[int, list[int]]
"""A window of one of several texts: the text's number, and tokens."""


class TextSubject:
    """See `Subject`. A unit is a token of the text; what stands around every text is the rest.

    Args:
        classifier: of texts, in float32 and dense.
        tokens: the whole text's, with what stands around it.
        target: the class.
    """

    baseline = "the text without the token"

    def __init__(self, classifier: Classifier, tokens: Sequence[int], target: int) -> None:
        inputs = classifier.text
        self._network, self._target = classifier.network, target
        before, after = around(inputs.tokenizer)
        self._windows = inputs.windows(tokens)
        self._units: list[list[int]] = []
        """Of each place of each window; -1: none."""
        self.units = 0
        for window in self._windows:
            count = max(0, len(window) - len(before) - len(after))
            own = range(self.units, self.units + count)
            self._units.append(([-1] * len(before) + [*own] + [-1] * len(after))[: len(window)])
            self.units += count
        self.computed = 0

    def taken(self, *, rules: bool = False, share: float = 1.0) -> Steps[Taken]:
        """See `Subject`."""
        total = sum(map(len, self._windows))
        inputs, gradients, bases, value = [], [], [], 0.0
        for window in self._windows:
            token_ids, lengths = padded([window])
            with Watch(token_ids, share) as watch:
                logits = self._run(token_ids, lengths, rules)
            odds = log_odds(logits, self._target).sum() * (len(window) / total)
            gradients += torch.autograd.grad(odds, watch.leaves)
            inputs += [leaf.detach() for leaf in watch.leaves]
            bases += watch.bases
            value += float(odds.detach())
            self.computed += 3 * len(window)
            yield
        return Taken(tuple(inputs), tuple(gradients), tuple(bases), value)

    def _run(self, token_ids: torch.Tensor, lengths: torch.Tensor, rules: bool) -> torch.Tensor:
        with Rules() if rules else nullcontext():
            logits: torch.Tensor = self._network(token_ids, lengths)
        return logits

    def spread(self, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """See `Subject`."""
        found = torch.zeros(self.units + 1, dtype=torch.float64)
        for part, units in zip(parts, self._units, strict=True):
            found.index_add_(0, torch.tensor(units) % (self.units + 1), part[0].double().sum(-1))
        return found

    def likelihood(self, kept: torch.Tensor) -> Steps[torch.Tensor]:
        """See `Subject`."""
        rows = [(number, row) for number, one in enumerate(kept.tolist()) for row in self._without(one)]
        found = torch.zeros(len(kept), self._network.config.classes, dtype=torch.float64)
        lengths = torch.zeros(len(kept), dtype=torch.float64)
        for together in _batches(rows):
            with torch.inference_mode():
                logits = self._network(*padded([row for _, row in together]))
            owners = torch.tensor([number for number, _ in together])
            sizes = torch.tensor([len(row) for _, row in together], dtype=torch.float64)
            found.index_add_(0, owners, logits.double().log_softmax(-1) * sizes[:, None])
            lengths.index_add_(0, owners, sizes)
            self.computed += int(sizes.sum())
            yield
        return (found / lengths[:, None]).log_softmax(-1)[:, self._target]

    def _without(self, kept: list[bool]) -> Iterator[list[int]]:
        """Windows with some units alone; a text of nothing is token 0, as everywhere."""
        rows = [
            [token for token, unit in zip(window, units, strict=True) if unit < 0 or kept[unit]]
            for window, units in zip(self._windows, self._units, strict=True)
        ]
        there = [row for row in rows if row]
        yield from there or [[0]]


def _batches(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows of like length, as many as make a piece of work."""
    ordered = sorted(rows, key=lambda row: len(row[1]))
    while ordered:
        count = max(1, PIECE // len(ordered[-1][1]))
        yield ordered[-count:]
        del ordered[-count:]
