"""What a language model is held against: xz, and a model of n bytes (Witten and Bell 1991), in bits of one text."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import numpy as np

END = 0
"""Stands between texts."""


def texts(path: Path) -> list[str]:
    """The texts of JSONL rows."""
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def xz_bits(known: list[str], unknown: list[str]) -> int:
    """How much longer xz's file becomes by the unknown texts, when it has the known ones before it."""
    before, after = "\n".join(known).encode(), "\n".join([*known, *unknown]).encode()
    settings = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 27}]
    sizes = [len(lzma.compress(text, lzma.FORMAT_XZ, filters=settings)) for text in (before, after)]
    return 8 * (sizes[1] - sizes[0])


def bits(known: list[str], unknown: list[str], order: int) -> float:
    """-log2 p of the bytes of unknown texts, each by the `order - 1` bytes before it, as often as in the known ones.

    What a context has not shown is left to the context that is a byte shorter, by as much as it showed new things.
    """
    learnt, asked = (_joined(part, order) for part in (known, unknown))
    scored = np.arange(order - 1, len(asked))
    scored = scored[asked[scored] != END]
    likely = np.full(len(scored), 1 / 256)
    for size in range(order):
        grams, counts = np.unique(_keys(learnt, size + 1, np.arange(order - 1, len(learnt))), return_counts=True)
        contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
        totals, kinds = np.add.reduceat(counts, first), np.diff(np.append(first, len(grams)))
        wanted = _keys(asked, size + 1, scored)
        count = _look(grams, counts, wanted)
        total, kind = (_look(contexts, values, wanted >> np.uint64(8)) for values in (totals, kinds))
        seen = total > 0
        likely[seen] = (count[seen] + kind[seen] * likely[seen]) / (total[seen] + kind[seen])
    return float(-np.log2(likely).sum())


def _joined(parts: list[str], order: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    between = bytes([END]) * (order - 1)
    return np.frombuffer(between + between.join(text.encode() for text in parts), np.uint8)


def _keys(
    content: np.ndarray[tuple[int], np.dtype[np.uint8]], size: int, ends: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """The `size` bytes up to each place, as one number, the last byte lowest."""
    found = np.zeros(len(ends), np.uint64)
    for back in range(size - 1, -1, -1):
        found = (found << np.uint64(8)) | content[ends - back].astype(np.uint64)
    return found


def _look(
    known: np.ndarray[tuple[int], np.dtype[np.uint64]],
    values: np.ndarray[tuple[int], np.dtype[np.int64]],
    wanted: np.ndarray[tuple[int], np.dtype[np.uint64]],
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[places] == wanted, values[places], 0)
