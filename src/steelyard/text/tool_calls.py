"""Calls of tools in what a model writes: found as the text comes, piece by piece.

A call is `<tool_call>{"name": "f", "arguments": {...}}</tool_call>`, with exactly these spaces, which a grammar sees to
(`grammar.of_calls`). Knows neither models nor HTTP.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_HEAD = re.compile(r'\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ')
MOST_HEAD = 4096
"""Characters before the arguments; what has more is no call."""


class Said(NamedTuple):
    """Text that is no call."""

    text: str


class Begun(NamedTuple):
    """A call of a tool begins."""

    number: int
    name: str


class Arguments(NamedTuple):
    """More of a call's arguments, as JSON."""

    number: int
    text: str


Piece = Said | Begun | Arguments


def head(name: str) -> str:
    """What stands before the arguments of a call, its opening mark not included."""
    return f'{{"name": {json.dumps(name)}, "arguments": '


def written(name: str, arguments: str) -> str:
    """A call as a model writes it."""
    return f"{OPEN}{head(name)}{arguments}}}{CLOSE}"


class CallReader:
    """Parts a text into what is said and what is called."""

    def __init__(self) -> None:
        self.calls = 0
        """How many have begun,"""
        self.whole = 0
        """and how many have ended."""
        self._rest = ""
        self._state = self._text
        self._depth, self._quoted, self._escaped = 0, False, False
        self._after_call = False

    def push(self, text: str) -> list[Piece]:
        """What is certain once this has come."""
        self._rest += text
        found: list[Piece] = []
        while True:
            piece = self._state()
            if piece is None:
                return found
            if not isinstance(piece, Said | Arguments) or piece.text:
                found.append(piece)

    def flush(self) -> list[Piece]:
        """What is left at the end of the text."""
        rest, self._rest = self._rest, ""
        return [Said(rest)] if rest and self._state == self._text else []

    def _text(self) -> Piece | None:
        if self._after_call:  # space between calls is nobody's text
            self._rest = self._rest.lstrip()
            self._after_call = not self._rest
        place = self._rest.find(OPEN)
        if place >= 0:
            said, self._rest = self._rest[:place], self._rest[place + len(OPEN) :]
            self._state = self._head
            return Said(said)
        # The end of what has come may be the beginning of a mark.
        held = next((size for size in range(len(OPEN) - 1, 0, -1) if self._rest.endswith(OPEN[:size])), 0)
        said, self._rest = self._rest[: len(self._rest) - held], self._rest[len(self._rest) - held :]
        return Said(said) if said else None

    def _head(self) -> Piece | None:
        match = _HEAD.match(self._rest)
        if match is None:
            if len(self._rest) > MOST_HEAD:
                self._state = self._text
                return Said(OPEN)
            return None
        self._rest, self._state = self._rest[match.end() :], self._arguments
        self._depth, self._quoted, self._escaped = 0, False, False
        self.calls += 1
        return Begun(self.calls - 1, json.loads(match[1]))

    def _arguments(self) -> Piece | None:
        for place, sign in enumerate(self._rest):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = sign == "\\", sign != '"'
            elif sign == '"':
                self._quoted = True
            elif sign in "{[":
                self._depth += 1
            elif sign in "}]":
                self._depth -= 1
                if self._depth == 0:
                    given, self._rest = self._rest[: place + 1], self._rest[place + 1 :]
                    self._state = self._end
                    return Arguments(self.calls - 1, given)
        given, self._rest = self._rest, ""
        return Arguments(self.calls - 1, given) if given else None

    def _end(self) -> Piece | None:
        if len(self._rest) < len(CLOSE) + 1:
            return None
        self._rest = self._rest[len(CLOSE) + 1 :]
        self.whole += 1
        self._state, self._after_call = self._text, True
        return Said("")


def prompt(tools: Iterator[Mapping[str, Any]], must: bool) -> str:
    """What a model is told of its tools, in its system message."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    asked = "Answer with a call of one of them" if must else "To call one, write"
    return (
        f"You have these functions, each as JSON:\n{listed}\n{asked}: "
        f'{OPEN}{{"name": the name, "arguments": the arguments as JSON}}{CLOSE}'
    )
