"""How fast a model answers here: an engine of it, asked for answers that mean nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec
import torch

from steelyard.infer.engine import Engine, EngineConfig
from steelyard.infer.request import Request, Sampling
from steelyard.infer.runner import PlanRunner
from steelyard.kernels.steps import Product
from steelyard.models.decoder import Decoder
from steelyard.text.tokenizer import Tokenizer

PROMPT, ANSWER, STREAMS, ROUNDS = 128, 64, 16, 3


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """The best of some rounds."""

    tokens_per_second: float
    """Of one stream, once it has begun."""
    throughput: float
    """Tokens a second of `STREAMS` streams together, their prompts counted as time alone."""
    latency: float
    """Seconds to the first token after a prompt of `PROMPT` tokens, alone."""
    memory: float
    """Bytes of the weights as the engine holds them."""
    energy: float | None
    """Joules a token with `STREAMS` streams; None: there is no counter."""


def measure(
    decoder: Decoder,
    tokenizer: Tokenizer,
    joules: Callable[[], float] | None = None,
    *,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> Speed:
    """Ask an engine of a model, some rounds long.

    Args:
        decoder: the model; dense or quantised.
        tokenizer: its tokenizer.
        joules: what the machine has used so far, if it has a counter.
        rounds: how many; noise only ever slows a round.
        seed: of the prompts.
    """
    longest = decoder.config.context
    prompt, answer = min(PROMPT, longest // 2), min(ANSWER, longest // 4)
    engine = Engine(decoder, tokenizer, config=EngineConfig(kv_bytes=1 << 28, reuse=False, speculate="off"))
    draw = torch.Generator().manual_seed(seed)

    def ask(streams: int) -> tuple[float, float, float]:
        """Seconds to the first token, from there to the last, and of all."""
        ids = torch.randint(decoder.config.vocabulary, (streams, prompt), generator=draw).tolist()
        sampling = Sampling(max_tokens=answer, temperature=0.0, ignore_eos=True)
        requests = [Request(id=str(number), prompt=row, sampling=sampling) for number, row in enumerate(ids)]
        started, first, last = time.perf_counter(), 0.0, 0.0
        for _ in engine.run(requests):
            last = time.perf_counter()
            first = first or last
        return first - started, last - first, last - started

    ask(1)  # memory is touched, threads are awake
    alone = [ask(1) for _ in range(rounds)]
    spent, together = [], []
    for _ in range(rounds):
        before = joules() if joules is not None else 0.0
        together.append(ask(STREAMS)[2])
        spent.append((joules() - before) / (STREAMS * answer) if joules is not None else 0.0)
    return Speed(
        tokens_per_second=(answer - 1) / min(seconds for _, seconds, _ in alone),
        throughput=STREAMS * answer / min(together),
        latency=min(seconds for seconds, _, _ in alone),
        memory=_held(engine, decoder),
        energy=min(spent) if joules is not None else None,
    )


def _held(engine: Engine, decoder: Decoder) -> float:
    if isinstance(engine.runner, PlanRunner):
        weights = [step.weight for step in engine.runner.plan.steps if isinstance(step, Product)]
        return float(_bytes([part for weight in weights for part in (weight.data, weight.scale) if part is not None]))
    return float(_bytes([*decoder.parameters(), *decoder.buffers()]))


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Of different ones: an embedding and a head may be one."""
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())
