"""Adapters come, change and go while rows run: each row wears what its name meant when it came, to its end."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from steelyard.compress.quantize import layout
from steelyard.errors import CheckpointError, ModelNotFoundError
from steelyard.infer import adapters as adapters_module
from steelyard.infer.engine import Engine, EngineConfig
from steelyard.infer.request import Failure, Output, Request, Sampling
from steelyard.infer.runner import PlanRunner
from steelyard.kernels import steps
from steelyard.models import weights
from steelyard.models.lora import Adapter

BLOCK_BYTES = 4 * 2 * 2 * 32 * 32  # of the tiny model, its heads padded to 32
SIZES = EngineConfig(kv_bytes=20 * BLOCK_BYTES, token_budget=64, max_running=12)
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANKS = (4, 5, 8, 16, 33, 64)
PROMPT = [(7 * place) % 250 + 3 for place in range(70)]
GREEDY = Sampling(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The int8 form of the tiny model, and six adapters: `0` to `5`."""
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "int8").mkdir()
    dense = weights.load(tiny_model, torch.float32)
    layout.write(dense, folder / "int8", tiny_model)
    for number, rank in enumerate(RANKS):
        generator = torch.Generator().manual_seed(number)
        targets = ALL if number % 2 else ("q_proj", "up_proj")
        adapter = Adapter.create(dense, rank=rank, alpha=8, targets=targets, generator=generator)
        for _, b in adapter.pairs.values():
            b.normal_(0, 0.3, generator=generator)
        (folder / str(number)).mkdir()
        adapter.save(folder / str(number), str(tiny_model))
    return folder


@pytest.fixture(params=["int8", "float32"])
def engine(request: pytest.FixtureRequest, folder: Path, tiny_model: Path) -> Engine:
    """One whose rows run by a plan, and one whose rows run by the reference forward."""
    if request.param == "int8":
        made = Engine.load(folder / "int8", config=SIZES)
        assert isinstance(made.runner, PlanRunner)
        return made
    return Engine.load(tiny_model, config=EngineConfig(kv_bytes=1 << 22, block_size=32), dtype=torch.float32)


