"""Characters after characters: probabilities that add up, and a file that is checked."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.errors import CheckpointError
from steelyard.models.ngram import EDGE, FILE, CharacterModel

LETTERS = "abc "


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(LETTERS, max_size=12), min_size=1, max_size=6), st.integers(1, 5), st.text(LETTERS, max_size=6))
def test_the_probabilities_of_all_characters_add_up(texts: list[str], order: int, before: str) -> None:
    model = CharacterModel.learn(texts, order)
    seen = {letter for text in texts for letter in text} | {EDGE}
    total = sum(math.exp(model.log_probability(before, letter)) for letter in seen)
    unseen = math.exp(model.log_probability(before, "z"))
    assert total + unseen == pytest.approx(1)


def test_longer_contexts_know_more(tmp_path: Path) -> None:
    model = CharacterModel.learn(["the queen", "quite", "a quarter"] * 4, 4)
    assert math.exp(model.log_probability("the q", "u")) > 0.9
    assert math.exp(model.log_probability("", EDGE)) < 0.1
    by_hand = CharacterModel.learn(["ab"], 2)  # a: 1 of 1 after the edge, of one kind; else 1 of 3 characters, of 3
    alone = (1 + 3 / 4) / (3 + 3)
    assert by_hand.log_probability("", "a") == pytest.approx(math.log((1 + alone) / 2))
    model.save(tmp_path)
    again = CharacterModel.load(tmp_path)
    assert again is not None
    assert again.log_probability("the q", "u") == model.log_probability("the q", "u")
    assert CharacterModel.load(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    "content", ["{", '{"order": 3}', '{"order": 99, "counts": {}}', '{"order": 2, "counts": {"a": {"b": 0}}}']
)
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(CheckpointError, match=FILE):
        CharacterModel.load(tmp_path)
