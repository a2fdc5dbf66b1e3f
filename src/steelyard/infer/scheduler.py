"""Which sequences run in the next step, and how many of their tokens: a token budget, blocks, first come first served.

Every running sequence gets its next token before a waiting one gets a chunk of its prompt. When blocks run out the
youngest running sequence gives its own up and is computed again later: nothing is lost but time.
Knows nothing of tensors.
"""

from __future__ import annotations

from collections import deque

import msgspec

from steelyard.infer.kv_cache import BlockPool
from steelyard.infer.sequence import Sequence


class Scheduled(msgspec.Struct, frozen=True):
    """`count` tokens of a sequence, after those that it has computed."""

    sequence: Sequence
    count: int

    @property
    def draws(self) -> bool:
        """Whether the step reaches the sequence's last token, so that its successor can be drawn."""
        return self.sequence.computed + self.count == len(self.sequence.tokens)


class Scheduler:
    """The queue and the running set.

    Args:
        pool: the cache's blocks.
        block_size: tokens of a block.
        token_budget: most tokens of one step.
        max_running: most sequences that run at once.
    """

    def __init__(self, pool: BlockPool, block_size: int, token_budget: int, max_running: int) -> None:
        self.pool, self.block_size = pool, block_size
        self.token_budget, self.max_running = token_budget, max_running
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that ended or was aborted, and free its blocks."""
        self.pool.release(sequence.block_table)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Scheduled]:
        """The next step's work; empty only when there is none."""
        batch: list[Scheduled] = []
        budget = self.token_budget
        for sequence in list(self.running):
            if sequence not in self.running or budget == 0:
                continue  # preempted for an older one, or its turn comes next step
            count = min(len(sequence.tokens) - sequence.computed, budget)
            if self._make_room(sequence, count):
                batch.append(Scheduled(sequence, count))
                budget -= count
        while self.waiting and budget and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            count = min(len(sequence.tokens), budget)
            if self._missing(sequence, count) > len(self.pool.free):
                break
            self.running.append(self.waiting.popleft())
            self._grow(sequence, count)
            batch.append(Scheduled(sequence, count))
            budget -= count
        return batch

    def _missing(self, sequence: Sequence, count: int) -> int:
        blocks = -(-(sequence.computed + count) // self.block_size)
        return max(0, blocks - len(sequence.block_table))

    def _grow(self, sequence: Sequence, count: int) -> None:
        for _ in range(self._missing(sequence, count)):
            sequence.block_table.append(self.pool.allocate())

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Blocks for `count` more tokens, taken from younger sequences if need be; False if it gave up its own."""
        while self._missing(sequence, count) > len(self.pool.free):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        self._grow(sequence, count)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        sequence.computed = 0
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1
