"""What follows a prompt, explained by the prompt's tokens: a decoder, block by block, so that pieces stay short."""

# T tokens  A answer tokens  D width  R rows  U units  V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from steelyard.explain.rules import Rules
from steelyard.explain.subject import PIECE, Steps, Taken, on_the_way
from steelyard.models.attention import PackedAttention
from steelyard.models.decoder import Adapters, Decoder

Lens = list[list[tuple[int, float]]]
"""Of each layer the likeliest next tokens, with their probabilities."""


class AnswerSubject:
    """See `Subject`. A unit is a token of the prompt; the value is the sum of the answer's centred logits.

    Args:
        decoder: in float32 and dense.
        adapter: that it wears, or None.
        prompt: its tokens.
        answer: what follows, at least one token.
        places: which tokens of the prompt are units; the others, such as a template's, stay and are the rest.
    """

    baseline = "the prompt without the token"

    def __init__(
        self,
        decoder: Decoder,
        adapter: Adapters | None,
        prompt: Sequence[int],
        answer: Sequence[int],
        places: Sequence[int],
    ) -> None:
        self._decoder, self._adapter = decoder, adapter
        self._prompt, self._answer, self._places = list(prompt), list(answer), list(places)
        self._others: torch.Tensor | None = None
        """Tokens that the answer's are compared with, instead of the whole vocabulary."""
        self.units = len(self._places)
        self.computed = 0
        self.states: list[torch.Tensor] = []
        """`[T, D]` before each block and after the last, of the newest `taken` of the whole."""

    def taken(self, *, rules: bool = False, share: float = 1.0) -> Steps[Taken]:
        """See `Subject`. Forward without gradients; then each block again, from the last to the first."""
        decoder, tokens = self._decoder, torch.tensor(self._prompt + self._answer[:-1])
        with torch.enable_grad():
            attend = PackedAttention([len(tokens)])
        with torch.no_grad():
            positions = torch.arange(len(tokens))
            rotary = decoder.rotary(positions)
            base = decoder.model.embed_tokens.weight.mean(0) * decoder.config.embedding_scale
            states = [on_the_way(decoder.embed(tokens), base, share)]
        for block in decoder.model.layers:
            with torch.no_grad():
                states.append(block(states[-1], rotary, attend, self._adapter))
            yield
        if share == 1:
            self.states = states
        value, gradient = self._head(states[-1], rules)
        yield
        for block, state in zip(reversed(decoder.model.layers), reversed(states[:-1]), strict=True):
            leaf = state.detach().requires_grad_()
            with Rules() if rules else nullcontext():
                after = block(leaf, rotary, attend, self._adapter)
            (gradient,) = torch.autograd.grad(after, leaf, gradient)
            yield
        self.computed += 3 * len(tokens)
        return Taken((states[0],), (gradient,), (base,), value)

    def _head(self, state: torch.Tensor, rules: bool) -> tuple[float, torch.Tensor]:
        """The value, and its gradient by the last block's states."""
        leaf = state.detach().requires_grad_()
        last = leaf[len(self._prompt) - 1 :]
        with Rules() if rules else nullcontext():
            normed = self._decoder.model.norm(last)
        weight = self._decoder.lm_head.weight
        others = weight if self._others is None else weight[self._others]
        rows = weight[torch.tensor(self._answer)] - others.mean(0)
        value = (normed * rows).sum()
        (gradient,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), gradient

    def spread(self, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """See `Subject`."""
        (part,) = parts
        by_token = part.double().sum(-1)
        found = by_token[torch.tensor(self._places, dtype=torch.int64)]
        return torch.cat([found, (by_token.sum() - found.sum())[None]])

    def likelihood(self, kept: torch.Tensor) -> Steps[torch.Tensor]:
        """See `Subject`; the mean over the answer's tokens."""
        rows = [self._without(one) + self._answer[:-1] for one in kept.tolist()]
        found = torch.zeros(len(rows), dtype=torch.float64)
        begin = 0
        while begin < len(rows):
            end, size = begin, 0
            while end < len(rows) and (end == begin or size + len(rows[end]) <= PIECE):
                size += len(rows[end])
                end += 1
            found[begin:end] = yield from self._scored(rows[begin:end])
            self.computed += size
            begin = end
        return found

    def _without(self, kept: list[bool]) -> list[int]:
        gone = {place for place, there in zip(self._places, kept, strict=True) if not there}
        row = [token for place, token in enumerate(self._prompt) if place not in gone]
        return row or [self._prompt[0]]  # a decoder goes on from something

    def following(self, tokens: Sequence[int]) -> Steps[torch.Tensor]:
        """Logits `[V]` of what follows some tokens."""
        states = yield from self._states([tokens])
        with torch.no_grad():
            return self._decoder.logits(self._decoder.model.norm(states[-1:]))[0]

    def _scored(self, rows: Sequence[Sequence[int]]) -> Steps[torch.Tensor]:
        x = yield from self._states(rows)
        ends, count = torch.tensor([len(row) for row in rows]).cumsum(0), len(self._answer)
        with torch.no_grad():
            places = ends[:, None] - count + torch.arange(count)
            logits = self._decoder.logits(self._decoder.model.norm(x[places.flatten()])).double()
            targets = torch.tensor(self._answer).repeat(len(rows))
            own = logits[torch.arange(len(targets)), targets]
            among = logits if self._others is None else torch.cat([own[:, None], logits[:, self._others]], 1)
            chosen = own - among.logsumexp(-1)
        return chosen.view(len(rows), count).mean(-1)

    def _states(self, rows: Sequence[Sequence[int]]) -> Steps[torch.Tensor]:
        """Of all tokens of some rows `[T, D]`, after the last block."""
        decoder, lengths = self._decoder, [len(row) for row in rows]
        with torch.no_grad():
            attend = PackedAttention(lengths)
            rotary = decoder.rotary(torch.cat([torch.arange(length) for length in lengths]))
            x = decoder.embed(torch.tensor([token for row in rows for token in row]))
        for block in decoder.model.layers:
            with torch.no_grad():
                x = block(x, rotary, attend, self._adapter)
            yield
        return x

    def lens(self, likeliest: int) -> Steps[Lens]:
        """What each layer would say next, after the embedding and each block (nostalgebraist 2020, the logit lens)."""
        found: Lens = []
        for state in self.states:
            with torch.no_grad():
                logits = self._decoder.logits(self._decoder.model.norm(state[len(self._prompt) - 1][None]))[0]
                top = logits.float().softmax(-1).topk(likeliest)
            found.append(list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
            yield
        return found


class LabelSubject(AnswerSubject):
    """See `Subject`. A label among others: the value is its log-odds at the token where it parts from most of them.

    What all of them have in common, such as that there is a label at all, says nothing of why it is this one.

    Args:
        decoder: in float32 and dense.
        adapter: that it wears, or None.
        prompt: its tokens.
        labels: tokens of each, two at least; from the target's one of them `parts`.
        target: the label that is explained.
        places: see `AnswerSubject`.
    """

    def __init__(
        self,
        decoder: Decoder,
        adapter: Adapters | None,
        prompt: Sequence[int],
        labels: Sequence[Sequence[int]],
        target: int,
        places: Sequence[int],
    ) -> None:
        own = list(labels[target])
        partings = _partings(own, labels)
        assert partings, "see `parts`"
        place = min(partings, key=lambda place: (-len(partings[place]), place))
        super().__init__(decoder, adapter, [*prompt, *own[:place]], [own[place]], places)
        self._others = torch.tensor(sorted(set(partings[place])))


def parts(answer: Sequence[int], labels: Sequence[Sequence[int]]) -> bool:
    """Whether any of some labels says something else where an answer says something."""
    return any(answer[: len(label)] != label[: len(answer)] for label in labels)


def _partings(own: Sequence[int], labels: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """Where labels say something else first, and what."""
    found: dict[int, list[int]] = {}
    for label in labels:
        pairs = enumerate(zip(own, label, strict=False))
        parting = next(((place, other) for place, (mine, other) in pairs if mine != other), None)
        if parting is not None:
            found.setdefault(parting[0], []).append(parting[1])
    return found
