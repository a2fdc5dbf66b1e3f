"""Who waits for an engine, and whose turn it is: by priority, then the project served least, then who came first.

How much each project has been served is a virtual counter of tokens (Sheng et al. 2024). Knows nothing of tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from steelyard.infer.request import Priority, Request

PRIORITIES: tuple[Priority, ...] = ("interactive", "batch")
Waiter = TypeVar("Waiter", bound="Asked")


class Asked(Protocol):
    """Something that waits for a request."""

    @property
    def request(self) -> Request:
        """Whose turn it is depends on this."""
        ...


class Waiting(Generic[Waiter]):
    """Who waits: a queue per priority and project, and how much each project has been served."""

    def __init__(self) -> None:
        self._queues: dict[Priority, dict[str, deque[Waiter]]] = {priority: {} for priority in PRIORITIES}
        self.served: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(len(queue) for queues in self._queues.values() for queue in queues.values())

    def __iter__(self) -> Iterator[Waiter]:
        return (waiter for queues in self._queues.values() for queue in queues.values() for waiter in queue)

    def add(self, waiter: Waiter, active: set[str], *, first: bool = False) -> None:
        """Queue one, at the end or (one that was preempted) at the beginning.

        Args:
            waiter: who waits.
            active: projects that run something.
            first: at the beginning of its project's queue.
        """
        project = waiter.request.project
        busy = [self.served[other] for other in active | self._projects() if other != project and other in self.served]
        if project not in active | self._projects():
            # Who was away has saved nothing up: he begins where the least served of the others is.
            self.served[project] = max(self.served.get(project, 0), min(busy, default=0))
        queue = self._queues[waiter.request.priority].setdefault(project, deque())
        if first:
            queue.appendleft(waiter)
        else:
            queue.append(waiter)

    def next(self) -> Waiter | None:
        """Whose turn it is; he stays in the queue."""
        for queues in self._queues.values():
            if queues:
                return queues[min(queues, key=lambda project: self.served[project])][0]
        return None

    def remove(self, waiter: Waiter) -> None:
        """Take one out of its queue."""
        queues = self._queues[waiter.request.priority]
        project = waiter.request.project
        queues[project].remove(waiter)
        if not queues[project]:
            del queues[project]

    def forget(self, active: set[str]) -> None:
        """Drop the counters when nobody is left to compare with."""
        if not active and not len(self):
            self.served.clear()

    def _projects(self) -> set[str]:
        return {project for queues in self._queues.values() for project in queues}
