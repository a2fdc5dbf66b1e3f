"""Who is served when: a flood of one project does not starve the others, and batch work yields."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import torch

from steelyard.infer.engine import Engine, EngineConfig
from steelyard.infer.request import Output, Request, Sampling


def make(tiny_model: Path, **fields: int) -> Engine:
    config = EngineConfig(kv_bytes=1 << 24, **{"max_running": 4, "token_budget": 64, **fields})
    return Engine.load(tiny_model, config=config, dtype=torch.float32)


def request(id: str, project: str, length: int = 20, tokens: int = 8, **fields: object) -> Request:
    prompt = [random.Random(id).randrange(3, 250) for _ in range(length)]
    sampling = Sampling(max_tokens=tokens, temperature=0, ignore_eos=True)
    return Request(id=id, prompt=prompt, sampling=sampling, project=project, **fields)  # type: ignore[arg-type]


def jain(shares: list[float]) -> float:
    """Jain's index: 1 if all are equal, 1 / n if one has everything."""
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


def test_a_flood_does_not_starve_the_polite(tiny_model: Path) -> None:
    """One project queues 60 requests at once; three others always have two under way."""
    engine = make(tiny_model)
    for number in range(60):
        engine.add(request(f"flood-{number}", "flood"))
    begun: Counter[str] = Counter()
    service: Counter[str] = Counter()
    waited: dict[str, int] = {}
    since: dict[str, int] = {}
    for step in range(300):
        for project in ("a", "b", "c"):
            under_way = sum(1 for id in engine.sequences if id.startswith(project))
            for _ in range(2 - under_way):
                id = f"{project}-{begun[project]}"
                begun[project] += 1
                since[id] = step
                engine.add(request(id, project))
        for output in engine.step():
            assert isinstance(output, Output)
            service[output.id.partition("-")[0]] += 1
            if output.id in since:
                waited[output.id] = step - since.pop(output.id)
    assert jain([service[project] for project in ("flood", "a", "b", "c")]) > 0.95
    assert max(waited.values()) <= 40, "first token after two rounds of the four slots at most"


def test_who_comes_back_has_saved_nothing_up(tiny_model: Path) -> None:
    engine = make(tiny_model, max_running=1)
    for number in range(30):
        engine.add(request(f"old-{number}", "old"))
    for _ in range(100):
        engine.step()
    for number in range(30):
        engine.add(request(f"new-{number}", "new"))
    service: Counter[str] = Counter()
    for _ in range(100):
        for output in engine.step():
            service[output.id.partition("-")[0]] += 1
    assert abs(service["old"] - service["new"]) <= 16


def test_batch_work_runs_where_there_is_room(tiny_model: Path) -> None:
    engine = make(tiny_model, max_running=2)
    for number in range(6):
        engine.add(request(f"batch-{number}", "a", priority="batch"))
    engine.step()
    for number in range(3):
        engine.add(request(f"now-{number}", "b"))
    ended: list[str] = []
    while engine.busy:
        for output in engine.step():
            assert isinstance(output, Output)
            if output.finish_reason is not None:
                ended.append(output.id.partition("-")[0])
    assert ended[:5] == ["batch", "batch", "now", "now", "now"] or ended[:5].count("now") == 3
    assert ended.count("batch") == 6


def test_a_long_prompt_delays_running_streams_by_one_chunk(tiny_model: Path) -> None:
    """Every step of a long prompt's prefill also gives each running stream its token."""
    engine = make(tiny_model, token_budget=32)
    for number in range(3):
        engine.add(request(f"stream-{number}", "a", length=5, tokens=60))
    engine.step()
    engine.add(request("long", "b", length=400))
    prefilling, outputs = 0, engine.step()
    while "long" not in {output.id for output in outputs}:
        assert Counter(output.id for output in outputs) == {f"stream-{number}": 1 for number in range(3)}
        prefilling, outputs = prefilling + 1, engine.step()
    assert prefilling >= 400 // 32
