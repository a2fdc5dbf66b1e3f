"""The engine: requests in, tokens out, one step at a time. It knows neither HTTP nor processes nor what day it is."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec
import torch

from steelyard.errors import CheckpointError, RequestError
from steelyard.infer import beam_search
from steelyard.infer.adapters import Adapters
from steelyard.infer.beam_search import BeamSearch
from steelyard.infer.blocks import BlockPool
from steelyard.infer.decoding import sampling, scoring
from steelyard.infer.decoding.draft_model import Draft, DraftModel, load_draft
from steelyard.infer.decoding.prompt_lookup import PromptLookup
from steelyard.infer.decoding.speculative import Speculation
from steelyard.infer.grammars import Beside, Ceiling, Grammars, State
from steelyard.infer.packed import PackedWeights, packed_file
from steelyard.infer.request import (
    Aborted,
    CacheKind,
    EngineStats,
    Failure,
    Output,
    PromptLogprob,
    Request,
    Timeline,
    TokenLogprob,
)
from steelyard.infer.runner import CacheSizes, has_plan, open_runner
from steelyard.infer.scheduler import Scheduled, Scheduler
from steelyard.infer.sequence import Sequence
from steelyard.kernels import library
from steelyard.models import weights
from steelyard.models.decoder import Decoder
from steelyard.models.lora import Adapter
from steelyard.text.tokenizer import Tokenizer

MAX_CHOICES = 128
CACHE_DTYPES: dict[CacheKind, torch.dtype] = {"bfloat16": torch.bfloat16, "int8": torch.int8}


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of an engine."""

    kv_bytes: int = 1 << 30
    """Memory for keys and values."""
    kv_cache: CacheKind = "bfloat16"
    """How a plan keeps keys and values. `int8` takes half of the memory and is a numeric path of its own: tokens differ
    between the kinds, never within one. What runs without a plan keeps them in its own dtype."""
    block_size: int = 32
    """Tokens of a cache block; a plan's are always 32."""
    token_budget: int = 320
    """Most tokens of one step: longer prompts are computed in chunks beside running streams."""
    max_running: int = 64
    """Most sequences that run at once; others wait."""
    logit_rows: int = 128
    """Most rows of logits of one step, each as wide as the vocabulary; never fewer than `max_running`."""
    reuse: bool = True
    """Keep the blocks of prompts, for requests of the same project that begin alike."""
    speculate: Literal["off", "lookup"] = "lookup"
    """Guess tokens and confirm several at once, where the model runs by a plan, so that they stay the same; a draft
    model, where there is one, takes the place of looking up."""
    draft_kv_bytes: int = 1 << 28
    """Memory for a draft model's keys and values."""
    plan: bool = True
    """False: read the weights of a dense decoder as they are at every step, since they change; no plan packs them."""


