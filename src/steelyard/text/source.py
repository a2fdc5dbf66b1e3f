"""What a model reads, with what each token stands for: the text, its tokens, their characters, and whose they are."""

from __future__ import annotations

import re
from dataclasses import dataclass

from steelyard.text.tokenizer import GUARD, Span, Tokenizer


@dataclass(frozen=True)
class Source:
    """What is read."""

    text: str
    ids: list[int]
    spans: list[Span]
    """Of each token, characters of the text."""
    places: list[int] | None = None
    """Tokens of what somebody said, not of a template; None: nobody knows, or all."""


def source_of(tokenizer: Tokenizer, text: str, *, control: bool = False) -> Source:
    """A text by itself, with `control` with the control tokens that are spelled out in it.

    Raises:
        RequestError: it has a lone surrogate.
    """
    ids, spans = tokenizer.spans(text, add_special_tokens=True, control=control)
    return Source(text, ids or [0], spans or [(0, 0)])


BEGIN, END = "\ufdd1", "\ufdd2"
"""Noncharacters around what a message says, while it is rendered to find out where that is."""


def marked(content: str) -> str:
    """A message's content with marks inside its outer spaces, which templates may trim; an empty one as it is."""
    inner = content.strip()
    if not inner:
        return content
    begin = content.index(inner)
    return f"{content[:begin]}{BEGIN}{inner}{END}{content[begin + len(inner) :]}"


def source_of_chat(tokenizer: Tokenizer, rendered: str, with_marks: str) -> Source:
    """A conversation as its template writes it, guarded: plain, and with the messages' contents `marked`.

    Where a template writes something else because of the marks, nobody knows what is whose.
    """
    text, ids, spans = tokenizer.rendered_spans(rendered)
    clean = with_marks.replace(GUARD, "")
    if clean.replace(BEGIN, "").replace(END, "") != text:
        return Source(text, ids, spans)
    said: list[Span] = []
    at = begin = 0
    for piece in re.split(f"([{BEGIN}{END}])", clean):
        if piece == BEGIN:
            begin = at
        elif piece == END:
            said.append((begin, at))
        else:
            at += len(piece)
    places = [
        place
        for place, (first, last) in enumerate(spans)
        if ids[place] not in tokenizer.special_tokens and any(first < end and last > start for start, end in said)
    ]
    return Source(text, ids, spans, places)
