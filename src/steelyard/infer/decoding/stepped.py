"""Work that is done a step at a time, so that who does it can look up in between."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

Told = TypeVar("Told")
Result = TypeVar("Result")

Steps = Generator[Told, None, Result]
"""Says something at every step, and has its result at its end."""


def last(steps: Steps[Any, Result]) -> Result:
    """The result, once all steps are done."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result
