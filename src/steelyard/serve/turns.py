"""A few places for what is not the engine's work: projects that wait have them in turns."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator


class Turns:
    """Places. One that becomes free goes to the project whose turn it is, however many of another's wait.

    Args:
        places: how many there are.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """Who waits, by project; the first project is next."""

    @contextlib.asynccontextmanager
    async def place(self, project: str) -> AsyncGenerator[None, None]:
        """While a project has a place."""
        if self._free:
            self._free -= 1
        else:
            await self._turn(project)
        try:
            yield
        finally:
            self._leave()

    async def _turn(self, project: str) -> None:
        mine = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(project, deque()).append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():  # the place came as the other left
                self._leave()
            raise

    def _leave(self) -> None:
        """Hand a place on, or keep it free."""
        while self._waiting:
            project, queue = self._waiting.popitem(last=False)
            while queue and queue[0].done():  # who has left has no turn
                queue.popleft()
            if not queue:
                continue
            mine = queue.popleft()
            if queue:
                self._waiting[project] = queue  # behind the others
            mine.set_result(None)
            return
        self._free += 1
