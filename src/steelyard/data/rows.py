"""What every data format becomes: conversations, and the token rows made of them. Knows no file format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

ROLES = ("system", "user", "assistant")


class Message(msgspec.Struct, frozen=True):
    """One turn."""

    role: str
    content: str
    trained: bool = True
    """Whether the loss counts this turn; only an assistant's can."""


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """A list of turns, or plain text (one turn with the role `text`), and where it came from."""

    messages: tuple[Message, ...]
    label: str | None = None
    """For labelled rows, the label; it is also the assistant's last turn."""
    text: str | None = None
    """For labelled rows, the text as it stood, without the template."""
    file: Path | None = None
    line: int | None = None

    @property
    def prompt_key(self) -> tuple[str, ...]:
        """What makes two rows the same text: all that the user says; where he says nothing, all that is said."""
        asked = tuple(message.content.strip() for message in self.messages if message.role == "user")
        return asked or tuple(message.content.strip() for message in self.messages)

    @property
    def key(self) -> tuple[tuple[str, str, bool], ...]:
        """What makes two rows exact duplicates."""
        return tuple((message.role, message.content.strip(), message.trained) for message in self.messages)


class TokenRow(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one row, and which of them the loss counts."""

    tokens: list[int]
    trained: list[bool]
    """Per token; the first is never trained, nothing precedes it."""

    @property
    def targets(self) -> int:
        """How many tokens the loss counts."""
        return sum(self.trained)

    @property
    def last_answer(self) -> tuple[list[int], list[int]]:
        """What stands before the last tokens that the loss counts, and these; there are some."""
        end = len(self.trained) - self.trained[::-1].index(True)
        begin = end
        while begin > 1 and self.trained[begin - 1]:
            begin -= 1
        return self.tokens[:begin], self.tokens[begin:end]


def token_counts(rows: Sequence[TokenRow]) -> dict[str, int]:
    """Rows, tokens, trained tokens, and the longest row."""
    return {
        "rows": len(rows),
        "tokens": sum(len(row.tokens) for row in rows),
        "trained_tokens": sum(row.targets for row in rows),
        "longest_row": max((len(row.tokens) for row in rows), default=0),
    }
