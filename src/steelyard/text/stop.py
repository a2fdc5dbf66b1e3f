"""Stop strings in text that arrives in pieces: what can be released, and whether a stop was hit.

Knows strings only. Holds back just what may be the beginning of a stop string. Constant work per character
and stop string, however long that is (Knuth, Morris and Pratt 1977).
"""

from __future__ import annotations


class StopStrings:
    """Finds the stop string that begins earliest in the text, whatever pieces the text arrives in.

    Args:
        stops: strings that end the text and are not part of it; empty ones are ignored.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._open = [_Matcher(stop) for stop in stops if stop]
        self._held = ""
        self._end = 0  # characters seen so far
        self._found: int | None = None  # where the earliest complete stop string begins
        self.stopped = False
        """A stop string was hit, by a push or at the flush; later text is dropped."""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text. Returns what can be released, and whether a stop string was hit."""
        if self.stopped:
            return "", True
        for matcher in list(self._open):
            place = matcher.push(text)
            if place is not None:
                # Of one stop string, the first place is the earliest: it need not be followed any longer.
                self._open.remove(matcher)
                self._found = self._end + place if self._found is None else min(self._found, self._end + place)
        self._held += text
        self._end += len(text)
        # Something shorter may be complete inside a longer stop string that began before it and is still open.
        certain = min((self._end - matcher.matched for matcher in self._open), default=self._end)
        if self._found is not None and self._found <= certain:
            return self.flush(), True
        kept = self._end - certain
        released, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return released, False

    def flush(self) -> str:
        """The end of the text: what was held back, up to a stop string that is complete in it."""
        begin = self._end - len(self._held)
        self.stopped = self._found is not None
        rest = self._held if self._found is None else self._held[: self._found - begin]
        self._held = ""
        return rest


class _Matcher:
    """Follows one stop string through the text; `matched` is how much of it the text so far ends with."""

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._fallback = [0] * len(stop)  # at n: the longest border of stop[:n + 1]
        self.matched = 0
        for place in range(1, len(stop)):
            self._step(stop[place])
            self._fallback[place] = self.matched
        self.matched = 0

    def push(self, text: str) -> int | None:
        """Where the stop string begins, relative to the begin of `text` (negative: before it)."""
        for place, character in enumerate(text):
            self._step(character)
            if self.matched == len(self._stop):
                return place + 1 - len(self._stop)
        return None

    def _step(self, character: str) -> None:
        while self.matched and character != self._stop[self.matched]:
            self.matched = self._fallback[self.matched - 1]
        self.matched += character == self._stop[self.matched]
