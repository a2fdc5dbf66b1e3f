"""Texts that are nearly the same, found without comparing all pairs: MinHash and banding (Broder 1997).

Two texts are as alike as the sets of their runs of five words: Jaccard, shared runs over all runs. Hashes find who may
be alike enough; the sets themselves then decide, so nothing is called a duplicate that is none.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RUN = 5
"""Words of a run; a shorter text is one run."""
HASHES = 128
BANDS = {0.9: 16, 0.7: 32, 0.0: 64}
"""From how alike on -> into how many bands the hashes are cut: the more, the less alike is found; one pair
in a thousand at the threshold is not."""
Telling = Callable[[int, int], None]
WORD = re.compile(r"\w+")

SEEDS = np.random.default_rng(5).integers(0, 1 << 63, HASHES).astype(np.uint64)


def runs(text: str) -> frozenset[int]:
    """The hashed runs of a text, in small letters; of a text without words, the text itself."""
    words = WORD.findall(text.lower())
    if len(words) <= RUN:
        return frozenset({zlib.crc32(" ".join(words or [text.strip()]).encode())})
    joined = (" ".join(words[start : start + RUN]) for start in range(len(words) - RUN + 1))
    return frozenset(zlib.crc32(run.encode()) for run in joined)


def alike(one: frozenset[int], other: frozenset[int]) -> float:
    """Jaccard's likeness, 0 to 1."""
    return len(one & other) / len(one | other)


def twins(texts: Sequence[str], threshold: float, report: Telling = lambda done, of: None) -> list[int]:
    """For each text the first one that it is nearly the same as: its own number, if there is none before it."""
    index = _Index(threshold)
    sets: list[frozenset[int]] = []
    firsts: list[int] = []
    for number, text in enumerate(texts):
        own = runs(text)
        sets.append(own)
        bands = index.bands(own)
        found = next((other for other in index.candidates(bands) if alike(own, sets[other]) >= threshold), number)
        firsts.append(found)
        if found == number:  # what is like a twin is like its first, or stands for itself
            index.add(bands, number)
        report(number + 1, len(texts))
    return firsts


def leaks(
    learnt: Sequence[str], held: Sequence[str], threshold: float, report: Telling = lambda done, of: None
) -> dict[int, int]:
    """Texts of `held` that are nearly those of `learnt`: number -> the other's number."""
    index, sets = _Index(threshold), [runs(text) for text in learnt]
    for number, own in enumerate(sets):
        index.add(index.bands(own), number)
    found: dict[int, int] = {}
    for number, text in enumerate(held):
        own = runs(text)
        for other in index.candidates(index.bands(own)):
            if alike(own, sets[other]) >= threshold:
                found[number] = other
                break
        report(number + 1, len(held))
    return found


class _Index:
    """Who shares a band of hashes with whom."""

    def __init__(self, threshold: float) -> None:
        self.count = next(bands for least, bands in BANDS.items() if threshold >= least)
        self.buckets: list[dict[bytes, list[int]]] = [{} for _ in range(self.count)]

    def bands(self, own: frozenset[int]) -> list[bytes]:
        """The least of each hash over a text's runs, in bands."""
        values = np.fromiter(own, np.uint64, len(own))
        least: NDArray[Any] = np.full(HASHES, np.iinfo(np.uint64).max, np.uint64)
        for start in range(0, len(values), 4096):
            least = np.minimum(least, _mixed(values[start : start + 4096, None] ^ SEEDS).min(0))
        return [band.tobytes() for band in np.split(least, self.count)]

    def add(self, bands: Sequence[bytes], number: int) -> None:
        for bucket, band in zip(self.buckets, bands, strict=True):
            bucket.setdefault(band, []).append(number)

    def candidates(self, bands: Sequence[bytes]) -> Iterator[int]:
        """Texts that share a band, the first of them first, each once."""
        found = {number for bucket, band in zip(self.buckets, bands, strict=True) for number in bucket.get(band, ())}
        yield from sorted(found)


def _mixed(values: NDArray[Any]) -> NDArray[Any]:
    """Every bit by every other (the finish of splitmix64: Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[Any] = values ^ (values >> np.uint64(31))
    return mixed
