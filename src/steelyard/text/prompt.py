"""From messages to token ids, the one way for training, evaluation and the command line.

Control tokens that somebody spelled out in a message stay plain text; the template's own are control tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from steelyard.errors import TemplateError
from steelyard.text.chat_template import ChatTemplate
from steelyard.text.source import BEGIN
from steelyard.text.tokenizer import Tokenizer

Messages = list[dict[str, str]]


def prompt_tokens(tokenizer: Tokenizer, template: ChatTemplate, conversations: Sequence[Messages]) -> list[list[int]]:
    """Token ids of conversations up to where the assistant begins to answer.

    Raises:
        TemplateError: the template failed or passed its limits.
    """
    rendered = template.render_many([(tokenizer.guard_messages(messages), True) for messages in conversations])
    return [tokenizer.encode_rendered(text) for text in rendered]


class Answers(NamedTuple):
    """What could be said next."""

    whole: list[list[int]]
    """Of each answer the tokens after the prompt, as the template writes them, to the end of the turn."""
    bare: list[list[int]]
    """The same without what the template writes before, such as thoughts that are none."""
    apart: bool
    """Whether it writes more before than spaces."""


def answer_tokens(tokenizer: Tokenizer, template: ChatTemplate, messages: Messages, answers: Sequence[str]) -> Answers:
    """Token ids of some answers to a conversation.

    Raises:
        TemplateError: the template failed, or writes a prompt otherwise once it is answered.
    """
    guarded = tokenizer.guard_messages(messages)
    marks = [[*guarded, {"role": "assistant", "content": content}] for content in (BEGIN, f" {BEGIN} ")]
    prompt, answered, spaced = template.render_many([(guarded, True), *((mark, False) for mark in marks)])
    lead, found, end = answered.removeprefix(prompt).partition(BEGIN)
    if not answered.startswith(prompt) or not found:
        raise TemplateError("the chat template writes a prompt otherwise once it is answered")

    def tokens(text: str) -> list[int]:
        ids = tokenizer.encode_rendered(text)
        last = next((place for place, id in enumerate(ids) if id in tokenizer.eos_ids), len(ids))
        return ids[: last + 1]

    trims = spaced == answered
    said = [tokenizer.guard(answer.strip() if trims else answer) for answer in answers]
    whole = [tokens(lead + one + end) for one in said]
    return Answers(whole, [tokens(one + end) for one in said], bool(lead.strip()))


def segment_tokens(
    tokenizer: Tokenizer, template: ChatTemplate, conversations: Sequence[Messages]
) -> list[list[tuple[list[int], bool]]]:
    """Token ids of whole conversations in segments, with whether the assistant speaks them.

    Each segment is tokenised apart, as a prompt is before the model answers it.

    Raises:
        TemplateError: the template failed, or writes earlier messages differently when later ones follow.
    """
    rendered = template.render_segments([tokenizer.guard_messages(messages) for messages in conversations])
    return [[(tokenizer.encode_rendered(part.text), part.trained) for part in parts] for parts in rendered]
