"""Text from token ids that arrive one at a time: each push gives the text that can no longer change.

Knows one choice of one request; nothing of stop strings. Work per token is constant on average.
"""

from __future__ import annotations

import codecs

from steelyard.text.tokenizer import Tokenizer, strip_leading

REPLACEMENT = "\ufffd"
WINDOW = 8  # tokens held back at most while a decoder of an unknown kind ends its text with U+FFFD


class Detokenizer:
    """The pushes and the final flush together are `tokenizer.decode` of all the ids. Special tokens are skipped."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytewise = tokenizer.spelling.kind != "other"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._reset()

    def _reset(self) -> None:
        self._utf8.reset()
        self._strip = self._tokenizer.spelling.strip
        self._context: list[int] = []
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The newly certain text: empty while a character is incomplete."""
        if token_id in self._tokenizer.special_tokens:
            return ""
        if self._bytewise:
            return self._stripped(self._utf8.decode(self._tokenizer.token_bytes(token_id)))
        self._held.append(token_id)
        return self._windowed(final=False)

    def flush(self) -> str:
        """What is still held back; an incomplete character becomes U+FFFD. Ready for a new text afterwards."""
        text = self._stripped(self._utf8.decode(b"", final=True)) if self._bytewise else self._windowed(final=True)
        self._reset()
        return text

    def _stripped(self, text: str) -> str:
        if self._strip and text:
            rest = strip_leading(text, self._strip)
            self._strip = 0 if rest else self._strip - len(text)
            return rest
        return text

    def _windowed(self, *, final: bool) -> str:
        # The text of a token may depend on the one before it (its leading space), not on earlier ones.
        before = self._tokenizer.decode(self._context)
        after = self._tokenizer.decode(self._context + self._held)
        if after.endswith(REPLACEMENT) and not final and len(self._held) < WINDOW:
            return ""
        if self._held:
            self._context, self._held = self._held[-1:], []
        return after[len(before) :]
