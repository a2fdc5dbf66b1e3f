"""Which part of a rendered conversation the assistant said, found from the texts of its beginnings.

Knows messages and their rendered texts; nothing of templates, processes or tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from steelyard.errors import TemplateError


class Segment(NamedTuple):
    """A piece of a conversation's text."""

    text: str
    trained: bool
    """The assistant says it: the loss counts it."""


def prefixes(messages: list[dict[str, str]]) -> list[tuple[list[dict[str, str]], bool]]:
    """What must be rendered to cut a conversation: for each assistant message the text before it (with the
    generation prompt) and the text up to its end; and last the whole, unless it was just that.
    """
    wanted: list[tuple[list[dict[str, str]], bool]] = []
    for place, message in enumerate(messages):
        if message.get("role") == "assistant":
            wanted += [(messages[:place], True), (messages[: place + 1], False)]
    ends_spoken = bool(messages) and messages[-1].get("role") == "assistant"
    return wanted if ends_spoken else [*wanted, (messages, False)]


def cut(texts: Sequence[str], where: str = "") -> list[Segment]:
    """Segments from the texts of `prefixes`. Empty ones are left out.

    Raises:
        TemplateError: a text is not the beginning of the next one; `where` begins its message.
    """
    segments: list[Segment] = []
    done = 0
    for before, after in pairwise(texts):
        if not after.startswith(before):
            raise TemplateError(
                f"{where}the chat template is not prefix-consistent: with a later message it writes the earlier ones"
                " differently; train on conversations with one assistant message, or use another template"
            )
    for before, after in zip(texts[::2], texts[1::2], strict=False):
        spoken = after[len(before) :].rstrip()
        segments += [Segment(before[done:], False), Segment(spoken, True)]
        done = len(before) + len(spoken)
    segments.append(Segment(texts[-1][done:], False))
    return [segment for segment in segments if segment.text]
