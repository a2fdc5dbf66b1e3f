"""Guesses by a smaller model of the same vocabulary, which follows the sequences in a cache of its own.

It draws from the same (seed, choice, position) as the model itself: where their distributions agree, so do the draws.
It wears no adapters. What it says is only ever a guess, so its own precision and batches do not matter; nor does it
have to know every token: where its checkpoint names the likely ones, its head has rows for these alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import nn

from steelyard.errors import CheckpointError
from steelyard.infer.blocks import BlockPool
from steelyard.infer.decoding import sampling
from steelyard.infer.decoding.speculative import STEP_ROWS
from steelyard.infer.runner import CacheSizes, open_runner
from steelyard.infer.scheduler import Scheduled
from steelyard.infer.sequence import Sequence
from steelyard.kernels.draw import NEVER
from steelyard.kernels.library import Library
from steelyard.models import head_tokens, weights
from steelyard.models.decoder import Decoder
from steelyard.models.linear import QuantizedLinear
from steelyard.text.tokenizer import Tokenizer

CATCH_UP = 128
"""Most tokens that it reads before a guess, over all sequences: long prompts are read over several steps."""
BLOCK_SIZE = 32


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft as it is loaded."""

    decoder: Decoder
    tokens: torch.Tensor | None = None
    """`[K]` int64: which tokens the rows of its head are; None: all, in order."""


def load_draft(folder: Path, decoder: Decoder, tokenizer: Tokenizer, dtype: torch.dtype) -> Draft:
    """The draft checkpoint for `decoder`.

    Raises:
        CheckpointError: it is missing, its vocabulary is another one, or it names tokens that there are not.
    """
    draft = weights.load(folder, dtype)
    sizes = draft.config.vocabulary, decoder.config.vocabulary
    if sizes[0] != sizes[1] or not tokenizer.same_vocabulary(Tokenizer.load(folder)):
        raise CheckpointError(
            f"the draft '{folder}' has another vocabulary than the model ({sizes[0]} and {sizes[1]} tokens): a draft is"
            " a smaller model of the same family, with the same tokenizer.json"
        )
    tokens = head_tokens.read(folder, sizes[0])
    if tokens is not None:
        _trim(draft, tokens)
    return Draft(draft, tokens)


def _trim(draft: Decoder, tokens: torch.Tensor) -> None:
    """Leave the head the rows of some tokens `[K]`."""
    head: nn.Module = draft.lm_head
    if isinstance(head, QuantizedLinear):
        draft.set_submodule(
            "lm_head", QuantizedLinear(head.weight[tokens], head.weight_scale[tokens], None, head.dtype)
        )
    elif isinstance(head, nn.Linear):
        draft.lm_head = nn.Linear(head.in_features, len(tokens), bias=False, device="meta")
        draft.lm_head.weight = nn.Parameter(head.weight[tokens], requires_grad=False)
    draft.config = msgspec.structs.replace(draft.config, tied=False)


@dataclass(slots=True)
class Follower:
    """A sequence as the draft model sees it."""

    copy: Sequence
    """Its tokens, with the guesses at their end; its blocks are of the draft's cache."""
    agreed: int
    """The first of them are the sequence's own for sure."""

    def follow(self, tokens: list[int]) -> None:
        """Take in how the sequence went on; the guesses that were right need not be computed again."""
        copy, same = self.copy, self.agreed
        while same < min(len(copy.tokens), len(tokens)) and copy.tokens[same] == tokens[same]:
            same += 1
        copy.tokens[same:] = tokens[same:]
        copy.computed = min(copy.computed, same, len(tokens) - 1)
        self.agreed = len(tokens)


