"""How a decoder goes on while it is trained: an engine over the weights as they are by now."""

from __future__ import annotations

from collections.abc import Sequence

from steelyard.infer.engine import Engine, EngineConfig
from steelyard.infer.kv_cache import KVCache
from steelyard.infer.request import Request, Sampling
from steelyard.models.decoder import Decoder
from steelyard.models.lora import Adapter
from steelyard.text.tokenizer import Tokenizer

NAME = "learning"
LEAST = 1 << 28
"""Bytes for keys and values, and for so many rows of the longest at least:"""
ROWS = 2


class OwnAnswers:
    """A `Writer`.

    Args:
        decoder: what is trained, or the base of an adapter that is.
        adapter: that.
        tokenizer: knows what ends an answer.
        longest: tokens of a row with its answer.
    """

    def __init__(self, decoder: Decoder, adapter: Adapter | None, tokenizer: Tokenizer, longest: int) -> None:
        row = KVCache.bytes_per_token(decoder.config, decoder.dtype) * (longest + EngineConfig().block_size)
        # What changes at every step is neither packed nor kept.
        sizes = EngineConfig(kv_bytes=max(LEAST, ROWS * row), plan=False, reuse=False, speculate="off")
        self._engine = Engine(decoder, tokenizer, None if adapter is None else {NAME: adapter}, sizes)
        self._adapter = adapter

    def __call__(self, prompts: Sequence[list[int]], tokens: Sequence[int], seed: int) -> list[list[int]]:
        """See `Writer`: drawn at a temperature of 1."""
        requests = [
            Request(
                id=str(number),
                prompt=prompt,
                sampling=Sampling(max_tokens=most, seed=seed + number),
                adapter=None if self._adapter is None else NAME,
            )
            for number, (prompt, most) in enumerate(zip(prompts, tokens, strict=True))
        ]
        answers: list[list[int]] = [[] for _ in prompts]
        training = self._adapter is not None and self._adapter.training
        if self._adapter is not None:
            self._adapter.training = False
        try:
            for output in self._engine.run(requests):
                answers[int(output.id)] += output.tokens
        finally:
            if self._adapter is not None:
                self._adapter.training = training
        return answers
