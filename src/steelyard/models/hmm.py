"""A hidden Markov model of tagged sentences, the baseline of taggers: counted, not trained.

p(words, tags) = prod p(tag | tag before) p(word | tag); the first smoothed by Witten and Bell's (1991) share for what
was never seen, the second likewise, with words that were not seen told apart by their ends (Brants 2000).
"""

# N words  C tags

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import torch

from steelyard.models.chain import Scores

SUFFIX = 4
"""Letters at the end of a word that tell of its tag, at most."""


class HiddenMarkov:
    """The counts.

    Args:
        sentences: words and their tags.
    """

    def __init__(self, sentences: Iterable[tuple[Sequence[str], Sequence[str]]]) -> None:
        words: dict[str, Counter[str]] = defaultdict(Counter)
        ends: dict[str, Counter[str]] = defaultdict(Counter)
        pairs, firsts, lasts = Counter[tuple[str, str]](), Counter[str](), Counter[str]()
        for said, tags in sentences:
            if not tags:
                continue
            firsts[tags[0]] += 1
            lasts[tags[-1]] += 1
            pairs.update(itertools.pairwise(tags))
            for word, tag in zip(said, tags, strict=True):
                words[word][tag] += 1
        self.tags = tuple(sorted({tag for counts in words.values() for tag in counts}))
        self._number = {tag: number for number, tag in enumerate(self.tags)}
        self._words = dict(words)
        every = Counter[str]()
        for counts in words.values():
            every.update(counts)
        self._each = self._counts(every)
        for word, counts in words.items():
            if sum(counts.values()) <= 10:  # rare words tell what unknown ones are like
                for suffix in _suffixes(word):
                    ends[suffix].update(counts)
        self._ends = dict(ends)
        self._known: dict[str, torch.Tensor] = {}
        self.scores = self._chain(pairs, firsts, lasts)

    def _counts(self, counts: Counter[str]) -> torch.Tensor:
        found = [0.0] * len(self.tags)
        for tag, count in counts.items():
            found[self._number[tag]] = float(count)
        return torch.tensor(found, dtype=torch.float64)

    def _chain(self, pairs: Counter[tuple[str, str]], firsts: Counter[str], lasts: Counter[str]) -> Scores:
        alone = self._each / self._each.sum()
        after = torch.zeros(len(self.tags), len(self.tags), dtype=torch.float64)
        for (before, tag), count in pairs.items():
            after[self._number[before], self._number[tag]] = count
        first = _smoothed(self._counts(firsts), alone)
        step = torch.stack([_smoothed(counts, alone) for counts in after])
        ended = (self._counts(lasts) + 0.5) / (self._each + 1)
        return Scores(first.log().float(), (step * (1 - ended)[:, None]).log().float(), ended.log().float())

    def emissions(self, words: Sequence[str]) -> torch.Tensor:
        """Log p(word | tag), up to what all tags share: `[N, C]`."""
        for word in words:
            if word not in self._known:
                self._known[word] = self._emission(word)
        return torch.stack([self._known[word] for word in words])

    def _emission(self, word: str) -> torch.Tensor:
        """By Bayes: p(tag | word) / p(tag)."""
        alone = self._each / self._each.sum()
        likely = alone
        for suffix in reversed(_suffixes(word)):  # from the shortest on, each smoothed by the one before
            if suffix in self._ends:
                likely = _smoothed(self._counts(self._ends[suffix]), likely)
        if word in self._words:
            likely = _smoothed(self._counts(self._words[word]), likely)
        return (likely / alone).log().float()


def _suffixes(word: str) -> list[str]:
    """Ends of a word, the longest first, with whether it has a capital and a digit."""
    kind = f"{word[:1].isupper():d}{any(letter.isdigit() for letter in word):d}"
    return [f"{kind}:{word[-size:].lower()}" for size in range(min(SUFFIX, len(word)), 0, -1)] + [f"{kind}:"]


def _smoothed(counts: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Counts as probabilities; as many as there are kinds go to what a coarser model says."""
    kinds = float((counts > 0).sum())
    total = float(counts.sum())
    if math.isclose(total, 0):
        return before
    found: torch.Tensor = (counts + kinds * before) / (total + kinds)
    return found
