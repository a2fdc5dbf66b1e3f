"""Places that projects have in turns."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from steelyard.serve.turns import Turns


async def order_of(arrivals: list[str], places: int, leaving: frozenset[int] = frozenset()) -> tuple[list[int], int]:
    """Who had a place in which order, where all come at once and some leave while they wait; and how many at once."""
    turns, served = Turns(places), list[int]()
    inside = most = 0

    async def come(number: int, project: str) -> None:
        nonlocal inside, most
        async with turns.place(project):
            inside += 1
            most = max(most, inside)
            served.append(number)
            try:
                await asyncio.sleep(0)
            finally:
                inside -= 1

    tasks = [asyncio.create_task(come(number, project)) for number, project in enumerate(arrivals)]
    await asyncio.sleep(0)
    for number in leaving:
        tasks[number].cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError):
            await task
    assert turns._free == places, "every place is free again"
    assert not turns._waiting
    return served, most


def test_a_project_that_sends_much_waits_for_itself() -> None:
    arrivals = ["much"] * 20 + ["one", "two", "one"]
    served, _ = asyncio.run(order_of(arrivals, 1))
    assert served[0] == 0
    assert {served.index(20), served.index(21)} == {2, 3}, "after one more of who came first"
    assert served.index(22) <= 6
    assert sorted(served) == list(range(23))


@given(st.lists(st.sampled_from("abc"), max_size=20), st.integers(1, 4), st.frozensets(st.integers(0, 19)))
def test_nobody_is_lost(arrivals: list[str], places: int, leaving: frozenset[int]) -> None:
    leaving &= frozenset(range(len(arrivals)))
    served, most = asyncio.run(order_of(arrivals, places, leaving))
    assert set(range(len(arrivals))) - leaving <= set(served)
    assert len(set(served)) == len(served)
    assert most <= places


def test_who_leaves_while_a_thread_works_keeps_the_place_until_it_ends() -> None:
    """A thread cannot be stopped: as many work at once as there are places, however often somebody leaves."""
    import threading
    import time
    from types import SimpleNamespace

    from steelyard.serve.service import Service

    at_once = most = 0
    lock = threading.Lock()

    def form() -> str:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.05)
        with lock:
            at_once -= 1
        return "form"

    async def come_and_go() -> str | None:
        service: Any = SimpleNamespace(checks=Turns(2))
        for _ in range(6):
            leaving = asyncio.create_task(Service.checked(service, "a", form))
            await asyncio.sleep(0.005)
            leaving.cancel()
        return await Service.checked(service, "b", form)

    assert asyncio.run(come_and_go()) == "form"
    assert most <= 2


def test_of_each_project_the_first_is_first() -> None:
    served, _ = asyncio.run(order_of(["a", "b"] * 10, 2))
    assert [number for number in served if number % 2 == 0] == list(range(0, 20, 2))
