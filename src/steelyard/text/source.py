"""What a model reads, with what each token stands for: the text, its tokens, their characters, and whose they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steelyard.text.tokenizer import Span, Tokenizer


@dataclass(frozen=True)
class Source:
    """What is read."""

    text: str
    ids: list[int]
    spans: list[Span]
    """Of each token, characters of the text."""
    places: list[int] | None = None
    """Tokens of what somebody said, not of a template; None: nobody knows, or all."""


def source_of(tokenizer: Tokenizer, text: str) -> Source:
    """A text by itself. Raises RequestError: it has a lone surrogate."""
    ids, spans = tokenizer.spans(text, add_special_tokens=True)
    return Source(text, ids or [0], spans or [(0, 0)])


def source_of_chat(tokenizer: Tokenizer, rendered: str, contents: Sequence[str]) -> Source:
    """A conversation as its template writes it, guarded, and what its messages say, in their order."""
    text, ids, spans = tokenizer.rendered_spans(rendered)
    said: list[Span] = []
    at = 0
    for content in (content.strip() for content in contents):
        found = text.find(content, at) if content else -1
        if found >= 0:
            at = found + len(content)
            said.append((found, at))
    places = [
        place
        for place, (begin, end) in enumerate(spans)
        if ids[place] not in tokenizer.special_tokens and any(begin < last and end > first for first, last in said)
    ]
    return Source(text, ids, spans, places or None)
