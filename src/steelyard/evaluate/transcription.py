"""How far texts are from what was said: edits a character and a word, with an interval."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np

DRAWS = 1000
"""Of the bootstrap."""


def edits(truth: Sequence[Hashable], said: Sequence[Hashable]) -> int:
    """The fewest insertions, deletions and substitutions that lead from one to the other (Levenshtein 1966)."""
    above = list(range(len(said) + 1))
    for row, wanted in enumerate(truth, 1):
        current = [row]
        for column, found in enumerate(said, 1):
            swapped = above[column - 1] + (wanted != found)
            current.append(min(swapped, above[column] + 1, current[-1] + 1))
        above = current
    return above[-1]


def character_error_rate(truth: Sequence[str], said: Sequence[str]) -> float:
    """Edits of characters over all characters that were said."""
    return error_rate(truth, said, list)[0]


def error_rate(
    truth: Sequence[str], said: Sequence[str], parts: Callable[[str], list[str]], seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Edits over parts (characters, words) of all rows, and the interval of 95% by drawing rows anew (Efron 1979)."""
    pairs = [(parts(one), parts(other)) for one, other in zip(truth, said, strict=True)]
    counts = np.array([(edits(one, other), len(one)) for one, other in pairs])
    draw = np.random.Generator(np.random.Philox(seed)).integers(0, len(counts), (DRAWS, len(counts)))
    sums = counts[draw].sum(1)
    low, high = np.quantile(sums[:, 0] / np.maximum(1, sums[:, 1]), (0.025, 0.975))
    return float(counts[:, 0].sum() / max(1, counts[:, 1].sum())), (float(low), float(high))
