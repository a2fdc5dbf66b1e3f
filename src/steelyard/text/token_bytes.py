"""How a tokenizer's vocabulary spells bytes: the GPT-2 alphabet, sentencepiece byte fallback, or neither.

Knows the `decoder` section of a tokenizer.json; nothing of files, encoding or streams.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

Kind = Literal["byte_level", "byte_fallback", "other"]


def _byte_alphabet() -> dict[str, int]:
    # GPT-2 (Radford et al. 2019, `bytes_to_unicode`): printable Latin-1 is itself, the rest starts at U+0100.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}


class Spelling(msgspec.Struct, frozen=True):
    """What turns one token of the vocabulary into bytes."""

    kind: Kind
    strip: int = 0
    """Leading spaces that decoding takes off a whole text."""

    @classmethod
    def of(cls, decoder: object) -> Spelling:
        """Recognise the `decoder` section of a tokenizer.json; what is not understood in full is `other`."""
        if not isinstance(decoder, dict):
            return cls("other")
        steps: list[Any] = decoder.get("decoders") or [] if decoder.get("type") == "Sequence" else [decoder]
        if not all(isinstance(step, dict) for step in steps):
            return cls("other")
        kinds = [step.get("type") for step in steps]
        if "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse"}:
            return cls("byte_level")
        if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0] == _METASPACE:
            if len(kinds) == 3:
                return cls("byte_fallback")
            if kinds[3:] == ["Strip"] and steps[3].get("content") == " " and steps[3].get("stop") == 0:
                return cls("byte_fallback", int(steps[3].get("start", 0)))
        return cls("other")

    def to_bytes(self, token: str) -> bytes:
        """The bytes that a token of the vocabulary adds to a text."""
        if self.kind == "byte_level":
            try:
                return bytes([BYTE_ALPHABET[character] for character in token])
            except KeyError:  # an added token, spelled as itself
                return token.encode()
        if self.kind == "byte_fallback" and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace("▁", " ").encode()
