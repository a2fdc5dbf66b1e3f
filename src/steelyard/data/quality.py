"""What texts are like: how long, how repetitive, of what signs, in which language. Says nothing of their sense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from steelyard.errors import ConfigError

LOOKED_AT = 2000
"""Characters by which a language is told."""
SHORT = 20
"""Characters under which it is not."""


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """Of one text."""

    characters: int
    words: int
    signs: float
    """Share of characters that are neither letters, digits nor spaces."""
    capitals: float
    """Share of letters that are capitals."""
    repeated: float
    """Share of lines that stood there before."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What is odd, by rules as those for web texts (Rae et al. 2021, table A1)."""
        odd = (
            ("mostly signs", self.signs > 0.3 and self.characters > SHORT),
            ("all capitals", self.capitals > 0.7 and self.characters > SHORT),
            ("repeats its lines", self.repeated > 0.3),
            ("no words", self.words == 0),
        )
        return tuple(name for name, is_so in odd if is_so)


def of(text: str) -> Quality:
    """A text's figures."""
    letters = [letter for letter in text if letter.isalpha()]
    signs = sum(not (letter.isalnum() or letter.isspace()) for letter in text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return Quality(
        characters=len(text),
        words=len(text.split()),
        signs=signs / max(1, len(text)),
        capitals=sum(map(str.isupper, letters)) / max(1, len(letters)),
        repeated=1 - len(set(lines)) / len(lines) if lines else 0.0,
    )


def languages(texts: Sequence[str]) -> Counter[str]:
    """How many texts are in which language, by its two letters; `?`: too short to tell.

    Raises:
        ConfigError: the library is not installed.
    """
    try:
        import py3langid
    except ImportError:
        raise ConfigError("to tell languages a library is needed: pip install 'steelyard[data]'") from None
    return Counter(py3langid.classify(text[:LOOKED_AT])[0] if len(text.strip()) >= SHORT else "?" for text in texts)
