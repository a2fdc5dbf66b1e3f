from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, write

from steelyard.text.detokenizer import Detokenizer
from steelyard.text.tokenizer import Tokenizer

TEXT = st.text(st.characters(exclude_categories=("Cs",)))


@pytest.fixture(params=[*KINDS, "byte_level"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path, tiny_tokenizer_folder: Path) -> Tokenizer:
    folder = tiny_tokenizer_folder if request.param == "byte_level" else write(request.param, tmp_path)
    return Tokenizer.load(folder)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer)
    return "".join([*map(detokenizer.push, ids), detokenizer.flush()])


def test_random_ids_add_up_to_decode(tokenizer: Tokenizer) -> None:
    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.integers(0, tokenizer.vocabulary - 1), max_size=40))
    def check(ids: list[int]) -> None:
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)

    check()


def test_random_text_adds_up_to_decode(tokenizer: Tokenizer) -> None:
    @settings(max_examples=200, deadline=None)
    @given(TEXT)
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)

    check()


def test_released_text_never_changes_and_is_not_late(tokenizer: Tokenizer) -> None:
    """After each push the text so far is the decoded text without an incomplete character at its end."""
    ids = tokenizer.encode("the weights: 今天 😀🚀 café")
    detokenizer, text = Detokenizer(tokenizer), ""
    for count, id in enumerate(ids, 1):
        text += detokenizer.push(id)
        assert text == tokenizer.decode(ids[:count]).rstrip("\ufffd")


def test_characters_are_held_until_they_are_complete(tiny_tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizer_folder)
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode("龘")
    assert [detokenizer.push(id) for id in ids] == [""] * (len(ids) - 1) + ["龘"]
    assert detokenizer.push(ids[0]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""
    assert "".join(map(detokenizer.push, ids)) == "龘"


def test_special_tokens_are_skipped_inside_a_character(tiny_tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizer_folder)
    first, *rest = tokenizer.encode("龘")
    assert streamed(tokenizer, [1, first, 2, *rest, 0]) == "龘" == tokenizer.decode([1, first, 2, *rest, 0])


def test_work_per_token_does_not_grow(tokenizer: Tokenizer) -> None:
    def seconds(ids: list[int]) -> float:
        begin = time.process_time()
        streamed(tokenizer, ids)
        return time.process_time() - begin

    ids = tokenizer.encode("the weight is exact ") * 400
    short = min(seconds(ids[: len(ids) // 8]) for _ in range(3))
    assert seconds(ids) < 8 * short * 4 + 0.05
