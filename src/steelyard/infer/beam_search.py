"""Beam search in the engine: the beginnings of a request are sequences of their own, which share their past's blocks.

A request begins as one sequence; after its prompt it forks. Where two go on from one, full blocks are held by both and
the last one, which is still being written, is copied. A step goes on with a request when all its beginnings have said
what follows; one that lost its blocks meanwhile is computed again first, and the others wait.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import torch

from steelyard.errors import RequestError
from steelyard.infer.decoding import sampling
from steelyard.infer.decoding.beam import Beams, Ended
from steelyard.infer.grammars import Ceiling
from steelyard.infer.request import Failure, Output, Request, Timeline
from steelyard.infer.runner import Runner
from steelyard.infer.scheduler import Scheduled, Scheduler
from steelyard.infer.sequence import Sequence
from steelyard.text.tokenizer import Tokenizer

NEUTRAL = {
    "top_p": (1.0,),
    "top_k": (0,),
    "min_p": (0.0,),
    "temperature": (0.0, 1.0),
    "stop": ((),),
    "logprobs": (None,),
    "prompt_logprobs": (None,),
}
"""What of a request's sampling means nothing to beams, at the values where it says nothing."""


@dataclass(slots=True)
class Search:
    """One request on its way."""

    beams: Beams
    members: list[Sequence]
    """Its beginnings, in the order of their rows."""
    first_token: float = 0.0
    drawn: int = 0
    """Tokens of all beginnings that were kept."""
    said: dict[Sequence, torch.Tensor] = field(default_factory=dict)
    """Of those that have been computed what follows: log-probabilities `[V]`."""


Said = list[Output | Failure]
"""What a request came to: an output for each continuation, or why there is none."""


def check(request: Request, most_running: int) -> None:
    """Refuse what beams do not do.

    Raises:
        RequestError: the field is named.
    """
    beam, said = request.beam, request.sampling
    assert beam is not None, "see the caller"
    if not 1 <= beam.width <= most_running:
        raise RequestError(f"the number of beams must be 1 to {most_running}", param="beam_width")
    if beam.groups < 1 or beam.width % beam.groups:
        raise RequestError(f"{beam.width} beams are not so many groups of equal size", param="num_beam_groups")
    if request.n > beam.width:
        raise RequestError(f"n must be at most the number of beams, {beam.width}", param="n")
    if not -10 <= beam.length_penalty <= 10:
        raise RequestError("length_penalty must be -10 to 10", param="length_penalty")
    if not 0 <= beam.diversity <= 1e6:
        raise RequestError("the diversity penalty must be 0 to 1000000", param="diversity_penalty")
    if said.max_tokens == 0:
        raise RequestError("beams are of at least one token", param="max_tokens")
    for name, values in NEUTRAL.items():
        if getattr(said, name) not in values:
            raise RequestError(f"{name} means nothing to beam search: leave it out", param=name)


