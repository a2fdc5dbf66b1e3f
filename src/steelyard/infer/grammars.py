"""Constrained decoding: which tokens may come next, so that an answer is what a grammar says, whatever is drawn.

A grammar is compiled once and kept for others who ask for it. Its state after each sequence's tokens says which tokens
are allowed; where only one text can follow, its tokens are taken as they are, and not drawn.
"""

# V vocabulary

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from threading import Lock

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from steelyard.errors import RequestError
from steelyard.kernels.draw import NEVER
from steelyard.text.grammar_worker import LIMITS
from steelyard.text.tokenizer import Tokenizer

KEPT = 64
"""Compiled grammars."""
Ceiling = NDArray[np.float32]
"""`[V]`: the most that each token's logit may be."""
BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
CEILINGS: Ceiling = np.where(BITS, np.inf, NEVER).astype(np.float32)
"""`[256, 8]`: of eight tokens, by the byte that says which of them may come next."""


class State:
    """Where a sequence stands in its grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def copy(self) -> State:
        """Another that goes on from here."""
        return State(self._matcher.deep_copy(), self._vocabulary)

    def ceiling(self) -> Ceiling:
        """`[V]`: infinite for tokens that may come next, `NEVER` for all others; of a `broken` one, whichever."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        known = np.take(CEILINGS, bits, axis=0).reshape(-1)[: self._vocabulary]
        found = np.full(self._vocabulary, NEVER, np.float32)
        found[: len(known)] = known
        return found

    def after(self, drafts: Sequence[int]) -> list[Ceiling]:
        """What is allowed now, and after each of some guesses, as far as they are allowed."""
        found = [self.ceiling()]
        ahead = self.copy() if drafts else self  # a guess that is too hard to follow breaks the copy alone
        for token in drafts:
            if found[-1][token] < 0 or ahead._matcher.try_consume_tokens([token]) != 1:
                break
            found.append(ahead.ceiling())
        return found

    def take(self, token: int) -> None:
        """A token was drawn; one that is not allowed ends nothing but this state."""
        self._matcher.consume_token(token)

    @property
    def broken(self) -> bool:
        """Whether finding out what is allowed took more than there is for it."""
        return self._matcher.is_error()

    @property
    def done(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped()

    def forced(self) -> list[int]:
        """Tokens of the text that has to follow; taken in by `take`, like all others."""
        return list(self._matcher.compute_ff_tokens())


class Grammars:
    """Compiled grammars of one model.

    Args:
        tokenizer: the model's.
        vocabulary: V, which may be more than the tokenizer has.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self._plain, self._vocabulary = tokenizer, vocabulary
        self._known: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = Lock()

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """The vocabulary as a tree, which takes a third of a second to grow."""
        return LLTokenizer(self._plain.serialized, n_vocab=self._vocabulary, eos_token=sorted(self._plain.eos_ids))

    def begin(self, grammar: str, field: str = "response_format") -> State:
        """The state before the first token. Any thread may ask.

        Args:
            grammar: as `steelyard.text.grammar` makes it.
            field: where it came from, for errors.

        Raises:
            RequestError: it does not compile within its limits, or the model has no end token to say that it is over.
        """
        if not self._plain.eos_ids:
            reason = "this model has no token that ends an answer, which grammars need"
            raise RequestError(reason, param=field)
        with self._lock:
            if grammar not in self._known:
                try:
                    matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
                except ValueError as error:  # of the tokenizer
                    reason = f"this model's tokenizer is none that grammars know: {error}"
                    raise RequestError(reason, param=field) from None
                if matcher.is_error():
                    told = " ".join(matcher.get_error().split())[:300]
                    raise RequestError(f"the grammar does not compile: {told}", param=field)
                self._known[grammar] = matcher
                while len(self._known) > KEPT:
                    self._known.popitem(last=False)
            self._known.move_to_end(grammar)
            return State(self._known[grammar].deep_copy(), self._vocabulary)


class Beside:
    """What grammars allow at the places of a step, found out by a thread of its own while the model computes them."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "ceilings")

    def begin(self, drafts: Mapping[State, Sequence[int]]) -> Future[dict[State, list[Ceiling]]]:
        """Ask what is `after` the guesses at each state's tokens; until it is there, nobody may touch the states."""
        if drafts:
            return self._thread.submit(lambda: {state: state.after(tokens) for state, tokens in drafts.items()})
        nothing = Future[dict[State, list[Ceiling]]]()
        nothing.set_result({})
        return nothing
