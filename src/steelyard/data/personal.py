"""Personal data in texts, found by its form and checked: addresses of mail and of machines, phones, cards, accounts.

Candidates are found by patterns; what decides is a check: Luhn's digit, IBAN's, a real address, a number that its
country has (Google's table). Names, streets and what only sense tells are not found: read before you trust.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from steelyard.errors import ConfigError

MAX_TEXT = 1 << 20
"""Characters that are looked through at a time."""
OVERLAP = 256
MOST_CUTS = 4
"""Groups at a candidate's end that may be something else."""
MAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])")
CARD = re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?!\d|\.\d)")
ACCOUNT = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?(?!\w)")
MACHINE = re.compile(
    r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?!\d|\.\d)|(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![\w:])"
)


class Found(NamedTuple):
    """A place in a text."""

    start: int
    end: int
    kind: str


KINDS = ("email", "phone", "card", "iban", "ip")


def find(text: str, kinds: tuple[str, ...] = KINDS, region: str | None = None) -> list[Found]:
    """Personal data in a text, in order, none over another (the earlier, then the longer one counts).

    Args:
        text: of any length.
        kinds: which are looked for.
        region: two letters, such as US: phone numbers without a country's code are from there; None: they are left.

    Raises:
        ConfigError: the libraries are not installed, or a kind or region that is not known.
    """
    finders = _finders(region)
    for kind in kinds:
        if kind not in finders:
            raise ConfigError(f"'{kind}' is no kind of personal data that is known here: {', '.join(KINDS)}")
    found: set[Found] = set()
    for offset in range(0, max(1, len(text)), MAX_TEXT - OVERLAP):
        piece = text[offset : offset + MAX_TEXT]
        found |= {Found(offset + start, offset + end, kind) for kind in kinds for start, end in finders[kind](piece)}
    kept: list[Found] = []
    for each in sorted(found, key=lambda each: (each.start, -each.end)):
        if not kept or each.start >= kept[-1].end:
            kept.append(each)
    return kept


def redact(text: str, found: list[Found]) -> str:
    """The text with `[EMAIL]`, `[PHONE]` and so on in these places."""
    parts, at = [], 0
    for start, end, kind in found:
        parts += [text[at:start], f"[{kind.upper()}]"]
        at = end
    return "".join([*parts, text[at:]])


Finder = Callable[[str], Iterator[tuple[int, int]]]


def _finders(region: str | None) -> dict[str, Finder]:
    try:
        import phonenumbers
        from stdnum import iban
    except ImportError:
        raise ConfigError("to look for personal data two libraries are needed: pip install 'steelyard[data]'") from None
    if region is not None and region.upper() not in phonenumbers.SUPPORTED_REGIONS:
        raise ConfigError(f"'{region}' is no region of phone numbers: two letters, such as US or DE")

    def by(pattern: re.Pattern[str], check: Callable[[str], bool]) -> Finder:
        def look(text: str) -> Iterator[tuple[int, int]]:
            at = 0
            while match := pattern.search(text, at):
                size = next((size for size in _beginnings(match[0]) if check(match[0][:size])), 0)
                if size:
                    yield match.start(), match.start() + size
                at = match.start() + (size or _first_group(match[0]))

        return look

    def phones(text: str) -> Iterator[tuple[int, int]]:
        wanted = None if region is None else region.upper()
        for match in phonenumbers.PhoneNumberMatcher(text, wanted):
            yield match.start, match.end

    return {
        "email": by(MAIL, lambda mail: ".." not in mail),
        "phone": phones,
        "card": by(CARD, _is_card),
        "iban": by(ACCOUNT, lambda account: bool(iban.is_valid(account))),
        "ip": by(MACHINE, _is_machine),
    }


def _beginnings(candidate: str) -> list[int]:
    """How long a candidate may be: whole, or up to one of its last spaces, the longest first."""
    cuts = [place for place, letter in enumerate(candidate) if letter in " -"]
    return [len(candidate), *reversed(cuts[-MOST_CUTS:])]


def _first_group(candidate: str) -> int:
    """Where the next candidate may begin, when this one is none."""
    return next((place for place, letter in enumerate(candidate) if letter in " -"), len(candidate) - 1) + 1


def _is_machine(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not address.is_unspecified and not address.is_loopback


def _is_card(text: str) -> bool:
    from stdnum import luhn

    digits = re.sub(r"\D", "", text)
    return bool(luhn.is_valid(digits)) and len(set(digits)) > 1
