"""Several tokens in one step: guesses at what comes next, which the model then confirms or not.

The model computes logits at every guessed place at once and draws there from (seed, choice, position), as it would
have done one step later; a guess is right if it equals the draw (the engine's part). So the tokens are those without
guesses, greedy or sampled, and only their speed depends on this file: whether to guess, for whom, and how far.

A step costs about `STEP_ROWS` rows before it has any: weights are read once, however many rows use them. One more
guess costs a row and brings a token with the probability that all guesses up to it are right; it is made while that is
a better price than the step's own tokens have. Alone a sequence gets long guesses, in a crowd only sure ones, and
beyond some dozens of sequences hardly any.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

from steelyard.infer.scheduler import Scheduled
from steelyard.infer.sequence import Sequence

STEP_ROWS = 8
"""What a step costs before it has any row, in rows (SmolLM2 in int8, two cores: a step of 8 takes twice one of 1)."""
LONGEST = 10
"""Most guesses for a sequence in a step: with its own token they fill one tile of the products (12 rows)."""
MARGIN = 1.1
"""How much better than the step's own tokens a guess must promise to be: some of its price is not in the rows."""
KEEP = 0.8
"""How much of what was seen of a sequence's guesses still counts after the next ones."""
PRIOR_WEIGHT = 2.0
"""How many guesses the expectation before the first one is worth."""
FIRST_REST, LONGEST_REST = 8, 128
"""Steps until a sequence is tried again for which guessing has stopped to pay: doubling with every wrong try."""
CROWD = 16
"""In steps with more sequences than this nobody is tried again."""


class Proposer(Protocol):
    """Guesses."""

    prior: float
    """How often a guess is right, before anything is known."""

    def row_cost(self, rows: int) -> float:
        """What a guess for each of `rows` sequences costs, in rows each: that of confirming it is 1."""
        ...

    def propose(self, lengths: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Guesses at the next tokens of sequences: at most as many as asked for, or none."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended, or was never known."""
        ...


@dataclass(slots=True)
class Confidence:
    """How well a sequence's guesses have done."""

    right: float
    tried: float = PRIOR_WEIGHT
    rest: int = 0
    """Steps until it is tried again, where it would not pay by its rate."""
    patience: int = FIRST_REST // 2

    @property
    def rate(self) -> float:
        """How often a guess is right if those before it were."""
        return self.right / self.tried

    def observe(self, proposed: int, accepted: int) -> None:
        """Take in that of `proposed` guesses the first `accepted` were right."""
        self.right = KEEP * self.right + accepted
        self.tried = KEEP * self.tried + min(accepted + 1, proposed)
        self.patience = FIRST_REST if accepted else min(2 * self.patience, LONGEST_REST)
        self.rest = self.patience


def plan_lengths(wishes: Items[tuple[float, int]], decoding: int, room: int, row_cost: float) -> list[int]:
    """How many guesses to make for each sequence.

    Args:
        wishes: of each the rate at which its guesses are right, and the most that are of use.
        decoding: tokens that the step brings without guesses.
        room: most guesses altogether.
        row_cost: of a guess, in rows.
    """
    lengths = [0] * len(wishes)
    tokens, cost = float(decoding), STEP_ROWS + float(decoding)
    surest_first = sorted(range(len(wishes)), key=lambda place: -wishes[place][0])
    for depth in range(1, LONGEST + 1):
        for place in surest_first:
            rate, limit = wishes[place]
            gain = rate**depth
            if lengths[place] < depth - 1 or depth > limit:
                continue
            if not room or gain * cost <= MARGIN * tokens * row_cost:
                break  # the others are less sure
            lengths[place] = depth
            tokens, cost, room = tokens + gain, cost + row_cost, room - 1
    return lengths


class Speculation:
    """Decides for whom to guess and how far, and remembers how it went.

    Args:
        proposer: makes the guesses.
        context: most tokens of a sequence.
    """

    def __init__(self, proposer: Proposer, context: int) -> None:
        self.proposer, self.context = proposer, context
        self._confidence: dict[Sequence, Confidence] = {}

    def propose(self, batch: Items[Scheduled], room: int) -> dict[Sequence, list[int]]:
        """Guesses for a step's sequences, `room` at most altogether."""
        decoding = [work.sequence for work in batch if work.count == work.draws == 1]
        limits = {sequence: limit for sequence in decoding if (limit := self._limit(sequence)) > 0}
        if not limits or room <= 0:
            return {}
        known = [
            self._confidence.setdefault(sequence, Confidence(self.proposer.prior * PRIOR_WEIGHT)) for sequence in limits
        ]
        wishes = [(confidence.rate, limit) for confidence, limit in zip(known, limits.values(), strict=True)]
        lengths = plan_lengths(wishes, len(decoding), room, self.proposer.row_cost(len(limits)))
        room -= sum(lengths)
        wanted: dict[Sequence, int] = {}
        for sequence, confidence, length in zip(limits, known, lengths, strict=True):
            if length == 0 and confidence.rest == 0 and room and len(decoding) <= CROWD:
                length, room = 1, room - 1
            confidence.rest = max(0, confidence.rest - 1)
            if length:
                wanted[sequence] = length
        return self.proposer.propose(wanted) if wanted else {}

    def observe(self, sequence: Sequence, proposed: int, accepted: int) -> None:
        """Of `proposed` guesses for a sequence the first `accepted` were right."""
        self._confidence[sequence].observe(proposed, accepted)

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        self._confidence.pop(sequence, None)
        self.proposer.forget(sequence)

    def _limit(self, sequence: Sequence) -> int:
        """Most guesses of use: the draw after the last right one ends the answer or the context at the latest."""
        request = sequence.request
        if not request.speculate or request.beam is not None:
            return 0
        left = min(request.sampling.max_tokens - sequence.generated, self.context - len(sequence.tokens))
        return min(LONGEST, left - 1)
