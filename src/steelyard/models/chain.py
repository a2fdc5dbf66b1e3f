"""A linear chain: how well labels follow each other, beside how well each fits its own word.

score(y | x) = start[y1] + sum_t emission[t, y_t] + sum_t step[y_(t-1), y_t] + end[y_T]; p(y | x) = exp(score) / Z, the
conditional random field of Lafferty et al. 2001. Z and the marginals by the forward and the backward algorithm in log
space, the best sequences by Viterbi's (1967), the k best by keeping k at every label. A hidden Markov model is the same
with log-probabilities for scores.
"""

# B rows  L longest row  C labels  k sequences

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn


class Scores(NamedTuple):
    """Of a chain; -inf: never."""

    start: torch.Tensor
    """`[C]`: of a first label."""
    step: torch.Tensor
    """`[C, C]`: of a label (first index) before another."""
    end: torch.Tensor
    """`[C]`: of a last label."""


class Path(NamedTuple):
    """A sequence of labels, one a word, and its score."""

    labels: list[int]
    score: float


FASTER = 10.0
"""What is learnt are the scores over this, so that they change as fast under rates that an encoder stands."""


class Chain(nn.Module):
    """The scores as what is learnt; 0 at first, as if labels were independent."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.start, self.end = (nn.Parameter(torch.zeros(classes)) for _ in range(2))
        self.step = nn.Parameter(torch.zeros(classes, classes))

    @property
    def scores(self) -> Scores:
        """In float32."""
        return Scores(*(FASTER * part.float() for part in (self.start, self.step, self.end)))


def free(classes: int) -> Scores:
    """Of labels that are independent."""
    return Scores(torch.zeros(classes), torch.zeros(classes, classes), torch.zeros(classes))


def padded(emissions: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Emissions of all rows one after the other, `[N, C]` -> `[B, L, C]`, 0 behind each row's end."""
    return nn.utils.rnn.pad_sequence(list(torch.split(emissions, list(lengths))), batch_first=True)


def log_likelihood(
    scores: Scores, emissions: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Log-probability of a sequence of labels for each row: `[B]`.

    Args:
        scores: of the chain.
        emissions: `[B, L, C]`.
        lengths: `[B]`, at least 1.
        labels: `[B, L]` int64; anything behind a row's end.
    """
    there = torch.arange(emissions.shape[1]) < lengths[:, None]
    own = emissions.gather(2, labels[..., None])[..., 0]
    between = scores.step[labels[:, :-1], labels[:, 1:]]
    last = labels.gather(1, lengths[:, None] - 1)[:, 0]
    score = scores.start[labels[:, 0]] + scores.end[last]
    score = score + own.where(there, 0).sum(1) + between.where(there[:, 1:], 0).sum(1)
    return score - log_partition(scores, emissions, lengths)


def log_partition(scores: Scores, emissions: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Log Z of each row, `[B]`. Shapes: see `log_likelihood`."""
    forward = _forward(scores, emissions, lengths)
    last = forward[torch.arange(len(lengths)), lengths - 1]
    return (last + scores.end).logsumexp(1)


def log_marginals(scores: Scores, emissions: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Log-probability of each label of each word, all else being free: `[B, L, C]`; anything behind a row's end."""
    forward = _forward(scores, emissions, lengths)
    behind = [scores.end.expand(len(lengths), -1)]
    for place in range(emissions.shape[1] - 2, -1, -1):
        found = _summed(behind[-1] + emissions[:, place + 1], scores.step.T)
        behind.append(torch.where((place + 1 < lengths)[:, None], found, scores.end))
    backward = torch.stack(behind[::-1], 1)
    both = forward + backward
    return both - both.logsumexp(2, keepdim=True)


def _forward(scores: Scores, emissions: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Log of the sum over all beginnings that end in each label, `[B, L, C]`."""
    found = [scores.start + emissions[:, 0]]
    for place in range(1, int(lengths.max())):
        found.append(_summed(found[-1], scores.step) + emissions[:, place])
    found += [found[-1]] * (emissions.shape[1] - len(found))
    return torch.stack(found, 1)


def _summed(logs: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Log of the sum over a of exp(logs[a] + step[a, b]): `[B, C]`, by a product of matrices, all over the greatest.

    What is less than the smallest number beside the greatest term counts as that, so that gradients stay finite.
    """
    most, greatest = logs.amax(1, keepdim=True), step.amax(0)
    greatest = greatest.where(greatest.isfinite(), 0)  # of a label that never follows
    sums = (logs - most).exp() @ (step - greatest).exp()
    return sums.clamp(min=torch.finfo(sums.dtype).tiny).log() + most + greatest


def best(scores: Scores, emissions: torch.Tensor, lengths: torch.Tensor, k: int = 1) -> list[list[Path]]:
    """The k best sequences of each row, the best first; fewer where there are no more that are possible.

    Args:
        scores: of the chain.
        emissions: `[B, L, C]`.
        lengths: `[B]`, at least 1.
        k: at least 1.
    """
    rows, longest, classes = emissions.shape
    # [B, C, k]: the best k beginnings that end in each label; at first there is one.
    kept = torch.full((rows, classes, k), -torch.inf, dtype=emissions.dtype)
    kept[:, :, 0] = scores.start + emissions[:, 0]
    came_from: list[torch.Tensor] = []
    into = scores.step.T.contiguous()  # [to, from]: what is compared lies side by side
    for place in range(1, longest):
        candidates = (kept[:, None] + into[:, :, None]).flatten(2)  # [B, C, C * k]
        values, sources = candidates.topk(k, -1) if k > 1 else candidates.max(-1, keepdim=True)
        going = (place < lengths)[:, None, None]
        came_from.append(sources)
        kept = torch.where(going, values + emissions[:, place, :, None], kept)
    ends = (kept + scores.end[:, None]).flatten(1)
    values, at = ends.topk(min(k, ends.shape[1]))
    labels = torch.zeros(*at.shape, longest, dtype=torch.int64)  # [B, k, L]
    for place in reversed(range(longest)):
        labels[:, :, place] = at // k
        if place:
            before = came_from[place - 1].flatten(1).gather(1, at)
            at = torch.where((place < lengths)[:, None], before, at)
    return [
        [Path(path[:length], value) for path, value in zip(paths, each, strict=True) if value > -torch.inf]
        for paths, each, length in zip(labels.tolist(), values.tolist(), lengths.tolist(), strict=True)
    ]


def constrained(scores: Scores, labels: Sequence[str]) -> Scores:
    """The same, without what begin-inside-outside labels cannot say (Ramshaw and Marcus 1995): I-X only follows B-X or
    I-X.
    """
    inside = torch.tensor([label.startswith("I-") for label in labels])
    follows = torch.tensor([[_goes_on(before, label) for label in labels] for before in labels])
    return Scores(
        scores.start.masked_fill(inside, -torch.inf),
        scores.step.masked_fill(inside & ~follows, -torch.inf),
        scores.end,
    )


def _goes_on(before: str, label: str) -> bool:
    return before[:2] in ("B-", "I-") and before[2:] == label[2:]


def obeys(sentences: Iterable[Sequence[str]]) -> bool:
    """Whether labels mark where something begins and goes on, and no sentence has what `constrained` takes away."""
    goes_on = False
    for labels in sentences:
        for before, label in zip(["O", *labels], labels, strict=False):
            if label.startswith("I-"):
                goes_on = True
                if not _goes_on(before, label):
                    return False
            elif label != "O" and not label.startswith("B-"):
                return False
    return goes_on
