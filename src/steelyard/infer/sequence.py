"""One choice of one request while the engine works on it: its tokens, its blocks, its text so far."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items

from steelyard.infer.adapters import Version
from steelyard.infer.grammars import State
from steelyard.infer.request import FinishReason, Request
from steelyard.text.detokenizer import Detokenizer
from steelyard.text.stop import StopStrings
from steelyard.text.tokenizer import Tokenizer


class Sequence:
    """Tokens are the prompt and what was generated; the first `computed` of them have keys and values in the cache.

    Args:
        request: what is asked.
        choice: which of its n choices this is.
        seed: what its draws are keyed by.
        tokenizer: turns its tokens into text.
        adapter: the version that it wears to its end; None is the base model.
        arrived: when the request came, in seconds of the monotonic clock.
        grammar: where it stands in the grammar that it is held to, which is its own.
    """

    def __init__(
        self,
        request: Request,
        choice: int,
        seed: int,
        tokenizer: Tokenizer,
        adapter: Version | None = None,
        arrived: float = 0.0,
        grammar: State | None = None,
    ) -> None:
        self.request, self.choice, self.seed, self.adapter = request, choice, seed, adapter
        self.tokens, self.grammar = list(request.prompt), grammar
        self.computed = 0
        self.block_table: list[int] = []
        self.root = b""
        self.chain: list[bytes] = []  # links of its full blocks, as far as anybody has asked
        self.kept = 0  # of its full blocks, how many others can find
        self.fresh = True  # it has not run yet
        self.arrived, self.scheduled, self.first_token = arrived, 0.0, 0.0  # moments; 0 is not yet
        self.reused = 0  # prompt tokens that were found in the cache when it first ran
        self._tokenizer, self.detokenizer = tokenizer, Detokenizer(tokenizer)
        self.stop_strings = StopStrings(request.sampling.stop)
        self.counts: dict[int, int] = {}  # how often each token was generated, for the penalties
        self.finish_reason: FinishReason | None = None
        self.places = 1  # how many of the engine's running sequences it counts as
        self.waits = False  # it has said what follows, and others of its request have not yet
        scores = request.sampling.prompt_logprobs is not None and choice == 0
        self.to_score = len(request.prompt) - 1 if scores else 0
        self.scored = 0  # of the prompt's tokens, how many have told how likely their successor was

    @property
    def first_wanted(self) -> int:
        """The first token whose logits are still wanted: the last, or of a prompt that is scored the next."""
        return self.scored if self.scored < self.to_score else len(self.tokens) - 1

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt)

    def counts_after(self, tokens: Items[int]) -> Mapping[int, int]:
        """How often each token will have been generated once these are, too."""
        if not tokens:
            return self.counts
        counts = dict(self.counts)
        for token in tokens:
            counts[token] = counts.get(token, 0) + 1
        return counts

    def fork(self) -> Sequence:
        """Another that goes on from here; its blocks are the scheduler's to give."""
        other = Sequence(self.request, self.choice, self.seed, self._tokenizer, self.adapter, self.arrived)
        other.tokens, other.counts = list(self.tokens), dict(self.counts)
        other.grammar = None if self.grammar is None else self.grammar.copy()
        other.root, other.chain = self.root, list(self.chain)
        other.fresh, other.reused = self.fresh, self.reused
        other.scheduled, other.first_token, other.scored = self.scheduled, self.first_token, self.scored
        return other

    def add(self, token: int) -> None:
        """Take in a token that may be given up again; its text and its end are others' to see."""
        self.tokens.append(token)
        self.counts[token] = self.counts.get(token, 0) + 1
        if self.grammar is not None:
            self.grammar.take(token)

    def append(self, token: int, end_tokens: frozenset[int], context: int) -> str:
        """Take a drawn token in; returns the text that is now certain and sets `finish_reason` at the end."""
        sampling = self.request.sampling
        self.add(token)
        ends = token in sampling.stop_token_ids or (token in end_tokens and not sampling.ignore_eos)
        text, stopped = ("", False) if ends else self.stop_strings.push(self.detokenizer.push(token))
        if ends or stopped or (self.grammar is not None and self.grammar.done):
            self.finish_reason = "stop"
        elif self.generated >= sampling.max_tokens or len(self.tokens) >= context:
            self.finish_reason = "length"
        if self.finish_reason is not None and not stopped:
            tail, stopped = self.stop_strings.push(self.detokenizer.flush())
            text += tail
            if stopped:
                self.finish_reason = "stop"
            else:
                text += self.stop_strings.flush()
                if self.stop_strings.stopped:
                    self.finish_reason = "stop"
        return text
