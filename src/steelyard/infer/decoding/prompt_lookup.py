"""Guesses without a model: what followed the last time that the same tokens stood there (Saxena 2023).

Texts that quote their prompt, such as summaries, edits, code and tables, repeat long runs of it. Looking up takes the
same time however long the text is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from steelyard.infer.sequence import Sequence

GRAM = 3
"""This many last tokens must have stood there before."""


@dataclass(slots=True)
class Places:
    """Where each run of `GRAM` tokens was last seen."""

    after: dict[tuple[int, ...], int] = field(default_factory=dict)
    """The place of the token that followed, by run."""
    read: int = GRAM
    """Runs that are followed by a token before this place are in `after`."""

    def find(self, tokens: list[int]) -> int | None:
        """The place after the last earlier occurrence of the text's last run; None: there is none."""
        for place in range(self.read, len(tokens)):
            self.after[tuple(tokens[place - GRAM : place])] = place
        self.read = max(self.read, len(tokens))
        return self.after.get(tuple(tokens[-GRAM:]))


class PromptLookup:
    """Looks up in each sequence's own prompt and answer."""

    prior = 0.6

    def __init__(self) -> None:
        self._places: dict[Sequence, Places] = {}

    def row_cost(self, rows: int) -> float:
        """See `Proposer`: looking up costs nothing worth counting."""
        return 1.0

    def propose(self, lengths: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """See `Proposer`."""
        found = {}
        for sequence, length in lengths.items():
            tokens = sequence.tokens
            place = self._places.setdefault(sequence, Places()).find(tokens)
            if place is not None:
                # Where the run overlaps its own continuation, that goes on as it began.
                period = len(tokens) - place
                found[sequence] = [tokens[place + ahead % period] for ahead in range(length)]
        return found

    def forget(self, sequence: Sequence) -> None:
        """See `Proposer`."""
        self._places.pop(sequence, None)
