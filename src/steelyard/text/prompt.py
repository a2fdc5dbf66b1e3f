"""From messages to token ids, the one way for training, evaluation and the command line.

Control tokens that somebody spelled out in a message stay plain text; the template's own are control tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from steelyard.text.chat_template import ChatTemplate
from steelyard.text.tokenizer import Tokenizer

Messages = list[dict[str, str]]


def prompt_tokens(tokenizer: Tokenizer, template: ChatTemplate, conversations: Sequence[Messages]) -> list[list[int]]:
    """Token ids of conversations up to where the assistant begins to answer.

    Raises:
        TemplateError: the template failed or passed its limits.
    """
    rendered = template.render_many([(tokenizer.guard_messages(messages), True) for messages in conversations])
    return [tokenizer.encode_rendered(text) for text in rendered]


def answer_tokens(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Messages, answers: Sequence[str]
) -> list[list[int]]:
    """Token ids of each of some answers to a conversation, the end of the turn included; none: the template hides it.

    Raises:
        TemplateError: the template failed, or writes earlier messages differently when later ones follow.
    """
    answered = [[*messages, {"role": "assistant", "content": answer}] for answer in answers]
    segments = segment_tokens(tokenizer, template, answered)
    return [next((tokens for tokens, spoken in reversed(parts) if spoken), []) for parts in segments]


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
