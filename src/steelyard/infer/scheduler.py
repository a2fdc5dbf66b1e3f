"""Which sequences run in the next step, and how many of their tokens.

Every running sequence gets its next token before anybody gets a chunk of a prompt, and all of a step stays within a
token budget: a long prompt delays the others by one chunk at most. A row of logits is as wide as the vocabulary, so a
step has a limit of those, too. Who waits is let in by priority (interactive before batch), then by the project that has
been served least (a virtual token counter, Sheng et al. 2024), then by arrival.
When blocks run out the youngest running sequence of the lowest priority gives its own up and is computed again later:
nothing is lost but time. Knows nothing of tensors.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec

from steelyard.infer.adapters import Adapters
from steelyard.infer.blocks import BlockPool
from steelyard.infer.sequence import Sequence
from steelyard.infer.waiting import PRIORITIES, Waiting

GENERATED = 2  # a generated token counts as two of a prompt: it takes a step of its own


class Scheduled(msgspec.Struct, frozen=True):
    """A unit of work: tokens of a sequence after those that it has computed, and where logits are wanted."""

    sequence: Sequence
    count: int
    """How many tokens, drafted ones included."""
    wanted: int
    """Logits are wanted at this many of the last of them."""
    draft: tuple[int, ...] = ()
    """The last of the tokens: guesses at what follows the sequence's own."""

    @property
    def tokens(self) -> list[int]:
        """The tokens, `count` of them."""
        start = self.sequence.computed
        return [*self.sequence.tokens[start : start + self.count - len(self.draft)], *self.draft]

    @property
    def draws(self) -> int:
        """At how many of the last tokens a successor is drawn: the sequence's last, and every drafted one."""
        reached = self.sequence.computed + self.count - len(self.draft) == len(self.sequence.tokens)
        return 1 + len(self.draft) if reached and self.sequence.request.sampling.max_tokens else 0


