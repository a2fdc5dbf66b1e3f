"""Conversations -> token rows: rendered by the chat template, tokenised, loss only where the assistant speaks."""

from __future__ import annotations

from collections.abc import Sequence

from steelyard.data.rows import Conversation, TokenRow
from steelyard.errors import CheckpointError, ConfigError, DataError
from steelyard.text.chat_template import ChatTemplate
from steelyard.text.prompt import segment_tokens
from steelyard.text.tokenizer import Tokenizer

TOO_LONG = ("error", "truncate", "drop")


def tokenize(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    max_length: int,
    too_long: str = "error",
) -> list[TokenRow]:
    """Token rows of at most `max_length` tokens.

    Segments that the assistant speaks are tokenised apart from what precedes them, exactly as a prompt is before
    the model answers it. Plain text is cut into rows of `max_length`, every token trained but each row's first.

    Args:
        conversations: chat or plain text, not both.
        tokenizer: of the model that will learn.
        template: its chat template; needed for chat.
        max_length: most tokens of a row.
        too_long: what a longer conversation is: an `error`, cut at the end (`truncate`), or left out (`drop`).

    Raises:
        DataError: a conversation that is too long, by file and line.
        ConfigError: `too_long` is none of these.
        CheckpointError: chat, and the model has no chat template.
    """
    if too_long not in TOO_LONG:
        raise ConfigError(f"data.too_long '{too_long}' is not known; known: {', '.join(TOO_LONG)}")
    texts = [conversation for conversation in conversations if conversation.messages[0].role == "text"]
    rows = [row for document in texts for row in _cut(document, tokenizer, max_length)]
    chats = [conversation for conversation in conversations if conversation.messages[0].role != "text"]
    if not chats:
        return rows
    if template is None:
        raise CheckpointError("this model has no chat template, which chat rows need; train an instruct model")
    turns = [[{"role": message.role, "content": message.content} for message in chat.messages] for chat in chats]
    rendered = segment_tokens(tokenizer, template, turns)
    for chat, segments in zip(chats, rendered, strict=True):
        answers = iter([message.trained for message in chat.messages if message.role == "assistant"])
        tokens: list[int] = []
        trained: list[bool] = []
        for ids, spoken in segments:
            counts = spoken and next(answers)
            tokens += ids
            trained += [counts] * len(ids)
        if len(tokens) > max_length and too_long == "error":
            reason = f"{len(tokens)} tokens, data.max_length is {max_length}: raise it, or set data.too_long"
            raise DataError(reason, file=chat.file, line=chat.line)
        if len(tokens) > max_length and too_long == "drop":
            continue
        row = TokenRow(tokens=tokens[:max_length], trained=[False, *trained[1:max_length]])
        if row.targets:
            rows.append(row)
    return rows


def _cut(document: Conversation, tokenizer: Tokenizer, max_length: int) -> list[TokenRow]:
    tokens = tokenizer.encode_plain(document.messages[0].content)
    # Each row but the first begins with the last token of the one before, so that every token is predicted once.
    starts = range(0, max(len(tokens) - 1, 1), max_length - 1)
    pieces = [tokens[start : start + max_length] for start in starts]
    return [TokenRow(tokens=piece, trained=[False] + [True] * (len(piece) - 1)) for piece in pieces if len(piece) > 1]