class DraftModel:
    """A proposer with a model.

    Args:
        draft: the smaller model.
        target: the model whose tokens it guesses.
        tokenizer: of both.
        kv_bytes: memory for its cache.
        most_running: most sequences at once.
        library: the native kernels.
    """

    prior = 0.8

    def __init__(
        self,
        draft: Draft,
        target: Decoder,
        tokenizer: Tokenizer,
        *,
        kv_bytes: int,
        most_running: int,
        library: Library | None,
    ) -> None:
        sizes = CacheSizes.fit(draft.decoder, kv_bytes, BLOCK_SIZE, most_running, library)
        self.context, self.library, self.tokenizer = sizes.context, library, tokenizer
        self.pool = BlockPool(sizes.blocks, sizes.block_size, reuse=False)
        tokens = max(CATCH_UP, most_running)
        self.runner = open_runner(draft.decoder, sizes, tokens=tokens, rows=most_running, library=library)
        self.share = _read(draft.decoder) / _read(target)
        self._tokens = draft.tokens
        self._logits = torch.full((0 if draft.tokens is None else most_running, target.config.vocabulary), NEVER)
        self._followers: dict[Sequence, Follower] = {}

    def row_cost(self, rows: int) -> float:
        """See `Proposer`: a step of the draft for every guess."""
        return 1 + self.share * (STEP_ROWS + rows) / rows

    def propose(self, lengths: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """See `Proposer`. Who has not been read up to his last token gets no guesses yet."""
        batch, owners = self._catch_up(lengths)
        guesses: dict[Sequence, list[int]] = {}
        while batch:
            logits = self._of_all(self.runner.run(batch))
            for work in batch:
                work.sequence.computed += work.count
            drawing = [work.sequence for work in batch if work.wanted]
            rows = [_row(owners[copy], copy) for copy in drawing]
            batch = []
            for copy, drawn in zip(drawing, sampling.draw(logits, rows, self.library), strict=True):
                if drawn is None:
                    continue  # not finite
                copy.tokens.append(drawn.token)
                mine = guesses.setdefault(owners[copy], [])
                mine.append(drawn.token)
                if len(mine) < lengths[owners[copy]] and self._grow(copy):
                    batch.append(Scheduled(copy, 1, 1))
        return guesses

    def _of_all(self, logits: torch.Tensor) -> torch.Tensor:
        """`[N, K]` -> `[N, V]`, valid until the next call."""
        if self._tokens is None:
            return logits
        self._logits[: len(logits)].index_copy_(1, self._tokens, logits)
        return self._logits[: len(logits)]

    def forget(self, sequence: Sequence) -> None:
        """See `Proposer`."""
        follower = self._followers.pop(sequence, None)
        if follower is not None:
            self.pool.release(follower.copy.block_table)

    def _catch_up(self, sequences: Mapping[Sequence, int]) -> tuple[list[Scheduled], dict[Sequence, Sequence]]:
        """The first batch: what of each sequence has not been read; and whose copy is whose."""
        budget, batch, owners = CATCH_UP, list[Scheduled](), dict[Sequence, Sequence]()
        for sequence in sequences:
            copy = self._follow(sequence)
            count = min(len(copy.tokens) - copy.computed, budget)
            if count and self._grow(copy):
                batch.append(Scheduled(copy, count, int(copy.computed + count == len(copy.tokens))))
                owners[copy] = sequence
                budget -= count
        return batch, owners

    def _follow(self, sequence: Sequence) -> Sequence:
        if sequence not in self._followers:
            request = msgspec.structs.replace(
                sequence.request,
                adapter=None,
                sampling=msgspec.structs.replace(sequence.request.sampling, logprobs=None, prompt_logprobs=None),
            )
            copy = Sequence(request, sequence.choice, sequence.seed, self.tokenizer)
            self._followers[sequence] = Follower(copy, len(copy.tokens))
        follower = self._followers[sequence]
        follower.follow(sequence.tokens)
        return follower.copy

    def _grow(self, copy: Sequence) -> bool:
        """Blocks for all of a copy's tokens; False if there are not enough, or the draft's context has ended."""
        missing = -(-len(copy.tokens) // self.pool.block_size) - len(copy.block_table)
        if len(copy.tokens) > self.context or missing > self.pool.available:
            return False
        copy.block_table += [self.pool.allocate() for _ in range(missing)]
        return True


def _row(sequence: Sequence, copy: Sequence) -> sampling.Row:
    """What the draw after a copy's last token depends on."""
    counts = sequence.counts_after(copy.tokens[len(sequence.tokens) :])
    return sampling.Row(copy.request.sampling, copy.seed, copy.choice, len(copy.tokens), counts)


def _read(decoder: Decoder) -> int:
    """Bytes that a step of one row reads: all linear layers, the head among them."""
    layers = (layer for layer in decoder.modules() if isinstance(layer, nn.Linear | QuantizedLinear))
    return sum(tensor.nbytes for layer in layers for tensor in layer.state_dict().values())