class Scheduler:
    """The queues and the running set.

    Args:
        pool: the cache's blocks.
        token_budget: most tokens of one step.
        max_running: most sequences that run at once.
        logit_rows: most rows of logits of one step; at least `max_running`.
        adapters: a sequence runs when it has its adapter's place.
    """

    def __init__(
        self, pool: BlockPool, token_budget: int, max_running: int, logit_rows: int, adapters: Adapters
    ) -> None:
        assert logit_rows >= max_running, "every running sequence may draw"
        self.pool, self.block_size, self.adapters = pool, pool.block_size, adapters
        self.token_budget, self.max_running, self.logit_rows = token_budget, max_running, logit_rows
        self.waiting: Waiting[Sequence] = Waiting()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prompt_tokens = 0
        """Of the requests that have begun to run."""
        self.looked_up, self.found = 0, 0
        """Tokens that were looked for in the cache when their sequence first ran, and those that were there."""

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.adapters.hold(sequence.adapter)
        self.waiting.add(sequence, self._active())

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that ended or was aborted, and free its blocks."""
        self.pool.release(sequence.block_table)
        if sequence in self.running:
            self.running.remove(sequence)
            self.adapters.leave(sequence.adapter)
        else:
            self.waiting.remove(sequence)
        self.adapters.release(sequence.adapter)
        self.waiting.forget(self._active())

    def schedule(self) -> list[Scheduled]:
        """The next step's work; empty only when there is none."""
        batch: dict[Sequence, Scheduled] = {}
        budget = self.token_budget
        # Whoever runs in this step may draw once; the rows beyond are for those that want more.
        spare = self.logit_rows - min(self.max_running, len(self.running) + len(self.waiting))
        # Single tokens first, then prompts that have begun, in the order of their beginning.
        for sequence in sorted(self.running, key=lambda sequence: len(sequence.tokens) - sequence.computed > 1):
            if sequence not in self.running or budget == 0:
                continue  # preempted for an older one, or its turn comes next step
            if sequence.waits:
                continue
            work = _piece(sequence, sequence.computed, budget, spare)
            if self._make_room(sequence, work.count, batch):
                batch[sequence] = work
                budget, spare = budget - work.count, spare - max(0, work.wanted - 1)
        self._let_newcomers_in(batch, budget, spare)
        return list(batch.values())

    def _let_newcomers_in(self, batch: dict[Sequence, Scheduled], budget: int, spare: int) -> None:
        """As many of those that wait as there is room for."""
        while budget:
            newcomer = self.waiting.next()
            places = sum(sequence.places for sequence in self.running)
            if newcomer is None or places + newcomer.places > self.max_running:
                break
            if not self._let_in(newcomer, budget, spare):
                break
            work = _piece(newcomer, newcomer.computed, budget, spare)
            self._grow(newcomer, work.count)
            batch[newcomer] = work
            budget, spare = budget - work.count, spare - max(0, work.wanted - 1)

    def fork(self, parent: Sequence, child: Sequence) -> list[tuple[int, int]]:
        """Let a sequence that goes on from another run beside it; which blocks are to be copied, (from, to).

        Where there is no block for what the last one holds, that is computed again.
        """
        full, rest = divmod(parent.computed, self.block_size)
        self.adapters.hold(child.adapter)
        if parent not in self.running or not self.adapters.seat(child.adapter):
            self.waiting.add(child, self._active(), first=True)
            return []
        for block in parent.block_table[:full]:
            self.pool.hold(block)
        child.block_table = parent.block_table[:full]
        child.computed, child.kept = full * self.block_size, min(parent.kept, full)
        self.running.append(child)
        if not rest or not self.pool.available:
            return []
        child.block_table.append(self.pool.allocate())
        child.computed = parent.computed
        return [(parent.block_table[full], child.block_table[full])]

    def room(self, batch: list[Scheduled]) -> int:
        """Drafted tokens that a step has room for beside what it computes anyway."""
        tokens, rows = sum(work.count for work in batch), sum(work.wanted for work in batch)
        return min(self.token_budget - tokens, self.logit_rows - rows)

    def lengthen(self, batch: list[Scheduled], drafts: Mapping[Sequence, list[int]]) -> list[Scheduled]:
        """The batch with drafted tokens after those that draw, as far as there are blocks that nobody holds."""
        assert sum(map(len, drafts.values())) <= max(0, self.room(batch))
        lengthened = []
        for work in batch:
            sequence = work.sequence
            fits = (len(sequence.block_table) + self.pool.available) * self.block_size - len(sequence.tokens)
            draft = tuple(drafts.get(sequence, [])[:fits])
            self._grow(sequence, work.count + len(draft))
            lengthened.append(Scheduled(sequence, work.count + len(draft), work.wanted + len(draft), draft))
        return lengthened

    def computed(self, batch: list[Scheduled]) -> None:
        """The cache now holds what the step wrote: count it as service, and let others find the full blocks.

        Drafted tokens are none of it until they are accepted.
        """
        for work in batch:
            sequence, count = work.sequence, work.count - len(work.draft)
            sequence.computed += count
            self._serve(sequence, GENERATED if count == 1 else count)
            full = sequence.computed // self.block_size
            if full > sequence.kept:
                chain = self._chain(sequence)
                for place in range(sequence.kept, full):
                    self.pool.keep(sequence.block_table[place], chain[place])
                sequence.kept = full

    def accept(self, sequence: Sequence, count: int) -> None:
        """Of a sequence's drafted tokens `count` are now its own; blocks for the others are given back."""
        sequence.computed += count
        self._serve(sequence, GENERATED * count)
        needed = -(-len(sequence.tokens) // self.block_size)
        beyond = sequence.block_table[needed:]
        del sequence.block_table[needed:]
        self.pool.release(beyond)

    def _serve(self, sequence: Sequence, tokens: int) -> None:
        project = sequence.request.project
        self.waiting.served[project] = self.waiting.served.get(project, 0) + tokens

    def _active(self) -> set[str]:
        return {sequence.request.project for sequence in self.running}

    def _chain(self, sequence: Sequence) -> list[bytes]:
        if not sequence.root:
            digest = "" if sequence.adapter is None else sequence.adapter.digest
            sequence.root = self.pool.root(sequence.request.project, digest)
        sequence.chain = self.pool.links(sequence.root, sequence.tokens, sequence.chain)
        return sequence.chain

    def _let_in(self, sequence: Sequence, budget: int, spare: int) -> bool:
        """Move a waiting sequence to the running ones, with the kept blocks that it begins with; False: no room yet.

        Another choice of a request waits for the first one's prompt, which it shares.
        """
        if any(self._shares(sequence, other) for other in self.running):
            return False
        found = self.pool.find(self._chain(sequence))
        # Tokens whose logits are wanted are computed: at least the last.
        found = found[: sequence.first_wanted // self.block_size]
        computed = len(found) * self.block_size
        count = _piece(sequence, computed, budget, spare).count
        missing = -(-(computed + count) // self.block_size) - len(found)
        if missing > self.pool.available - sum(map(self.pool.is_idle, found)):
            return False
        if not self.adapters.seat(sequence.adapter):
            return False
        for block in found:
            self.pool.hold(block)
        sequence.block_table.extend(found)
        sequence.computed, sequence.kept = computed, len(found)
        if sequence.fresh:  # what a preempted one finds again it had computed itself
            sequence.reused, sequence.fresh, sequence.scheduled = computed, False, time.monotonic()
            counted = sequence.choice == 0 and sequence.request.counted
            self.prompt_tokens += len(sequence.request.prompt) if counted else 0
            if self.pool.reuse:
                self.looked_up, self.found = self.looked_up + len(sequence.tokens), self.found + computed
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return True

    def _shares(self, sequence: Sequence, other: Sequence) -> bool:
        """Whether another choice of the same request is scoring the prompt, or computing blocks that can be shared."""
        if sequence.request is not other.request or other.waits:
            return False
        full = (len(sequence.request.prompt) - 1) // self.block_size
        return other.scored < other.to_score or (self.pool.reuse and other.kept < full)

    def _missing(self, sequence: Sequence, count: int) -> int:
        blocks = -(-(sequence.computed + count) // self.block_size)
        return max(0, blocks - len(sequence.block_table))

    def _grow(self, sequence: Sequence, count: int) -> None:
        for _ in range(self._missing(sequence, count)):
            sequence.block_table.append(self.pool.allocate())

    def _make_room(self, sequence: Sequence, count: int, batch: dict[Sequence, Scheduled]) -> bool:
        """Blocks for `count` more tokens, taken from younger sequences if need be; False if it gave up its own."""
        while self._missing(sequence, count) > self.pool.available:
            # The youngest of the lowest priority that has any.
            holders = [other for other in self.running if other.block_table or other is sequence]
            last = max(holders, key=lambda other: PRIORITIES.index(other.request.priority))
            youngest = [other for other in holders if other.request.priority == last.request.priority][-1]
            idle = [other for other in holders if other.waits]
            if youngest is sequence and idle:
                youngest = idle[-1]  # who waits for it has no use for blocks before it
            self._preempt(youngest)
            batch.pop(youngest, None)  # it may have had its turn in this step already
            if youngest is sequence:
                return False
        self._grow(sequence, count)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        sequence.computed = sequence.kept = 0
        self.preemptions += 1
        if sequence.request.beam is not None:
            return  # its place is its search's, so that this always goes on
        self.running.remove(sequence)
        self.adapters.leave(sequence.adapter)
        self.waiting.add(sequence, self._active(), first=True)


def _piece(sequence: Sequence, computed: int, budget: int, spare: int) -> Scheduled:
    """The next tokens of a sequence: at most `budget`, of which at most `spare` + 1 want logits."""
    before = sequence.first_wanted - computed
    count = min(len(sequence.tokens) - computed, budget, before + 1 + spare)
    return Scheduled(sequence, count, wanted=max(0, count - before))
