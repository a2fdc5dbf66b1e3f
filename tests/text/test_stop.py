from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.text.stop import StopStrings

STOPS = st.lists(st.text("ab\n", max_size=5), max_size=4).map(tuple)


def naive(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


@settings(max_examples=1000, deadline=None)
@given(STOPS, st.lists(st.text("ab\n", max_size=6), max_size=10))
def test_any_chunking_is_the_search_in_the_whole_text(stops: tuple[str, ...], chunks: list[str]) -> None:
    stopping = StopStrings(stops)
    released, hit = "", False
    for chunk in chunks:
        text, now = stopping.push(chunk)
        assert not (hit and text), "text after the stop"
        released, hit = released + text, now
    released += stopping.flush()
    assert (released, stopping.stopped) == naive("".join(chunks), stops)
    assert not hit or stopping.stopped


@settings(max_examples=500, deadline=None)
@given(STOPS, st.text("ab\n", max_size=30))
def test_only_a_possible_beginning_is_held_back(stops: tuple[str, ...], text: str) -> None:
    stopping, released = StopStrings(stops), ""
    for count, character in enumerate(text, 1):
        piece, hit = stopping.push(character)
        released += piece
        if hit:
            return
        held = text[len(released) : count]
        assert released + held == text[:count]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_examples() -> None:
    stopping = StopStrings(("\n\n", "END"))
    assert stopping.push("one\n") == ("one", False)
    assert stopping.push("two E") == ("\ntwo ", False)
    assert stopping.push("N") == ("", False)
    assert stopping.push("D three") == ("", True)
    assert stopping.push("more") == ("", True)
    assert stopping.flush() == ""


def test_the_longer_stop_that_began_earlier_wins_or_yields() -> None:
    assert StopStrings(("abc", "b")).push("xab") == ("x", False)
    assert StopStrings(("ab", "a")).push("xa") == ("x", True), "what begins at the same place need not be awaited"
    yielding = StopStrings(("abc", "b"))
    assert yielding.push("xab") == ("x", False)
    assert yielding.push("d") == ("a", True)
    ending = StopStrings(("abc", "b"))
    ending.push("xab")
    assert (ending.flush(), ending.stopped) == ("a", True)


@pytest.mark.parametrize("stops", [(), ("",)])
def test_without_stops_all_is_released_at_once(stops: tuple[str, ...]) -> None:
    stopping = StopStrings(stops)
    assert stopping.push("all of it") == ("all of it", False)
    assert stopping.flush() == ""


def test_a_hostile_stop_string_costs_no_more_than_another() -> None:
    stopping = StopStrings(("a" * 20_000 + "b",) * 4)
    begin = time.process_time()
    for _ in range(4000):
        stopping.push("aaaaaaaaaa")
    assert time.process_time() - begin < 2
