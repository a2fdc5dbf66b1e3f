"""What a model thinks before it answers, between `<think>` and `</think>`: parted from what it says, as the text comes.

It thinks at the beginning alone, and only if its template knows these marks. Knows neither models nor HTTP.
"""

from __future__ import annotations

from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"


class Thought(NamedTuple):
    """Text that is no answer."""

    text: str


class Answered(NamedTuple):
    """Text of the answer."""

    text: str


def thinks(template: str) -> bool:
    """Whether a model with this template may think."""
    return OPEN in template and CLOSE in template


def begun(prompt: str) -> bool:
    """Whether a prompt ends where the model already thinks."""
    return prompt.rstrip().endswith(OPEN)


class ReasoningReader:
    """Parts a text into thoughts and the answer; spaces around both are nobody's.

    Args:
        inside: the prompt has opened the thoughts.
    """

    def __init__(self, *, inside: bool = False) -> None:
        self.inside = inside
        self._rest = ""
        self._over = self._told = False

    def push(self, text: str) -> list[Thought | Answered]:
        """What is certain once this has come."""
        self._rest += text
        found: list[Thought | Answered] = []
        if not self.inside and not self._over:
            start = self._rest.lstrip()
            if OPEN.startswith(start):  # nothing so far, or the beginning of the mark
                return []
            if start.startswith(OPEN):
                self.inside, self._rest = True, start[len(OPEN) :]
            else:
                self._over = self._told = True
        if self.inside:
            found += self._thoughts()
        if self._over and self._rest:
            said, self._rest = self._rest if self._told else self._rest.lstrip(), ""
            if said:
                self._told = True
                found.append(Answered(said))
        return found

    def flush(self) -> list[Thought | Answered]:
        """What is left at the end of the text."""
        rest, self._rest = self._rest, ""
        if self.inside:
            rest = rest.rstrip()
            return [Thought(rest)] if rest else []
        return [Answered(rest)] if rest else []

    def _thoughts(self) -> list[Thought | Answered]:
        if not self._told:
            self._rest = self._rest.lstrip()
        thought, mark, rest = self._rest.partition(CLOSE)
        if mark:
            self.inside, self._over, self._told, self._rest = False, True, False, rest
            thought = thought.rstrip()
        else:
            # The end may be the beginning of the mark, or spaces before it.
            held = next((size for size in range(len(CLOSE) - 1, 0, -1) if thought.endswith(CLOSE[:size])), 0)
            kept = thought[: len(thought) - held].rstrip()
            self._rest, thought = thought[len(kept) :], kept
            self._told = self._told or bool(kept)
        return [Thought(thought)] if thought else []


def parted(text: str, *, inside: bool = False) -> tuple[str, str]:
    """A whole text's thoughts and its answer."""
    reader = ReasoningReader(inside=inside)
    pieces = [*reader.push(text), *reader.flush()]
    thought = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
    return thought, "".join(piece.text for piece in pieces if isinstance(piece, Answered))
