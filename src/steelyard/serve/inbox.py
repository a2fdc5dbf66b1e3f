"""What an engine has said and nobody has read yet. Behind a slow reader it is joined: he holds text, not messages."""

from __future__ import annotations

import asyncio
from collections import deque

import msgspec

from steelyard.errors import SteelyardError
from steelyard.infer.request import Output

Item = Output | SteelyardError | None
"""None: it was given up."""

MOST_WAITING = 64
"""Outputs that wait before later ones are joined to them."""
MOST_JOINED = 64
"""Tokens of a joined output."""


class Inbox(asyncio.Queue[Item]):
    """A queue in the order of each choice. An output takes some 500 bytes, a token that is joined to one some 50."""

    def _init(self, maxsize: int) -> None:
        self._queue = deque[list[Item]]()
        self._latest: dict[tuple[str, int], list[Item]] = {}

    def _put(self, item: Item) -> None:
        if not isinstance(item, Output):
            self._queue.append([item])
            return
        place = item.id, item.choice
        cell = self._latest.get(place)
        if cell is not None and len(self._queue) >= MOST_WAITING and isinstance(cell[0], Output):
            joined = _join(cell[0], item)
            if joined is not None:
                cell[0] = joined
                return
        self._latest[place] = cell = [item]
        self._queue.append(cell)

    def _get(self) -> Item:
        cell = self._queue.popleft()
        item = cell[0]
        if isinstance(item, Output) and self._latest.get((item.id, item.choice)) is cell:
            del self._latest[item.id, item.choice]
        return item


def _join(first: Output, second: Output) -> Output | None:
    """Both as one, unless that were too much or of different kinds."""
    scored = first.prompt_logprobs is not None or second.prompt_logprobs is not None
    if scored or (first.logprobs is None) != (second.logprobs is None) or len(first.tokens) >= MOST_JOINED:
        return None
    logprobs = None if first.logprobs is None or second.logprobs is None else first.logprobs + second.logprobs
    return msgspec.structs.replace(
        second, text=first.text + second.text, tokens=first.tokens + second.tokens, logprobs=logprobs
    )
