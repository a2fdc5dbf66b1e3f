"""Conversations -> token rows: rendered by the chat template, tokenised, loss only where the assistant speaks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from steelyard.data.rows import Conversation, TokenRow
from steelyard.errors import CheckpointError, ConfigError, DataError, TemplateError
from steelyard.text.chat_template import ChatTemplate
from steelyard.text.prompt import Messages, prompt_tokens, segment_tokens
from steelyard.text.tokenizer import Tokenizer

TOO_LONG = ("error", "truncate", "drop")
ADVICE = ", or for training raise data.max_length or set data.too_long"
"""For whoever writes a run.toml."""
TOGETHER = 1024
"""Conversations that are rendered and tokenised at once,"""
CHARACTERS = 1 << 20
"""unless they are long."""
T = TypeVar("T")


def tokenize(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    max_length: int,
    too_long: str = "error",
) -> list[TokenRow]:
    """Token rows of at most `max_length` tokens.

    Segments that the assistant speaks are tokenised apart from what precedes them, exactly as a prompt is before
    the model answers it. Plain text is cut into rows of `max_length`, every token trained but the text's first; where
    the tokenizer begins texts with some token, so does every row, and the text's first is trained, too.

    Args:
        conversations: chat or plain text, not both.
        tokenizer: of the model that will learn.
        template: its chat template; needed for chat.
        max_length: most tokens of a row.
        too_long: what a longer conversation is: an `error`, cut at the end (`truncate`), or left out (`drop`).

    Raises:
        DataError: a conversation that is too long, by file and line.
        TemplateError: the template fails on a conversation, by file and line.
        ConfigError: `too_long` is none of these.
        CheckpointError: chat, and the model has no chat template.
    """
    if too_long not in TOO_LONG:
        raise ConfigError(f"data.too_long '{too_long}' is not known; known: {', '.join(TOO_LONG)}")
    texts = [conversation for conversation in conversations if conversation.messages[0].role == "text"]
    rows = [row for document in texts for row in _cut(document, tokenizer, max_length)]
    chats = [conversation for conversation in conversations if conversation.messages[0].role != "text"]
    return rows + [row for row in of_chats(chats, tokenizer, template, max_length, too_long) if row is not None]


def of_chats(
    chats: Sequence[Conversation],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    max_length: int,
    too_long: str = "error",
) -> list[TokenRow | None]:
    """The row of each chat; None: dropped, or nothing that is left of it is trained. Raises as `tokenize` does."""
    if not chats:
        return []
    if template is None:
        raise CheckpointError("this model has no chat template, which chat rows need; train an instruct model")
    rows: list[TokenRow | None] = []
    rendered = located(chats, lambda turns: segment_tokens(tokenizer, template, turns))
    for chat, segments in zip(chats, rendered, strict=True):
        answered = [message.trained for message in chat.messages if message.role == "assistant"]
        if len(answered) != sum(spoken for _, spoken in segments):
            reason = "the chat template leaves out a message of the assistant: nothing could be learnt from it"
            raise DataError(reason, file=chat.file, line=chat.line)
        answers = iter(answered)
        tokens: list[int] = []
        trained: list[bool] = []
        for ids, spoken in segments:
            counts = spoken and next(answers)
            tokens += ids
            trained += [counts] * len(ids)
        if len(tokens) > max_length and too_long == "error":
            reason = f"{len(tokens)} tokens, at most {max_length} fit: shorten it{ADVICE}"
            raise DataError(reason, file=chat.file, line=chat.line)
        if len(tokens) > max_length and too_long == "drop":
            rows.append(None)
            continue
        row = TokenRow(tokens=tokens[:max_length], trained=[False, *trained[1:max_length]])
        rows.append(row if row.targets else None)
    return rows


def tokenized(
    conversations: Iterable[Conversation],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    max_length: int,
    too_long: str = "error",
) -> Iterator[TokenRow]:
    """The same of any number of conversations, some of which are held at a time. Raises as `tokenize` does."""
    waiting: list[Conversation] = []
    size = 0
    for conversation in conversations:
        waiting.append(conversation)
        size += sum(len(message.content) for message in conversation.messages)
        if len(waiting) >= TOGETHER or size >= CHARACTERS:
            yield from tokenize(waiting, tokenizer, template, max_length, too_long)
            waiting, size = [], 0
    yield from tokenize(waiting, tokenizer, template, max_length, too_long)


def prompts(conversations: Sequence[Conversation], tokenizer: Tokenizer, template: ChatTemplate) -> list[list[int]]:
    """Token ids of conversations up to where the assistant begins to answer.

    Raises:
        TemplateError: the template fails on a conversation, by file and line.
    """
    return located(conversations, lambda turns: prompt_tokens(tokenizer, template, turns))


def located(conversations: Sequence[Conversation], render: Callable[[list[Messages]], list[T]]) -> list[T]:
    """`render` of the conversations' messages; where the template fails, the error says at which file and line."""
    turns = [[{"role": turn.role, "content": turn.content} for turn in chat.messages] for chat in conversations]
    try:
        return render(turns)
    except TemplateError:
        for chat, messages in zip(conversations, turns, strict=True):
            try:
                render([messages])
            except TemplateError as error:
                reason = str(error).removeprefix("conversation 0: ")
                raise TemplateError(str(DataError(reason, file=chat.file, line=chat.line))) from None
        raise


def _cut(document: Conversation, tokenizer: Tokenizer, max_length: int) -> list[TokenRow]:
    tokens, begin = tokenizer.encode_plain(document.messages[0].content), tokenizer.beginning[: max_length - 2]
    room = max_length - len(begin)
    rows = []
    # Each row but the first begins with the last token of the one before, so that every token is predicted once.
    for start in range(0, max(len(tokens) - 1, 1), room - 1):
        piece = tokens[start : start + room]
        counts = [start == 0 and bool(begin)] + [True] * (len(piece) - 1)
        row = TokenRow(tokens=begin + piece, trained=[False] * len(begin) + counts[: len(piece)])
        if row.targets:
            rows.append(row)
    return rows
