"""How likely a character is after those before it: counts of the texts that a recogniser learnt from.

What a context has not shown is left to the context that is a character shorter, by as much as it showed new things
(Witten and Bell 1991); the shortest knows every character of the texts, and one that they do not have, alike.

ngram.json: {"order": 5, "counts": {"the qu": ...}}, of each context the characters after it and how often each was.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import msgspec

from steelyard.errors import CheckpointError

FILE = "ngram.json"
MOST_BYTES = 1 << 28
MOST_ORDER = 16
EDGE = "\n"
"""Before the first character of a text, and after its last."""


class _Stored(msgspec.Struct, frozen=True):
    order: int
    counts: dict[str, dict[str, int]]


class CharacterModel:
    """The counts.

    Args:
        order: a character is known by so many before it, less one.
        counts: by context, from the empty one on.
    """

    def __init__(self, order: int, counts: dict[str, dict[str, int]]) -> None:
        self.order, self._counts = order, counts
        self._totals = {context: (sum(after.values()), len(after)) for context, after in counts.items()}
        self._letters = len(counts.get("", {})) + 1
        self._known: dict[tuple[str, str], float] = {}

    @classmethod
    def learn(cls, texts: Iterable[str], order: int) -> CharacterModel:
        """Count the characters of texts; an `EDGE` in one is a space."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for text in texts:
            whole = EDGE + text.replace(EDGE, " ") + EDGE
            for place in range(1, len(whole)):
                for size in range(min(order - 1, place) + 1):
                    counts[whole[place - size : place]][whole[place]] += 1
        return cls(order, {context: dict(after) for context, after in counts.items()})

    def log_probability(self, before: str, letter: str) -> float:
        """Of a character after what was said, in nats.

        Args:
            before: the text so far; what stands before it is an edge.
            letter: a character, or `EDGE`: the text ends.
        """
        context = (EDGE + before)[-(self.order - 1) :] if self.order > 1 else ""
        found = self._known.get((context, letter))
        if found is None:
            found = self._known[context, letter] = math.log(self._probability(context, letter))
        return found

    def _probability(self, context: str, letter: str) -> float:
        shorter = self._probability(context[1:], letter) if context else 1 / self._letters
        if context not in self._counts:
            return shorter
        total, kinds = self._totals[context]
        return (self._counts[context].get(letter, 0) + kinds * shorter) / (total + kinds)

    def save(self, folder: Path) -> None:
        """Write the file into a checkpoint's folder."""
        (folder / FILE).write_bytes(msgspec.json.encode(_Stored(self.order, self._counts)))

    @classmethod
    def load(cls, folder: Path) -> CharacterModel | None:
        """Of a checkpoint; None: it has none.

        Raises:
            CheckpointError: the file is too large, or has something else.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        if path.stat().st_size > MOST_BYTES:
            raise CheckpointError(f"'{path}' is larger than {MOST_BYTES >> 20} MB")
        try:
            stored = msgspec.json.decode(path.read_bytes(), type=_Stored)
        except msgspec.MsgspecError as error:
            raise CheckpointError(f"'{path}' holds no counts of characters: {error}") from None
        whole = all(after and min(after.values()) > 0 for after in stored.counts.values())
        if not 1 <= stored.order <= MOST_ORDER or not whole:
            raise CheckpointError(f"'{path}': order must be 1 to {MOST_ORDER}, and every count at least 1")
        return cls(stored.order, stored.counts)
