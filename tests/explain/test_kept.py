"""What is held for a while: read once, let go after it was last wanted, also when nobody stayed for it."""

from __future__ import annotations

import threading
import time

import pytest

from steelyard.errors import CheckpointError
from steelyard.explain.kept import Kept
from steelyard.explain.subject import at_once


def until(there: bool, kept: Kept[int], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while kept.is_there != there and time.monotonic() < deadline:
        time.sleep(0.01)
    return kept.is_there == there


def test_it_is_read_once_and_let_go() -> None:
    reads: list[int] = []
    kept = Kept(lambda: reads.append(1) or len(reads), seconds=0.2)
    assert [at_once(kept.get()) for _ in range(3)] == [1, 1, 1]
    assert until(False, kept)
    assert at_once(kept.get()) == 2


def test_who_leaves_while_it_is_read_leaves_nothing_behind() -> None:
    may = threading.Event()
    kept = Kept(lambda: may.wait(5) and 7, seconds=0.1)
    steps = kept.get()
    next(steps)
    steps.close()
    may.set()
    assert until(False, kept)


def test_what_could_not_be_read_is_tried_again() -> None:
    tries: list[int] = []

    def read() -> int:
        tries.append(1)
        if len(tries) == 1:
            raise CheckpointError("no memory")
        return 5

    kept = Kept(read)
    with pytest.raises(CheckpointError, match="no memory"):
        at_once(kept.get())
    assert at_once(kept.get()) == 5
    kept.drop()