class BeamSearch:
    """All of an engine's requests that are searched for.

    Args:
        scheduler: runs their sequences.
        runner: copies blocks.
        tokenizer: the model's.
        context: most tokens of a sequence.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, tokenizer: Tokenizer, context: int) -> None:
        self._scheduler, self._runner, self._tokenizer, self._context = scheduler, runner, tokenizer, context
        self._searches: dict[str, Search] = {}

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.request.id in self._searches

    def begin(self, sequence: Sequence) -> None:
        """A new request's only sequence so far."""
        request, given = sequence.request, sequence.request.sampling
        assert request.beam is not None, "it asks for beams"
        ends = frozenset(given.stop_token_ids) | (frozenset() if given.ignore_eos else self._tokenizer.eos_ids)
        most = min(given.max_tokens, self._context - len(request.prompt))
        sequence.places = request.beam.width
        says = None if sequence.grammar is None else self._bytes
        self._searches[request.id] = Search(Beams(request.beam, ends, most, says), [sequence])

    def _bytes(self, tokens: tuple[int, ...]) -> bytes:
        """A grammar allows every way to spell a text, most of which no model would choose."""
        return b"".join(map(self._tokenizer.token_bytes, tokens))

    def forget(self, request_id: str) -> None:
        """A request was aborted."""
        self._searches.pop(request_id, None)

    def take(self, work: Scheduled, logits: torch.Tensor, ceiling: Ceiling | None) -> bool:
        """Take in what follows a beginning, logits `[V]`, under its ceiling; False if not finite."""
        if not bool(logits.isfinite().all()):
            return False
        sequence = work.sequence
        own = logits.float().clone()
        sampling.adjust(own, sampling.Row(sequence.request.sampling, 0, 0, 0, sequence.counts))
        own = own.log_softmax(-1)
        if ceiling is not None:
            own.masked_fill_(torch.from_numpy(ceiling) < 0, -torch.inf)
        self._searches[sequence.request.id].said[sequence] = own
        sequence.waits = True
        return True

    def advance(self, now: float) -> tuple[dict[str, list[Sequence]], list[tuple[Sequence, Said]]]:
        """Go on with every request that can.

        Returns:
            The sequences of those that go on, by request; of the others, whose sequences are gone, the first, and what
            the request came to.
        """
        going, found = dict[str, list[Sequence]](), list[tuple[Sequence, Said]]()
        copies: list[tuple[int, int]] = []
        for id, search in list(self._searches.items()):
            if len(search.said) < len(search.members):
                continue
            first = search.members[0]
            steps = search.beams.advance(torch.stack([search.said[member] for member in search.members]))
            for member in search.members:
                member.waits = False
            search.said.clear()
            search.first_token = search.first_token or now
            search.drawn += max(1, len(steps))
            if steps:
                search.members = self._follow(search.members, [(step.row, step.token) for step in steps], copies)
                going[id] = search.members
                continue
            for member in search.members:
                self._scheduler.remove(member)
            del self._searches[id]
            found.append((first, self._said(first, search, now)))
        if copies:
            self._runner.copy_blocks(copies)
        return going, found

    def _said(self, first: Sequence, search: Search, now: float) -> Said:
        request, best = first.request, search.beams.best()[: first.request.n]
        if len(best) < request.n:
            return [Failure(request.id, f"{len(best)} continuations are possible here: ask for no more", "n")]
        said: Said = [self._told(first, choice, ended) for choice, ended in enumerate(best[:-1])]
        moments = {"arrived": first.arrived, "scheduled": first.scheduled, "first_token": search.first_token}
        last = msgspec.structs.replace(
            self._told(first, request.n - 1, best[-1]),
            rejected_tokens=max(0, search.drawn - sum(len(ended.tokens) for ended in best)),
            timeline=Timeline(**moments, last_token=now),
        )
        return [*said, last]

    def _told(self, first: Sequence, choice: int, ended: Ended) -> Output:
        """A continuation that a search came to."""
        told, tokens = Sequence(first.request, choice, first.seed, self._tokenizer, first.adapter), ended.tokens
        text = "".join(told.append(token, self._tokenizer.eos_ids, self._context) for token in tokens)
        return Output(
            id=first.request.id,
            choice=choice,
            text=text,
            tokens=list(tokens),
            finish_reason=told.finish_reason or "stop",
            prompt_tokens=len(first.request.prompt),
            completion_tokens=len(tokens),
            cached_tokens=first.reused,
            score=ended.score,
        )

    def _follow(
        self, members: list[Sequence], steps: list[tuple[int, int]], copies: list[tuple[int, int]]
    ) -> list[Sequence]:
        """The next beginnings; the last that goes on from one is that one itself."""
        last = {row: place for place, (row, _) in enumerate(steps)}
        for row, member in enumerate(members):
            if row not in last:  # before others need its blocks
                self._scheduler.remove(member)
        following: list[Sequence] = []
        for place, (row, _) in enumerate(steps):
            parent = members[row]
            if last[row] == place:
                following.append(parent)
            else:
                child = parent.fork()
                copies += self._scheduler.fork(parent, child)
                following.append(child)
        for member, (_, token) in zip(following, steps, strict=True):
            member.add(token)
        beam = members[0].request.beam
        assert beam is not None, "it asks for beams"
        for member in following:
            member.places = 1
        following[0].places = beam.width - len(following) + 1
        return following
