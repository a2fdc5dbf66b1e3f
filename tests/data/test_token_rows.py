"""Token rows in arrays: what goes in comes out, from memory and from mapped files, which appear whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steelyard.data.rows import TokenRow, token_counts
from steelyard.data.token_rows import FILES, TokenRows

TOKENS = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.booleans()), min_size=1, max_size=20)


def rows_of(drawn: list[list[tuple[int, bool]]]) -> list[TokenRow]:
    return [TokenRow(tokens=[token for token, _ in row], trained=[flag for _, flag in row]) for row in drawn]


@given(st.lists(TOKENS, max_size=8))
def test_in_memory(drawn: list[list[tuple[int, bool]]]) -> None:
    rows = rows_of(drawn)
    kept = TokenRows.of(iter(rows))
    assert list(kept) == rows
    assert kept.counts() == token_counts(rows)
    assert [int(length) for length in kept.lengths] == [len(row.tokens) for row in rows]
    assert [int(count) for count in kept.targets] == [row.targets for row in rows]


def test_in_files_that_are_taken_again_by_their_key(tmp_path: Path) -> None:
    rows = rows_of([[(1, False), (2**32 - 1, True)], [(7, False)], [(3, False), (4, True), (5, True)]])
    folder = tmp_path / "rows"
    assert list(TokenRows.mapped(folder, "one", iter(rows))) == rows

    def never() -> Iterator[TokenRow]:
        raise AssertionError("they are there already")
        yield

    assert list(TokenRows.mapped(folder, "one", never())) == rows
    assert list(TokenRows.mapped(folder, "another", rows[:1])) == rows[:1], "made anew"
    assert list(TokenRows.mapped(folder, "none", [])) == []


def test_a_fault_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[TokenRow]:
        yield TokenRow(tokens=[1], trained=[False])
        raise ValueError("row 2 is wrong")

    with pytest.raises(ValueError, match="row 2"):
        TokenRows.mapped(tmp_path / "rows", "key", broken())
    assert list(tmp_path.iterdir()) == []


def test_five_bytes_a_token(tmp_path: Path) -> None:
    rows = [TokenRow(tokens=list(range(1000)), trained=[False] + [True] * 999)] * 50
    TokenRows.mapped(tmp_path / "rows", "key", rows)
    assert sum((tmp_path / "rows" / name).stat().st_size for name in FILES) == 50 * (5 * 1000 + 8)