@pytest.fixture
def two_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan with two places instead of sixty-four."""
    monkeypatch.setattr(steps, "MOST_ADAPTERS", 2)
    monkeypatch.setattr(adapters_module, "MOST_ADAPTERS", 2)


def ask(id: str, adapter: str | None, prompt: list[int] = PROMPT, **fields: object) -> Request:
    return Request(**{"id": id, "prompt": prompt, "sampling": GREEDY, "adapter": adapter, **fields})  # type: ignore[arg-type]


def finish(engine: Engine) -> dict[str, list[int]]:
    """Tokens by request, until nothing is left to do."""
    found: dict[str, list[int]] = {}
    while engine.busy:
        take(engine, found)
    assert engine.pool.available == engine.pool.blocks
    return found


def take(engine: Engine, found: dict[str, list[int]]) -> None:
    for output in engine.step():
        assert isinstance(output, Output), output
        found.setdefault(output.id, []).extend(output.tokens)
    engine.check_integrity()


def one(engine: Engine, adapter: str | None, prompt: list[int] = PROMPT) -> list[int]:
    engine.add(ask("one", adapter, prompt))
    return finish(engine)["one"]


def test_a_name_is_swapped_and_who_began_with_the_old_ends_with_it(engine: Engine, folder: Path) -> None:
    engine.load_adapter("x", folder / "0")
    old = one(engine, "x")
    engine.load_adapter("x", folder / "1")
    new = one(engine, "x")
    assert old != new
    engine.load_adapter("x", folder / "0")
    found: dict[str, list[int]] = {}
    for number in range(3):
        engine.add(ask(f"old-{number}", "x"))
    take(engine, found)
    engine.add(ask("queued", "x"))  # it has not run when the name changes
    digest = engine.load_adapter("x", folder / "1")
    engine.add(ask("new", "x"))
    take(engine, found)
    engine.drop_adapter("x")
    with pytest.raises(ModelNotFoundError, match="'x' is not loaded") as refused:
        engine.add(ask("late", "x"))
    assert (refused.value.param, refused.value.code) == ("model", "model_not_found")
    while engine.busy:
        take(engine, found)
    assert found == {"old-0": old, "old-1": old, "old-2": old, "queued": old, "new": new}
    assert not engine.adapters._versions, "nobody needs it any more"
    assert engine.load_adapter("y", folder / "1") == digest
    assert one(engine, "y") == new


def test_blocks_are_found_by_what_an_adapter_is_not_by_its_name(engine: Engine, folder: Path) -> None:
    def cached(adapter: str | None) -> int:
        engine.add(ask("a", adapter))
        (first, *_) = [output for output in iter_outputs(engine) if isinstance(output, Output)]
        return first.cached_tokens

    engine.load_adapter("x", folder / "0")
    assert (cached("x"), cached("x"), cached(None)) == (0, 64, 0)
    engine.load_adapter("x", folder / "1")
    assert (cached("x"), cached("x")) == (0, 64), "another adapter of the same name"
    engine.load_adapter("again", folder / "0")
    assert cached("again") == 64, "the same adapter by another name"


def iter_outputs(engine: Engine) -> Iterator[Output | Failure]:
    while engine.busy:
        yield from engine.step()


def test_mixed_rows_equal_solo_runs_while_adapters_come_change_and_go(folder: Path) -> None:
    """Figure 26 of the reliability table, small: tokens by digest against the same adapter alone, to the bit."""
    draw = random.Random(5)
    prompts = [[draw.randrange(3, 250) for _ in range(draw.randint(1, 90))] for _ in range(8)]
    alone: dict[tuple[str | None, int], list[int]] = {}
    digests = {}
    for number in range(len(RANKS)):
        solo = Engine.load(folder / "int8", {"only": folder / str(number)}, SIZES)
        digests[number] = solo.adapters.find("only").digest
        for place, prompt in enumerate(prompts):
            alone[digests[number], place] = one(solo, "only", prompt)
    solo = Engine.load(folder / "int8", config=SIZES)
    alone |= {(None, place): one(solo, None, prompt) for place, prompt in enumerate(prompts)}

    engine = Engine.load(folder / "int8", config=SIZES)
    names: dict[str, str] = {}
    expected: dict[str, list[int]] = {}
    found: dict[str, list[int]] = {}
    for number in range(150):
        action = draw.random()
        if action < 0.25 or not names:
            name, source = draw.choice("abc"), draw.randrange(len(RANKS))
            names[name] = engine.load_adapter(name, folder / str(source))
            assert names[name] == digests[source]
        elif action < 0.35:
            name = draw.choice(list(names))
            engine.drop_adapter(name)
            del names[name]
        adapter, place = draw.choice([None, *names]), draw.randrange(len(prompts))
        engine.add(ask(str(number), adapter, prompts[place], project=draw.choice("pq")))
        expected[str(number)] = alone[None if adapter is None else names[adapter], place]
        for _ in range(draw.randint(0, 4)):
            take(engine, found)
    while engine.busy:
        take(engine, found)
    assert engine.scheduler.preemptions > 0
    assert found == expected


@pytest.mark.usefixtures("two_places")
def test_more_adapters_than_places_are_read_again_when_they_are_named(folder: Path) -> None:
    alone = {}
    for number in range(5):
        solo = Engine.load(folder / "int8", {"only": folder / str(number)}, SIZES)
        alone[number] = one(solo, "only")
    paths = {str(number): folder / str(number) for number in range(5)}
    engine = Engine.load(folder / "int8", paths, SIZES)
    in_memory = [version for version in engine.adapters._versions.values() if version.weights is not None]
    assert len(in_memory) == 2
    for number in (0, 4, 1, 0):
        assert one(engine, str(number)) == alone[number]
    for number in range(5):  # all at once: two rows' adapters at a time, the others wait
        engine.add(ask(str(number), str(number)))
    assert finish(engine) == {str(number): tokens for number, tokens in alone.items()}
    assert sum(version.weights is not None for version in engine.adapters._versions.values()) == 2


@pytest.mark.usefixtures("two_places")
def test_the_longest_unused_gives_its_place_up_and_never_one_that_is_worn(folder: Path) -> None:
    engine = Engine.load(folder / "int8", {"0": folder / "0", "1": folder / "1"}, SIZES)
    engine.add(ask("a", "0"))
    engine.step()
    engine.load_adapter("2", folder / "2")
    placed = {name: engine.adapters.find(name).place is not None for name in "012"}
    assert placed == {"0": True, "1": False, "2": True}
    engine.add(ask("b", "2"))
    engine.step()
    engine.load_adapter("3", folder / "3")
    assert engine.adapters.find("3").place is None, "rows wear both places"
    finish(engine)


@pytest.mark.usefixtures("two_places")
@pytest.mark.parametrize("change", ["gone", "another"])
def test_what_cannot_be_read_again_fails_its_requests_alone(folder: Path, tmp_path: Path, change: str) -> None:
    shutil.copytree(folder / "0", tmp_path / "x")
    engine = Engine.load(folder / "int8", {"x": tmp_path / "x"}, SIZES)
    for number in (1, 2):
        engine.load_adapter(str(number), folder / str(number))
    shutil.rmtree(tmp_path / "x")
    if change == "another":
        shutil.copytree(folder / "3", tmp_path / "x")
    engine.add(ask("lost", "x", n=2))
    engine.add(ask("good", "1"))
    outputs = list(iter_outputs(engine))
    assert [(output.id, output.param) for output in outputs if isinstance(output, Failure)] == [("lost", None)]
    assert sum(len(output.tokens) for output in outputs if isinstance(output, Output)) == 12
    engine.check_integrity()


@pytest.mark.usefixtures("two_places")
def test_who_queued_keeps_its_adapter_when_the_files_are_gone(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "0", tmp_path / "x")
    engine = Engine.load(folder / "int8", {"x": tmp_path / "x"}, SIZES)
    expected = one(engine, "x")
    engine.add(ask("queued", "x"))
    engine.drop_adapter("x")
    shutil.rmtree(tmp_path / "x")
    for number in (1, 2, 3):
        engine.load_adapter(str(number), folder / str(number))
    assert finish(engine) == {"queued": expected}


def test_an_abort_gives_the_adapter_back(engine: Engine, folder: Path) -> None:
    engine.load_adapter("x", folder / "0")
    engine.add(ask("runs", "x", n=2))
    engine.step()
    engine.add(ask("waits", "x"))
    engine.drop_adapter("x")
    engine.abort("runs")
    engine.check_integrity()
    engine.abort("waits")
    assert not engine.adapters._versions
    engine.check_integrity()


def test_an_adapter_that_does_not_fit_changes_nothing(engine: Engine, folder: Path, tmp_path: Path) -> None:
    engine.load_adapter("x", folder / "0")
    expected = one(engine, "x")
    shutil.copytree(folder / "1", tmp_path / "bad")
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        engine.load_adapter("x", tmp_path / "bad")
    with pytest.raises(ModelNotFoundError):
        engine.drop_adapter("none")
    assert one(engine, "x") == expected


def test_a_row_never_runs_with_another_adapter_than_its_own(engine: Engine, folder: Path) -> None:
    """The check at the run call itself, were the counting wrong."""
    engine.load_adapter("x", folder / "0")
    engine.load_adapter("y", folder / "1")
    engine.add(ask("a", "x"))
    engine.step()
    engine.adapters.find("x").place = engine.adapters.find("y").place
    with pytest.raises(AssertionError, match="another's adapter"):
        engine.step()


def test_the_digest_is_of_all_that_changes_the_arithmetic(folder: Path) -> None:
    decoder = weights.load(folder / "int8")
    adapter = Adapter.load(folder / "1", decoder)
    again = Adapter.load(folder / "1", decoder)
    assert adapter.digest() == again.digest()
    again.alpha *= 2
    assert adapter.digest() != again.digest()
    name = "model.layers.0.self_attn.q_proj"
    changed = Adapter.load(folder / "1", decoder)
    changed.pairs[name][0][0, 0] += 1
    assert adapter.digest() != changed.digest()
