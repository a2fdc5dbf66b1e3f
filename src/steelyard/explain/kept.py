"""Float weights of a served model: read by a thread when they are needed, let go when they were not for a while."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

from steelyard.explain.subject import Steps
from steelyard.infer.adapters import use_one_core

PAUSE = 0.005
"""Seconds that are waited at once for what the thread reads."""
KEPT_SECONDS = 600.0
"""How long it stays after it was last asked for."""
T = TypeVar("T")


class Kept(Generic[T]):
    """Something that takes time to read, and memory to keep.

    Args:
        read: reads it.
        seconds: how long it stays.
    """

    def __init__(self, read: Callable[[], T], seconds: float = KEPT_SECONDS) -> None:
        self._read, self._seconds = read, seconds
        self._thread = ThreadPoolExecutor(1, "explain", initializer=_in_the_background)
        self._found: Future[T] | None = None
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    @property
    def is_there(self) -> bool:
        """Whether it is held, or being read."""
        return self._found is not None

    def get(self) -> Steps[T]:
        """It, once it is read. Whoever leaves meanwhile leaves nothing behind for ever."""
        found = self._asked()
        while not found.done():
            wait([found], PAUSE)
            yield
        self._touch()
        return found.result()

    def drop(self) -> None:
        """Let it go; who has it keeps it to the end of his work."""
        with self._lock:
            self._found = None

    def _asked(self) -> Future[T]:
        with self._lock:
            found = self._found
            if found is None or (found.done() and found.exception() is not None):
                found = self._found = self._thread.submit(self._read)
            else:
                return found
        found.add_done_callback(lambda _: self._touch())
        return found

    def _touch(self) -> None:
        """Count its time from now on."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(self._seconds, self.drop)
            self._timer.daemon = True
            self._timer.start()


def _in_the_background() -> None:
    """Compute with one thread, where the processor has nothing better to do."""
    use_one_core()
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
