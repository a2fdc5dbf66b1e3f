"""Logits at several places of a sequence in one step: the rows that single steps give, and never more than fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from steelyard.compress.quantize import layout
from steelyard.infer.adapters import Adapters
from steelyard.infer.blocks import BlockPool
from steelyard.infer.request import Request
from steelyard.infer.runner import CacheSizes, Runner, open_runner
from steelyard.infer.scheduler import Scheduled, Scheduler
from steelyard.infer.sequence import Sequence
from steelyard.kernels import library
from steelyard.models import weights
from steelyard.models.lora import Adapter
from steelyard.text.tokenizer import Tokenizer

TOKENS = [(11 * place) % 250 + 3 for place in range(40)]


@pytest.fixture(scope="module", params=["plan", "reference"])
def open_(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Runner]:
    folder = tiny_model
    if request.param == "plan":
        folder = tmp_path_factory.mktemp("int8")
        layout.write(weights.load(tiny_model, torch.float32), folder, tiny_model)
    decoder = weights.load(folder, torch.float32)
    sizes = CacheSizes.fit(decoder, 1 << 22, 32, 4, library.load())
    return lambda: open_runner(decoder, sizes, tokens=64, rows=64, library=library.load())


class NoWearer:
    """Nobody wears an adapter here."""

    def prepare(self, adapter: Adapter) -> object:
        raise AssertionError

    def wear(self, digest: str, weights: object) -> int:
        raise AssertionError

    def take_off(self, place: int) -> None:
        raise AssertionError


NO_ADAPTERS = Adapters(NoWearer(), Adapter.load)  # type: ignore[arg-type]


def sequence(tiny_model: Path, tokens: list[int], blocks: list[int]) -> Sequence:
    made = Sequence(Request(id="a", prompt=tokens), 0, 0, Tokenizer.load(tiny_model))
    made.block_table = blocks
    return made


def run(runner: Runner, work: list[Scheduled]) -> torch.Tensor:
    logits = runner.run(work).clone()
    for unit in work:
        unit.sequence.computed += unit.count - len(unit.draft)
    return logits


def test_rows_of_a_run_are_those_of_single_steps(open_: Callable[[], Runner], tiny_model: Path) -> None:
    runner = open_()
    single = sequence(tiny_model, TOKENS, [0, 1])
    expected = torch.cat([run(runner, [Scheduled(single, 1, 1)]) for _ in TOKENS])
    runner = open_()
    mine, other = sequence(tiny_model, TOKENS, [2, 5]), sequence(tiny_model, TOKENS[:9], [7])
    found = run(runner, [Scheduled(mine, 25, 7), Scheduled(other, 8, 0)])
    rest = run(runner, [Scheduled(other, 1, 1), Scheduled(mine, 15, 15)])
    assert (len(found), len(rest)) == (7, 16)
    pairs = ((found, expected[18:25]), (rest[:1], expected[8:9]), (rest[1:], expected[25:]))
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        if "Plan" in type(runner).__name__:
            assert torch.equal(got, wanted)


def test_drafted_tokens_are_read_after_the_sequences_own(open_: Callable[[], Runner], tiny_model: Path) -> None:
    runner = open_()
    whole, short = sequence(tiny_model, TOKENS, [0, 1]), sequence(tiny_model, TOKENS[:30], [2, 3])
    expected = run(runner, [Scheduled(whole, 40, 11)])
    work = Scheduled(short, 40, 11, tuple(TOKENS[30:]))
    assert (work.tokens, work.draws) == (TOKENS, 11)
    torch.testing.assert_close(run(runner, [work]), expected)
    wrong = Scheduled(short, 3, 3, (9, 9, 9))  # overwritten by what follows
    assert wrong.tokens == [9, 9, 9]
    run(runner, [wrong])
    short.tokens += TOKENS[30:]
    torch.testing.assert_close(run(runner, [Scheduled(short, 10, 10)]), expected[1:])


def test_drafts_take_the_room_that_is_left(tiny_model: Path) -> None:
    pool = BlockPool(8, 4, reuse=False)
    scheduler = Scheduler(pool, token_budget=12, max_running=3, logit_rows=6, adapters=NO_ADAPTERS)
    rows = [sequence(tiny_model, [5, 6, 7], []) for _ in range(3)]
    for row in rows:
        scheduler.add(row)
    batch = scheduler.schedule()
    assert [work.wanted for work in batch] == [1, 1, 1]
    assert scheduler.room(batch) == 3
    longer = scheduler.lengthen(batch, {rows[0]: [1, 2], rows[2]: [3]})
    assert [(work.count, work.wanted, work.draft) for work in longer] == [(5, 3, (1, 2)), (3, 1, ()), (4, 2, (3,))]
    assert [len(row.block_table) for row in rows] == [2, 1, 1]
    scheduler.computed(longer)
    assert [row.computed for row in rows] == [3, 3, 3], "drafted tokens are not computed until they are accepted"
    rows[0].tokens += [9]
    scheduler.accept(rows[0], 0)
    assert [len(row.block_table) for row in rows] == [1, 1, 1], "what the rejected ones took is given back"
    assert pool.available == 5
    rows[2].tokens += [3, 8]
    scheduler.accept(rows[2], 1)
    assert (rows[2].computed, len(rows[2].block_table)) == (4, 1)


def test_drafts_take_no_block_that_is_held(tiny_model: Path) -> None:
    pool = BlockPool(2, 4, reuse=False)
    scheduler = Scheduler(pool, token_budget=64, max_running=2, logit_rows=16, adapters=NO_ADAPTERS)
    first, second = (sequence(tiny_model, [5, 6, 7], []) for _ in range(2))
    scheduler.add(first)
    scheduler.add(second)
    longer = scheduler.lengthen(scheduler.schedule(), {first: [1, 2, 3], second: [4, 5]})
    assert [work.draft for work in longer] == [(1,), (4,)]
    assert scheduler.preemptions == 0
