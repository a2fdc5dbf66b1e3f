"""Looking up against a search through the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from steelyard.infer.decoding.prompt_lookup import GRAM, PromptLookup


class Text:
    def __init__(self) -> None:
        self.tokens: list[int] = []


def searched(tokens: list[int], length: int) -> list[int] | None:
    """What followed the latest earlier occurrence of the last run; it goes on into itself."""
    for place in range(len(tokens) - 1, GRAM - 1, -1):
        if tokens[place - GRAM : place] == tokens[-GRAM:]:
            text = list(tokens)
            for ahead in range(length):
                text.append(text[place + ahead])
            return text[len(tokens) :]
    return None


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=12), st.integers(1, 12))
def test_it_finds_what_a_search_finds(pieces: list[list[int]], length: int) -> None:
    lookup, sequence = PromptLookup(), Text()
    for piece in pieces:  # the text grows between the questions
        sequence.tokens += piece
        found = lookup.propose({sequence: length})  # type: ignore[dict-item]
        assert found.get(sequence) == searched(sequence.tokens, length)  # type: ignore[call-overload]
