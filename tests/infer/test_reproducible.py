"""An int8 checkpoint gives the same tokens alone and in any crowd (figure 32 of the reliability table, small)."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
import torch

from steelyard.compress.quantize import layout
from steelyard.infer.engine import Engine, EngineConfig
from steelyard.infer.request import Output, Request, Sampling
from steelyard.infer.runner import PlanRunner
from steelyard.models import weights
from steelyard.models.lora import Adapter

BLOCK_BYTES = 4 * 2 * 2 * 32 * 32  # of the tiny model, its heads padded to 32
CROWDS = {
    "roomy": EngineConfig(kv_bytes=400 * BLOCK_BYTES),
    "chunked": EngineConfig(kv_bytes=400 * BLOCK_BYTES, token_budget=11, max_running=9),
    "preempting": EngineConfig(kv_bytes=22 * BLOCK_BYTES, max_running=40),
    "without-reuse": EngineConfig(kv_bytes=400 * BLOCK_BYTES, reuse=False),
}


@pytest.fixture(scope="module")
def small(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """The int8 form of the tiny model, and two adapters."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "int8").mkdir()
    dense = weights.load(tiny_model, torch.float32)
    layout.write(dense, folder / "int8", tiny_model)
    adapters = {}
    for seed, (name, rank) in enumerate({"one": 4, "two": 9}.items()):
        generator = torch.Generator().manual_seed(seed)
        adapter = Adapter.create(dense, rank=rank, alpha=8, targets=("q_proj", "up_proj"), generator=generator)
        for _, b in adapter.pairs.values():
            b.normal_(0, 0.3, generator=generator)
        adapters[name] = folder / name
        adapters[name].mkdir()
        adapter.save(adapters[name], str(tiny_model))
    return folder / "int8", adapters


def requests(count: int) -> list[Request]:
    """Prompts of which many begin alike, greedy and sampled, with and without adapters, of two projects."""
    draw = random.Random(7)
    shared = [draw.randrange(3, 250) for _ in range(70)]
    made = []
    for number in range(count):
        own = [draw.randrange(3, 250) for _ in range(draw.randint(1, 60))]
        prompt = shared[: draw.choice([0, 33, 64, 70])] + own
        sampling = Sampling(
            max_tokens=draw.randint(1, 30),
            temperature=draw.choice([0.0, 0.8, 1.3]),
            top_k=draw.choice([0, 20]),
            top_p=draw.choice([1.0, 0.9]),
            seed=number,
            ignore_eos=True,
        )
        adapter = draw.choice([None, None, "one", "two"])
        project = draw.choice("ab")
        made.append(Request(id=str(number), prompt=prompt, sampling=sampling, adapter=adapter, project=project))
    return made


def tokens_of(engine: Engine, wanted: list[Request], arrivals: random.Random | None = None) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {request.id: [] for request in wanted}
    waiting = list(wanted)
    while waiting or engine.busy:
        for _ in range(len(waiting) if arrivals is None else arrivals.randint(0, 4)):
            if waiting:
                engine.add(waiting.pop(0))
        for output in engine.step():
            assert isinstance(output, Output)
            found[output.id] += output.tokens
    engine.check_integrity()
    assert engine.pool.available == engine.pool.blocks
    return found


@pytest.fixture(scope="module")
def alone(small: tuple[Path, dict[str, Path]]) -> dict[str, list[int]]:
    """Each request by itself, one token a step, with nothing in the cache."""
    folder, adapters = small
    engine = Engine.load(folder, adapters, msgspec.structs.replace(CROWDS["without-reuse"], speculate="off"))
    assert isinstance(engine.runner, PlanRunner)
    found = {}
    for request in requests(40):
        found |= tokens_of(engine, [request])
    return found


@pytest.mark.parametrize("crowd", CROWDS)
def test_alone_and_in_a_crowd(small: tuple[Path, dict[str, Path]], alone: dict[str, list[int]], crowd: str) -> None:
    folder, adapters = small
    engine = Engine.load(folder, adapters, CROWDS[crowd])
    for seed in range(2):  # the second time much is found in the cache
        wanted = requests(40)
        random.Random(seed).shuffle(wanted)
        assert tokens_of(engine, wanted, random.Random(seed)) == alone
    assert (engine.scheduler.preemptions > 0) == (crowd == "preempting")


def test_what_was_computed_is_found_again_by_its_owner(small: tuple[Path, dict[str, Path]]) -> None:
    folder, adapters = small
    engine = Engine.load(folder, adapters, CROWDS["roomy"])
    prompt = [(7 * place) % 250 + 3 for place in range(100)]
    greedy = Sampling(max_tokens=4, temperature=0, ignore_eos=True)

    def cached(**fields: str) -> int:
        (first, *_) = engine.run([Request(id="x", prompt=prompt, sampling=greedy, **fields)])
        return first.cached_tokens

    assert cached(project="a") == 0
    assert cached(project="a") == 96
    assert cached(project="b") == 0, "another project's"
    assert cached(project="a", adapter="one") == 0, "another model's"
    assert cached(project="a", adapter="one") == 96
    both = Request(id="n", prompt=[*prompt, 5], sampling=greedy, n=3, project="c")
    outputs = list(engine.run([both]))
    assert {output.choice: output.cached_tokens for output in outputs} == {0: 0, 1: 96, 2: 96}


def test_aborts_lose_no_block(small: tuple[Path, dict[str, Path]]) -> None:
    folder, adapters = small
    engine = Engine.load(folder, adapters, CROWDS["preempting"])
    draw = random.Random(1)
    alive: list[str] = []
    for number, request in enumerate(requests(150)):
        engine.add(request)
        alive.append(request.id)
        for _ in range(draw.randint(0, 2)):
            engine.step()
        if number % 2:
            engine.abort(alive.pop(draw.randrange(len(alive))))
        engine.check_integrity()
    for id in alive:
        engine.abort(id)
    engine.check_integrity()
    assert engine.pool.available == engine.pool.blocks
