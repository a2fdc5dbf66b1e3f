"""The engine: requests in, tokens out, one step at a time. It knows neither HTTP nor processes nor the clock."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec
import torch

from steelyard.errors import CheckpointError, RequestError
from steelyard.infer.adapters import Adapters
from steelyard.infer.blocks import BlockPool
from steelyard.infer.decoding import sampling
from steelyard.infer.kv_cache import KVCache
from steelyard.infer.plan import Plan, PlanCache
from steelyard.infer.request import Failure, Output, Request, TokenLogprob
from steelyard.infer.runner import PlanRunner, ReferenceRunner, Runner, has_plan
from steelyard.infer.scheduler import Scheduled, Scheduler
from steelyard.infer.sequence import Sequence
from steelyard.kernels import library
from steelyard.kernels.reference import BLOCK
from steelyard.models import weights
from steelyard.models.decoder import Decoder
from steelyard.models.lora import Adapter
from steelyard.text.tokenizer import Tokenizer

MAX_CHOICES = 128


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of an engine."""

    kv_bytes: int = 1 << 30
    """Memory for keys and values."""
    block_size: int = 32
    """Tokens of a cache block; a plan's are always 32."""
    token_budget: int = 256
    """Most tokens of one step: longer prompts are computed in chunks beside running streams."""
    max_running: int = 64
    """Most sequences that run at once; others wait."""
    reuse: bool = True
    """Keep the blocks of prompts, for requests of the same project that begin alike."""


class Engine:
    """Continuous batching over one decoder.

    Args:
        decoder: the model.
        tokenizer: its tokenizer.
        adapters: LoRA adapters, or their folders, by name.
        config: sizes.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        adapters: Mapping[str, Adapter | Path] | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        config = config or EngineConfig()
        self.decoder, self.tokenizer = decoder, tokenizer
        planned = has_plan(decoder)
        block_size = BLOCK if planned else config.block_size
        per_token = (
            PlanCache.bytes_per_token(decoder) if planned else KVCache.bytes_per_token(decoder.config, decoder.dtype)
        )
        # Never more than all running sequences could fill.
        most = config.max_running * -(-decoder.config.context // block_size)
        blocks = max(1, min(config.kv_bytes // (per_token * block_size), most))
        self.context = min(decoder.config.context, blocks * block_size)
        self.pool = BlockPool(blocks, block_size, config.reuse)
        self.library = library.load()
        self.runner: Runner
        if planned:
            plan = Plan(
                decoder,
                blocks=blocks,
                tokens=config.token_budget,
                draws=config.max_running,
                context=self.context,
                native=self.library,
            )
            self.runner = PlanRunner(plan)
        else:
            cache = KVCache(decoder.config, blocks, block_size, decoder.dtype)
            self.runner = ReferenceRunner(decoder, cache)
        self.adapters = Adapters(self.runner, lambda path: Adapter.load(path, decoder))
        self.scheduler = Scheduler(self.pool, config.token_budget, config.max_running, self.adapters)
        self.sequences: dict[str, list[Sequence]] = {}
        for name, source in (adapters or {}).items():
            self.load_adapter(name, source)

    @classmethod
    def load(
        cls,
        folder: Path,
        adapters: dict[str, Path] | None = None,
        config: EngineConfig | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Engine:
        """An engine for a checkpoint folder, with adapters by name.

        Raises:
            CheckpointError: the checkpoint or an adapter is missing or does not fit.
        """
        decoder = weights.load(folder, dtype)
        tokenizer = Tokenizer.load(folder)
        if tokenizer.vocabulary > decoder.config.vocabulary:
            raise CheckpointError(f"'{folder}': the tokenizer has more tokens than the model; pull it again")
        return cls(decoder, tokenizer, adapters, config)

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

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it cannot be computed here; the field is named.
        """
        if request.id in self.sequences:
            raise RequestError(f"request id '{request.id}' is in use", param="id")
        if not request.prompt:
            raise RequestError("the prompt is empty", param="prompt")
        if not 1 <= request.n <= MAX_CHOICES:
            raise RequestError(f"n must be 1 to {MAX_CHOICES}", param="n")
        sampling.check(request.sampling)
        adapter = None if request.adapter is None else self.adapters.find(request.adapter)
        if len(request.prompt) >= self.context:
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
        choices = [Sequence(request, choice, seed, self.tokenizer, adapter) for choice in range(request.n)]
        self.sequences[request.id] = choices
        for sequence in choices:
            self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """Drop a request and free what it holds, at once. An unknown id has just ended."""
        for sequence in self.sequences.pop(request_id, []):
            if sequence.finish_reason is None:
                self.scheduler.remove(sequence)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.sequences)

    def step(self) -> list[Output | Failure]:
        """Schedule, run, draw, deliver."""
        failures = self._settle_adapters()
        batch = self.scheduler.schedule()
        if not batch:
            self.adapters.wait()  # whoever waits, waits for this
            return failures
        logits = self.runner.run(batch)
        drawing = self._advance(batch)
        drawn = sampling.draw(logits, [_row(sequence) for sequence in drawing], self.library)
        return failures + [output for pair in zip(drawing, drawn, strict=True) for output in self._deliver(*pair)]

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

    def _advance(self, batch: list[Scheduled]) -> list[Sequence]:
        """The cache now holds what the step wrote; returns the sequences whose next token can be drawn."""
        drawing = [work.sequence for work in batch if work.draws]
        self.scheduler.computed(batch)
        return drawing

    def _deliver(self, sequence: Sequence, drawn: sampling.Drawn | None) -> list[Output | Failure]:
        if sequence.request.id not in self.sequences:
            return []  # another choice of it has just failed
        if drawn is None:
            self.abort(sequence.request.id)
            return [Failure(sequence.request.id, "the model's logits are not finite")]
        text = sequence.append(drawn.token, self.tokenizer.eos_ids, self.context)
        if sequence.finish_reason is not None:
            self.scheduler.remove(sequence)
            if all(choice.finish_reason is not None for choice in self.sequences[sequence.request.id]):
                del self.sequences[sequence.request.id]
        output = Output(
            id=sequence.request.id,
            choice=sequence.choice,
            text=text,
            tokens=[drawn.token],
            logprobs=self._logprobs(drawn),
            finish_reason=sequence.finish_reason,
            prompt_tokens=len(sequence.request.prompt),
            completion_tokens=sequence.generated,
            cached_tokens=sequence.reused,
        )
        return [output]

    def _logprobs(self, drawn: sampling.Drawn) -> list[TokenLogprob] | None:
        if drawn.logprob is None:
            return None
        top = [(token, self.tokenizer.token_text(token), value) for token, value in drawn.top]
        return [TokenLogprob(drawn.token, self.tokenizer.token_text(drawn.token), drawn.logprob, top)]


def _row(sequence: Sequence) -> sampling.Row:
    return sampling.Row(
        sequence.request.sampling, sequence.seed, sequence.choice, len(sequence.tokens), sequence.counts
    )