class Engine:
    """Continuous batching over one decoder.

    Args:
        decoder: the model.
        tokenizer: its tokenizer.
        adapters: LoRA adapters, or their folders, by name.
        config: sizes.
        draft: a smaller model of the same vocabulary, which guesses tokens.
        packed: packed weights of an earlier start.

    Raises:
        CheckpointError: a draft or an int8 cache for a model that does not run by a plan.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        adapters: Mapping[str, Adapter | Path] | None = None,
        config: EngineConfig | None = None,
        draft: Draft | None = None,
        packed: PackedWeights | None = None,
    ) -> None:
        config = config or EngineConfig()
        self.decoder, self.tokenizer = decoder, tokenizer
        self.library = library.load()
        of_plans = self.library if config.plan else None
        sizes = CacheSizes.fit(
            decoder,
            config.kv_bytes,
            config.block_size,
            config.max_running,
            of_plans,
            CACHE_DTYPES[config.kv_cache],
        )
        rows = max(config.logit_rows, config.max_running)
        self.context = sizes.context
        self.pool = BlockPool(sizes.blocks, sizes.block_size, config.reuse)
        self.runner = open_runner(
            decoder,
            sizes,
            tokens=config.token_budget,
            rows=rows,
            library=of_plans,
            packed=packed,
        )
        self.adapters = Adapters(self.runner, lambda path: Adapter.load(path, decoder))
        self.scheduler = Scheduler(self.pool, config.token_budget, config.max_running, rows, self.adapters)
        self.speculation = self._speculation(config, draft)
        self.beam_search = BeamSearch(self.scheduler, self.runner, tokenizer, self.context)
        self.max_running = config.max_running
        self.grammars = Grammars(tokenizer, decoder.config.vocabulary)
        self.ceilings = Beside()
        self.sequences: dict[str, list[Sequence]] = {}
        for name, source in (adapters or {}).items():
            self.load_adapter(name, source)
        self._steps = self._generated = self._drafted = self._accepted = 0

    @classmethod
    def load(
        cls,
        folder: Path,
        adapters: dict[str, Path] | None = None,
        config: EngineConfig | None = None,
        dtype: torch.dtype = torch.bfloat16,
        draft: Path | None = None,
    ) -> Engine:
        """An engine for a checkpoint folder, with adapters by name and perhaps a draft checkpoint.

        Raises:
            CheckpointError: the checkpoint, an adapter or the draft is missing or does not fit.
        """
        decoder = weights.load(folder, dtype)
        tokenizer = Tokenizer.load(folder)
        if tokenizer.vocabulary > decoder.config.vocabulary:
            raise CheckpointError(f"'{folder}': the tokenizer has more tokens than the model; pull it again")
        smaller = None if draft is None else load_draft(draft, decoder, tokenizer, dtype)
        planned = library.load() is not None and has_plan(decoder, library.load())
        packed = PackedWeights(packed_file(folder)) if planned else None
        engine = cls(decoder, tokenizer, adapters, config, smaller, packed)
        if planned:
            decoder.to("meta")  # its weights are held packed alone
        return engine

    def load_adapter(self, name: str, source: Path | Adapter) -> str:
        """Let requests wear an adapter by this name from now on; those of one that had the name keep theirs.

        Args:
            name: what requests say.
            source: a folder in PEFT's layout, which is read again if the adapter had to give its place up.

        Returns:
            The adapter's digest.

        Raises:
            CheckpointError: it cannot be read or does not fit the base.
        """
        return self.adapters.put(name, self.adapters.prepare(source))

    def drop_adapter(self, name: str) -> None:
        """Forget a name; requests that wear its adapter run to their end.

        Raises:
            ModelNotFoundError: there is no such name.
        """
        self.adapters.drop(name)

    def add(self, request: Request, arrived: float | None = None, grammar: State | None = None) -> None:
        """Queue a request.

        Args:
            request: what is asked.
            arrived: when it came, in seconds of the monotonic clock; None: now.
            grammar: the state before its first token, if its grammar was compiled before.

        Raises:
            RequestError: it cannot be computed here; the field is named.
        """
        if request.id in self.sequences:
            raise RequestError(f"request id '{request.id}' is in use", param="id")
        if not request.prompt:
            raise RequestError("the prompt is empty", param="prompt")
        if request.words is not None:
            raise RequestError("this model tags no words", param="model")
        if not 1 <= request.n <= MAX_CHOICES:
            raise RequestError(f"n must be 1 to {MAX_CHOICES}", param="n")
        sampling.check(request.sampling)
        if request.beam is not None:
            beam_search.check(request, self.max_running)
        adapter = None if request.adapter is None else self.adapters.find(request.adapter)
        if len(request.prompt) + min(1, request.sampling.max_tokens) > self.context:
            raise RequestError(
                f"the prompt has {len(request.prompt)} tokens; the context holds {self.context}, the answer included",
                param="prompt",
                code="context_length_exceeded",
            )
        vocabulary = self.decoder.config.vocabulary
        if not all(0 <= token < vocabulary for token in request.prompt):
            raise RequestError(f"token ids must be 0 to {vocabulary - 1}", param="prompt")
        if not all(0 <= token < vocabulary for token in request.sampling.logit_bias):
            raise RequestError(f"token ids must be 0 to {vocabulary - 1}", param="logit_bias")
        seed = secrets.randbits(64) if request.sampling.seed is None else request.sampling.seed % 2**64
        arrived = time.monotonic() if arrived is None else arrived
        if request.grammar is not None and grammar is None:
            grammar = self.grammars.begin(request.grammar, request.grammar_field)
        count = request.n if request.beam is None else 1  # it forks after its prompt
        choices = [
            Sequence(
                request, choice, seed, self.tokenizer, adapter, arrived, None if grammar is None else grammar.copy()
            )
            for choice in range(count)
        ]
        self.sequences[request.id] = choices
        if request.beam is not None:
            self.beam_search.begin(choices[0])
        for sequence in choices:
            self.scheduler.add(sequence)

    def abort(self, request_id: str) -> Aborted | None:
        """Drop a request and free what it holds, at once; returns what it came to. An unknown id has just ended."""
        choices = self.sequences.pop(request_id, None)
        if choices is None:
            return None
        self.beam_search.forget(request_id)
        for sequence in choices:
            if sequence.finish_reason is None:
                self._remove(sequence)
        first = choices[0]
        return Aborted(
            id=request_id,
            prompt_tokens=0 if first.fresh else len(first.request.prompt),
            cached_tokens=first.reused,
            completion_tokens=[sequence.generated for sequence in choices],
        )

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.decoder.config.vocabulary

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.sequences)

    def step(self) -> list[Output | Failure]:
        """Schedule, guess, run, score, draw, deliver."""
        outputs = self._settle_adapters()
        batch = self.scheduler.schedule()
        if not batch:
            self.adapters.wait()  # whoever waits, waits for this
            return outputs
        self._steps += 1
        if self.speculation is not None:
            guesses = self.speculation.propose(batch, self.scheduler.room(batch))
            batch = self.scheduler.lengthen(batch, guesses) if guesses else batch
        ceilings = self.ceilings.begin(_held(batch))
        logits = self.runner.run(batch)
        scored = self._score(batch, logits)  # before the draws, which add biases to the logits
        drawn = self._draw(batch, logits, ceilings.result())
        self.scheduler.computed(batch)
        now = time.monotonic()
        for parts in zip(batch, scored, drawn, strict=True):
            outputs += self._deliver(*parts, now)
        return outputs + self._search(now)

    def run(self, requests: Iterable[Request]) -> Iterator[Output]:
        """Run requests to their end, yielding what each step adds.

        Raises:
            RequestError: a request that cannot be computed here.
        """
        for request in requests:
            self.add(request)
        while self.busy:
            for output in self.step():
                if isinstance(output, Failure):
                    raise RequestError(output.message, param=output.param)
                yield output

    def stats(self) -> EngineStats:
        """What it has done, and is doing."""
        running = {sequence.request.id for sequence in self.scheduler.running}
        return EngineStats(
            steps=self._steps,
            prompt_tokens=self.scheduler.prompt_tokens,
            generated_tokens=self._generated,
            looked_up_tokens=self.scheduler.looked_up,
            cached_tokens=self.scheduler.found,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            preemptions=self.scheduler.preemptions,
            running=len(running),
            waiting=len(self.sequences.keys() - running),
            used_blocks=self.pool.blocks - self.pool.available,
            blocks=self.pool.blocks,
        )

    def check_integrity(self) -> None:
        """No block is lost, none is held by a sequence that has ended; no more is there of adapters."""
        running, every = self.scheduler.running, [*self.scheduler.running, *self.scheduler.waiting]
        self.pool.check_integrity([sequence.block_table for sequence in every])
        self.adapters.check_integrity(
            [sequence.adapter for sequence in running], [sequence.adapter for sequence in every]
        )

    def _settle_adapters(self) -> list[Output | Failure]:
        """Take in the adapters that have been read; fails the requests of one that could not be."""
        failures: list[Output | Failure] = []
        for version, reason in self.adapters.settle():
            for id, choices in list(self.sequences.items()):
                if choices[0].adapter is version:
                    self.abort(id)
                    failures.append(Failure(id, reason))
        return failures

    def _score(self, batch: list[Scheduled], logits: torch.Tensor) -> list[list[PromptLogprob] | None]:
        """Of each unit of work, what it tells of its prompt; None where the logits are not finite."""
        found: list[list[PromptLogprob] | None] = []
        end = 0
        for work in batch:
            sequence, begin, end = work.sequence, end, end + work.wanted
            count = max(0, min(work.wanted, sequence.to_score - sequence.scored))
            tokens = sequence.request.prompt[sequence.scored + 1 : sequence.scored + 1 + count]
            likeliest = sequence.request.sampling.prompt_logprobs or 0
            scored = scoring.score(logits[begin : begin + count], tokens, likeliest) if count else []
            sequence.scored += count
            found.append(None if scored is None else [self._prompt_logprob(one) for one in scored])
        return found

    def _draw(
        self, batch: list[Scheduled], logits: torch.Tensor, ceilings: dict[State, list[Ceiling]]
    ) -> list[list[sampling.Drawn | None]]:
        """Of each unit of work, what is drawn after its last token and after every drafted one; all in one call."""
        places: list[int] = []
        counts: list[int] = []
        broken: set[Sequence] = set()
        end = 0
        for work in batch:
            end += work.wanted
            searched = work.sequence in self.beam_search
            if searched and work.draws:
                own = None if work.sequence.grammar is None else ceilings[work.sequence.grammar][0]
                if not self.beam_search.take(work, logits[end - 1], own):
                    broken.add(work.sequence)
            counts.append(0 if searched else work.draws)
            places += range(end - counts[-1], end)
        rows = [row for work, count in zip(batch, counts, strict=True) for row in _rows(work, count, ceilings)]
        drawn = iter(sampling.draw(logits if len(places) == end else logits[places], rows, self.library))
        found = [list(itertools.islice(drawn, count)) for count in counts]
        return [[None] if work.sequence in broken else mine for work, mine in zip(batch, found, strict=True)]

    def _search(self, now: float) -> list[Output | Failure]:
        """Go on with the requests that are searched for; what has come to its end."""
        going, found = self.beam_search.advance(now)
        self.sequences.update(going)
        outputs: list[Output | Failure] = []
        for first, said in found:
            del self.sequences[first.request.id]
            outputs += said
            if first.request.counted:
                self._generated += sum(one.completion_tokens for one in said if isinstance(one, Output))
        return outputs

    def _deliver(
        self, work: Scheduled, scored: list[PromptLogprob] | None, drawn: list[sampling.Drawn | None], now: float
    ) -> list[Output | Failure]:
        """Take in what a step found for a sequence by now; of its drafted tokens, as far as the draws confirm them."""
        sequence = work.sequence
        if sequence.request.id not in self.sequences:
            return []  # another choice of it has just failed
        if scored is None or (drawn and drawn[0] is None):
            self.abort(sequence.request.id)
            return [Failure(sequence.request.id, "the model's logits are not finite")]
        if sequence.grammar is not None and sequence.grammar.broken:
            self.abort(sequence.request.id)
            reason = "the grammar takes too long to follow here: make it simpler"
            return [Failure(sequence.request.id, reason, sequence.request.grammar_field)]
        text, taken = "", list[sampling.Drawn]()
        for guess, token in itertools.zip_longest(work.draft, drawn):
            if token is None:
                break  # not finite: drawn again without drafts, in the next step
            text += sequence.append(token.token, self.tokenizer.eos_ids, self.context)
            taken.append(token)
            if sequence.finish_reason is not None or token.token != guess:
                break
        if taken:
            sequence.first_token = sequence.first_token or now
            self.scheduler.accept(sequence, len(taken) - 1)
            self._count(work, taken)
            for forced in _forced(sequence):
                self._generated += 1 if sequence.request.counted else 0
                text += sequence.append(forced, self.tokenizer.eos_ids, self.context)
                taken.append(sampling.Drawn(forced, None, []))
        elif sequence.request.sampling.max_tokens == 0 and sequence.computed == len(sequence.tokens):
            sequence.finish_reason = "length"
        elif not scored:
            return []
        timeline: Timeline | None = None
        if sequence.finish_reason is not None:
            self._remove(sequence)
            choices = self.sequences[sequence.request.id]
            if all(choice.finish_reason is not None for choice in choices):
                timeline = _timeline(choices, now)
                del self.sequences[sequence.request.id]
        output = Output(
            id=sequence.request.id,
            choice=sequence.choice,
            text=text,
            tokens=[token.token for token in taken],
            logprobs=self._logprobs(taken),
            prompt_logprobs=scored or None,
            finish_reason=sequence.finish_reason,
            prompt_tokens=len(sequence.request.prompt),
            completion_tokens=sequence.generated,
            cached_tokens=sequence.reused,
            timeline=timeline,
        )
        return [output]

    def _speculation(self, config: EngineConfig, draft: Draft | None) -> Speculation | None:
        planned = has_plan(self.decoder, self.library)
        if draft is not None and not planned:
            raise CheckpointError(
                "a draft needs a model in int8 or bfloat16: only with a plan do guesses leave the tokens alone"
            )
        if config.speculate == "off" or not planned:
            return None
        if draft is None:
            return Speculation(PromptLookup(), self.context)
        proposer = DraftModel(
            draft,
            self.decoder,
            self.tokenizer,
            kv_bytes=config.draft_kv_bytes,
            most_running=config.max_running,
            library=self.library,
        )
        return Speculation(proposer, self.context)

    def _remove(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        if self.speculation is not None:
            self.speculation.forget(sequence)

    def _count(self, work: Scheduled, taken: list[sampling.Drawn]) -> None:
        self._generated += len(taken) if work.sequence.request.counted else 0
        if work.draft and self.speculation is not None:
            right = sum(guess == token.token for guess, token in zip(work.draft, taken, strict=False))
            self._drafted, self._accepted = self._drafted + len(work.draft), self._accepted + right
            self.speculation.observe(work.sequence, len(work.draft), right)

    def _prompt_logprob(self, scored: scoring.Scored) -> PromptLogprob:
        text = self.tokenizer.token_text
        top = [(token, text(token), value) for token, value in scored.top]
        return PromptLogprob(scored.token, text(scored.token), scored.logprob, top, scored.rank)

    def _logprobs(self, drawn: list[sampling.Drawn]) -> list[TokenLogprob] | None:
        text = self.tokenizer.token_text
        found = [
            TokenLogprob(one.token, text(one.token), one.logprob, [(token, text(token), v) for token, v in one.top])
            for one in drawn
            if one.logprob is not None
        ]
        return found or None


def _timeline(choices: list[Sequence], now: float) -> Timeline:
    """The moments of a request whose last choice ends now."""
    return Timeline(
        arrived=choices[0].arrived,
        scheduled=min(choice.scheduled for choice in choices),
        first_token=min(choice.first_token or now for choice in choices),
        last_token=now,
    )


def _forced(sequence: Sequence) -> Iterator[int]:
    """Tokens that its grammar leaves no choice about; none where the model is asked how likely it finds them."""
    if sequence.grammar is None or sequence.request.sampling.logprobs is not None:
        return
    for token in sequence.grammar.forced():
        if sequence.finish_reason is not None:
            return
        yield token


def _held(batch: list[Scheduled]) -> dict[State, tuple[int, ...]]:
    """Of the sequences that draw and are held to a grammar, its state and the guesses at what follows."""
    return {work.sequence.grammar: work.draft for work in batch if work.sequence.grammar is not None and work.draws}


def _rows(work: Scheduled, count: int, ceilings: dict[State, list[Ceiling]]) -> list[sampling.Row]:
    """What the draws after none, one, two drafted tokens depend on; one counts only if all before it are right."""
    sequence = work.sequence
    own = ceilings[sequence.grammar] if count and sequence.grammar is not None else []
    return [
        sampling.Row(
            sequence.request.sampling,
            sequence.seed,
            sequence.choice,
            len(sequence.tokens) + ahead,
            sequence.counts_after(work.draft[:ahead]),
            own[ahead] if ahead < len(own) else None,
        )
        for ahead in range(count)
    ]
