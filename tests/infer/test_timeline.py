"""Where a request's time goes: its moments are in order, and between those of the caller's own clock."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from steelyard.infer.engine import Engine, EngineConfig
from steelyard.infer.request import Output, Request, Sampling, Timeline


def request(id: str, n: int = 1, length: int = 20, **fields: object) -> Request:
    sampling = Sampling(**{"max_tokens": 4, "temperature": 0, "ignore_eos": True, **fields})  # type: ignore[arg-type]
    return Request(id=id, prompt=list(range(3, 3 + length)), n=n, sampling=sampling)


def load(tiny_model: Path, **sizes: int) -> Engine:
    return Engine.load(tiny_model, config=EngineConfig(**{"kv_bytes": 1 << 24, **sizes}), dtype=torch.float32)


def steps(engine: Engine) -> list[list[Output]]:
    """What each step adds until all is done; a moment passes before every one."""
    found: list[list[Output]] = []
    while engine.busy:
        time.sleep(0.002)
        found.append([output for output in engine.step() if isinstance(output, Output)])
    return found


def timelines(outputs: list[list[Output]]) -> dict[str, Timeline]:
    """By request; none has two."""
    told = [output for step in outputs for output in step if output.timeline is not None]
    assert all(output.finish_reason is not None for output in told)
    assert len({output.id for output in told}) == len(told)
    return {output.id: output.timeline for output in told if output.timeline is not None}


def test_the_phases_of_a_request_that_waits(tiny_model: Path) -> None:
    engine = load(tiny_model, max_running=1, token_budget=8)
    began = time.monotonic()
    engine.add(request("first"))
    engine.add(request("second"))
    found = timelines(steps(engine))
    ended = time.monotonic()
    first, second = found["first"], found["second"]
    for one in (first, second):
        assert began <= one.arrived <= one.scheduled < one.first_token < one.last_token <= ended
        assert one.prefill_seconds >= 2 * 0.002, "20 tokens by 8: two more steps until the first token"
        assert one.decode_seconds >= 3 * 0.002, "three more tokens"
        parts = one.queue_seconds + one.prefill_seconds + one.decode_seconds
        assert parts == pytest.approx(one.last_token - one.arrived)
    assert second.scheduled >= first.last_token, "there is one place"
    assert second.queue_seconds > first.queue_seconds


def test_a_request_that_is_preempted_is_scheduled_once(tiny_model: Path) -> None:
    engine = load(tiny_model, kv_bytes=24 * 4 * 512, block_size=4, max_running=20)  # 24 blocks
    for number in range(8):
        engine.add(request(str(number), max_tokens=12))
    outputs = steps(engine)
    assert engine.scheduler.preemptions > 0
    begun = {output.id: step for step, found in reversed([*enumerate(outputs)]) for output in found}
    ended = {output.id: step for step, found in enumerate(outputs) for output in found}
    for id, timeline in timelines(outputs).items():
        assert timeline.scheduled < timeline.first_token
        assert timeline.decode_seconds >= (ended[id] - begun[id]) * 0.002, "preempted or not"


def test_choices_share_a_timeline(tiny_model: Path) -> None:
    engine = load(tiny_model)
    engine.add(request("a", n=3, temperature=1.0))
    outputs = steps(engine)
    timeline = timelines(outputs)["a"]
    ends = [output for step in outputs for output in step if output.finish_reason is not None]
    assert [output.timeline is None for output in ends] == [True, True, False]
    assert timeline.decode_seconds > 0


def test_one_token_has_no_decoding_and_none_ends_with_the_prompt(tiny_model: Path) -> None:
    engine = load(tiny_model)
    engine.add(request("one", max_tokens=1))
    engine.add(request("none", max_tokens=0, prompt_logprobs=0))
    for timeline in timelines(steps(engine)).values():
        assert timeline.prefill_seconds > 0
        assert timeline.decode_seconds == 0


def test_waiting_before_the_engine_counts(tiny_model: Path) -> None:
    """A request that came in the middle of a step is taken in after it."""
    engine = load(tiny_model)
    engine.add(request("a"), arrived=time.monotonic() - 1.5)
    assert 1.5 <= timelines(steps(engine))["a"].queue_seconds < 60
