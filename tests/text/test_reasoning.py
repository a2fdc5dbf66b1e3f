"""Thoughts and answers, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steelyard.text.reasoning import Answered, ReasoningReader, Thought, begun, parted, thinks

CASES = [
    ("Paris.", False, ("", "Paris.")),
    (" Paris.", False, ("", " Paris.")),
    ("<think>\nIn France?\n</think>\n\nParis.", False, ("In France?", "Paris.")),
    ("In France?\n</think>\n\nParis.", True, ("In France?", "Paris.")),
    ("<think></think>Paris.", False, ("", "Paris.")),
    ("<think>\n\n</think>\n\nParis </think>.", False, ("", "Paris </think>.")),
    ("<think>a < b </ think", False, ("a < b </ think", "")),
    ("Not <think>here</think>", False, ("", "Not <think>here</think>")),
    ("<thin", False, ("", "<thin")),
    ("", False, ("", "")),
    ("never ends ", True, ("never ends", "")),
]


@pytest.mark.parametrize(("text", "inside", "expected"), CASES)
def test_a_whole_text(text: str, inside: bool, expected: tuple[str, str]) -> None:
    assert parted(text, inside=inside) == expected


@given(st.sampled_from(CASES), st.lists(st.integers(1, 9), max_size=60))
def test_cuts_change_nothing(case: tuple[str, bool, tuple[str, str]], sizes: list[int]) -> None:
    text, inside, expected = case
    reader, found = ReasoningReader(inside=inside), list[Thought | Answered]()
    rest = text
    for size in [*sizes, len(text) + 1]:
        found += reader.push(rest[:size])
        rest = rest[size:]
    found += reader.flush()
    assert all(piece.text for piece in found)
    assert "".join(piece.text for piece in found if isinstance(piece, Thought)) == expected[0]
    assert "".join(piece.text for piece in found if isinstance(piece, Answered)) == expected[1]


@given(st.text("<>/think \n", max_size=80), st.booleans())
def test_nothing_but_marks_and_spaces_is_lost(text: str, inside: bool) -> None:
    thought, said = parted(text, inside=inside)
    assert "".join((thought + said).split()) in "".join(text.split()) or "</think>" in text or "<think>" in text


def test_who_thinks() -> None:
    assert thinks("{{ '<think>' }} {{ '</think>' }}")
    assert not thinks("{{ messages }}")
    assert begun("<|im_start|>assistant\n<think>\n")
    assert not begun("<|im_start|>assistant\n")
