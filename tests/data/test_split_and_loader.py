"""What must hold of duplicates, splits, packs and the order of rows, whatever the rows."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steelyard.data.loader import Loader
from steelyard.data.packing import ENOUGH, LIKE, bins, pack, stacks
from steelyard.data.rows import Conversation, Message, TokenRow
from steelyard.data.split import remove_duplicates, split
from steelyard.errors import ConfigError

FEW = st.sampled_from(["a", " a", "b", "c", "d", "a\x00b"])


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    turns = [Message("user", draw(FEW)), Message("assistant", draw(FEW), draw(st.booleans()))]
    if draw(st.booleans()):
        turns.insert(0, Message("system", draw(FEW)))
    return Conversation(messages=tuple(turns))


def said(row: Conversation) -> tuple[str, ...]:
    return tuple(message.content.strip() for message in row.messages if message.role == "user")


@given(st.lists(conversations(), min_size=1, max_size=30), st.data())
def test_a_split_keeps_every_row_and_no_text_is_in_both_parts(rows: list[Conversation], data: st.DataObject) -> None:
    holdout = data.draw(st.integers(0, len(rows) - 1))
    seed = data.draw(st.integers(0, 2**63 - 1))
    kept, held = split(rows, holdout, seed)
    assert Counter(kept + held) == Counter(rows)
    assert len(held) <= holdout
    assert not set(map(said, kept)) & set(map(said, held))
    assert (kept, held) == split(rows, holdout, seed)


def test_a_split_of_distinct_rows_holds_out_exactly_as_many_and_the_seed_decides_which() -> None:
    rows = [Conversation(messages=(Message("user", str(n)), Message("assistant", "x"))) for n in range(50)]
    parts = [split(rows, 10, seed)[1] for seed in range(3)]
    assert [len(part) for part in parts] == [10, 10, 10]
    assert parts[0] != parts[1] != parts[2]


@pytest.mark.parametrize("holdout", [-1, 1, 5])
def test_a_split_that_leaves_nothing_to_learn_from_is_refused(holdout: int) -> None:
    with pytest.raises(ConfigError, match=f"cannot hold out {holdout} of 1 rows"):
        split([Conversation(messages=(Message("text", "a"),))], holdout, 0)


@given(st.lists(conversations(), max_size=30))
def test_removing_duplicates_keeps_the_first_of_each_in_order_and_is_idempotent(rows: list[Conversation]) -> None:
    once = remove_duplicates(rows)
    assert remove_duplicates(once) == once
    keys = [tuple((turn.role, turn.content.strip(), turn.trained) for turn in row.messages) for row in rows]
    assert once == [row for index, row in enumerate(rows) if keys[index] not in keys[:index]]


@given(st.lists(st.integers(1, 60), max_size=60), st.integers(1, 50))
def test_bins_are_a_partition_within_capacity(lengths: list[int], capacity: int) -> None:
    groups = bins(lengths, capacity)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[row] for row in group) <= capacity


def test_a_pack_predicts_each_trained_token_from_the_one_before_in_its_row() -> None:
    made = pack(
        [
            TokenRow(tokens=[5, 6, 7], trained=[False, False, True]),
            TokenRow(tokens=[8, 9], trained=[False, True]),
        ]
    )
    assert made.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert made.positions.tolist() == [0, 1, 2, 0, 1]
    assert made.lengths == [3, 2]
    assert made.places.tolist() == [1, 3]
    assert made.targets.tolist() == [7, 9]


@given(st.integers(1, 20), st.integers(0, 25), st.integers(0, 2**63 - 1), st.integers(0, 40))
def test_a_restored_loader_goes_on_identically(rows: int, batch_size: int, seed: int, taken: int) -> None:
    first = Loader(rows, batch_size, seed)
    for _ in range(taken):
        first.next()
    second = Loader(rows, batch_size, seed)
    second.next()
    second.restore(first.state())
    assert [first.next() for _ in range(25)] == [second.next() for _ in range(25)]


@given(st.integers(1, 30), st.integers(0, 35), st.integers(0, 2**63 - 1))
def test_every_epoch_is_a_permutation(rows: int, batch_size: int, seed: int) -> None:
    loader = Loader(rows, batch_size, seed)
    for epoch in range(3):
        assert loader.epoch == epoch
        seen = [row for _ in range(loader.batches_per_epoch) for row in loader.next()]
        assert sorted(seen) == list(range(rows))
    assert loader.state() == {"epoch": 3, "position": 0}


def test_epochs_and_seeds_have_different_orders() -> None:
    loader = Loader(100, 0, 0)
    assert len({tuple(order) for order in (loader.next(), loader.next(), Loader(100, 0, 1).next())}) == 3


@pytest.mark.parametrize("state", [{"epoch": 0, "position": 5}, {"epoch": -1, "position": 0}])
def test_a_position_beyond_the_rows_is_refused(state: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="the data has changed since; start over with --fresh"):
        Loader(5, 2, 0).restore(state)


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 4000))
def test_rows_of_like_length_are_stacked(lengths: list[int], capacity: int) -> None:
    groups = stacks(lengths, capacity)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[row] for row in group)
        assert len(group) == 1 or longest * len(group) <= capacity
        padded_after = [row for place, row in enumerate(group) if longest * place >= ENOUGH]
        assert all(lengths[row] >= LIKE * longest for row in padded_after)


def test_rows_that_belong_together_are_not_cut() -> None:
    lengths = [600] + [50] * 31
    assert sorted(map(len, stacks(lengths, 4096))) == [1, 31]
    assert sorted(map(len, stacks([100] * 8 + [60] * 12 + [40] * 12, 4096, whole=True))) == [32]
    assert sorted(map(len, stacks(lengths, 600 * 32, whole=True))) == [32]
