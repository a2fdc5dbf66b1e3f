"""Beam search: the likeliest continuations as a whole, where greedy takes the likeliest token at each place.

Every step the `width` best beginnings are kept, of all that are a token longer than those before; one that ends is put
aside with its score: the sum of its tokens' log-probabilities over (its length ** length_penalty) (Wu et al. 2016
without their constant). Groups keep beginnings apart: each pays `diversity` for a token that groups before it have just
chosen (Vijayakumar et al. 2018). Knows neither cache nor text. Stops as transformers does, whose results these are.
"""

# B beginnings  V vocabulary

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch

from steelyard.infer.request import Beam

Says = Callable[[tuple[int, ...]], Hashable]


class Ended(NamedTuple):
    """A continuation that came to its end."""

    tokens: tuple[int, ...]
    """What was generated, the end token included."""
    score: float
    """See the module."""


class Step(NamedTuple):
    """How a beginning goes on."""

    row: int
    """Which of the beginnings before it continues, by their order."""
    token: int


class Beginning(NamedTuple):
    """What is kept."""

    tokens: tuple[int, ...]
    log_probability: float


class Beams:
    """The beginnings of one request.

    Args:
        beam: width, penalties, groups.
        ends: tokens that end a continuation.
        most: tokens of one, at most; what has reached them ends.
        says: what tokens say; of those that say the same only the likeliest is searched from, and others are among the
            best only where there are too few. None: all are different.
    """

    def __init__(self, beam: Beam, ends: frozenset[int], most: int, says: Says | None = None) -> None:
        self._beam, self._ends, self._says = beam, ends, says
        width = beam.width // beam.groups
        self._groups = [_Group(beam, width, ends, most, says) for _ in range(beam.groups)]
        self._rows: list[list[int]] = [[0] for _ in self._groups]  # all begin from the prompt, which is one row

    @property
    def done(self) -> bool:
        """Whether nothing that goes on could be better."""
        return all(group.done for group in self._groups)

    def advance(self, log_probabilities: torch.Tensor) -> list[Step]:
        """Take in what follows each beginning, `[B, V]` float32, in the order of the last steps; at first one row.

        Returns:
            The beginnings that go on now; empty where `done`.
        """
        chosen, steps = Counter[int](), list[Step]()
        for number, group in enumerate(self._groups):
            if group.done:
                self._rows[number] = []
                continue
            own = log_probabilities[self._rows[number]]
            if chosen and self._beam.diversity:
                own = own.clone()
                own[:, list(chosen)] -= self._beam.diversity * torch.tensor(list(chosen.values()), dtype=own.dtype)
            found = [Step(self._rows[number][row], token) for row, token in group.advance(own)]
            chosen.update(step.token for step in found)
            self._rows[number] = list(range(len(steps), len(steps) + len(found)))
            steps += found
        return steps

    def best(self) -> list[Ended]:
        """What has ended, the best first; where less than `width` has, what was on its way is among it."""
        found = sorted((ended for group in self._groups for ended in group.all()), key=lambda ended: -ended.score)
        if self._says is not None:
            spare = [ended for group in self._groups for ended in group.spare]
            found = [*_parted(found, self._ends, self._says)[0], *sorted(spare, key=lambda ended: -ended.score)]
        return found[: self._beam.width]


class _Group:
    def __init__(self, beam: Beam, width: int, ends: frozenset[int], most: int, says: Says | None) -> None:
        self._beam, self._width, self._ends, self._most = beam, width, ends, most
        self._says = says
        self._kept = [Beginning((), 0.0)]
        self._ended: list[Ended] = []
        self.spare: list[Ended] = []
        """What says the same as one that has ended, and is less likely."""
        self.length = 0
        self.done = False

    def advance(self, log_probabilities: torch.Tensor) -> list[tuple[int, int]]:
        """Rows of `log_probabilities` with the tokens that go on from them."""
        vocabulary = log_probabilities.shape[1]
        sums = log_probabilities.float() + torch.tensor([one.log_probability for one in self._kept])[:, None]
        # Of so many candidates enough go on, even if every end token of each beginning is among them.
        wanted = max(2, 1 + len(self._ends)) * self._width
        values, places = sums.flatten().topk(min(wanted, sums.numel()))
        begun = set[Hashable]()
        self.length += 1
        following: list[tuple[int, int]] = []
        kept: list[Beginning] = []
        full = self._full and self._beam.early_stopping is True
        for rank, (value, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
            if value == -torch.inf:
                break  # what nothing follows that may
            row, token = divmod(place, vocabulary)
            longer = Beginning((*self._kept[row].tokens, token), value)
            if token not in self._ends and self.length < self._most:
                said = longer.tokens if self._says is None else self._says(longer.tokens)
                if len(kept) < self._width and said not in begun:
                    begun.add(said)
                    kept.append(longer)
                    following.append((row, token))
            elif rank < self._width and not full:
                self._end(longer)
        self._kept = kept
        self.done = not kept or not self._may_improve()
        return [] if self.done else following

    def all(self) -> list[Ended]:
        """What has ended, and if it is too little, what has not."""
        missing = self._width - len(self._ended)
        return self._ended + [Ended(one.tokens, self._score(one)) for one in self._kept[: max(0, missing)]]

    @property
    def _full(self) -> bool:
        return len(self._ended) == self._width

    def _end(self, one: Beginning) -> None:
        self._ended.append(Ended(one.tokens, self._score(one)))
        self._ended.sort(key=lambda ended: -ended.score)
        if self._says is not None:
            self._ended, again = _parted(self._ended, self._ends, self._says)
            self.spare += again
        del self._ended[self._width :]

    def _score(self, one: Beginning) -> float:
        return one.log_probability / float(len(one.tokens) ** self._beam.length_penalty)

    def _may_improve(self) -> bool:
        """Whether the best beginning could still end better than the worst that has ended."""
        if not self._full:
            return True
        if self._beam.early_stopping is True:
            return False
        never = self._beam.early_stopping == "never" and self._beam.length_penalty > 0
        length = self._most if never else self.length
        return self._kept[0].log_probability / float(length**self._beam.length_penalty) > self._ended[-1].score


def _parted(ended: list[Ended], ends: frozenset[int], says: Says) -> tuple[list[Ended], list[Ended]]:
    """Of those that say the same the first, and the others; what ends a continuation says nothing."""
    first: dict[Hashable, Ended] = {}
    for one in ended:
        first.setdefault(says(one.tokens[:-1] if one.tokens[-1] in ends else one.tokens), one)
    kept = list(first.values())
    return kept, [one for one in ended if not any(one is other for other in kept)]
