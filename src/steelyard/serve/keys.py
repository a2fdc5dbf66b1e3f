"""API keys as texts: their form, their checksum, what is kept of one. It knows neither projects nor databases."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import string
import zlib

PREFIX = "sk-sy-"
BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
SECRET_LENGTH, CHECKSUM_LENGTH = 30, 6


def checksum(secret: str) -> str:
    """CRC-32 of a key's secret part in base62, six characters."""
    value, digits = zlib.crc32(secret.encode()), ""
    for _ in range(CHECKSUM_LENGTH):
        value, digit = divmod(value, len(BASE62))
        digits = BASE62[digit] + digits
    return digits


def new_key() -> str:
    """A fresh key: `sk-sy-`, 30 random base62 characters (178 bits), 6 of checksum."""
    secret = "".join(secrets.choice(BASE62) for _ in range(SECRET_LENGTH))
    return PREFIX + secret + checksum(secret)


def is_well_formed(key: str) -> bool:
    """Whether a key has the form of ours and its checksum is right. Says nothing of who may use it."""
    secret, check = key[len(PREFIX) : -CHECKSUM_LENGTH], key[-CHECKSUM_LENGTH:]
    of_form = key.startswith(PREFIX) and len(secret) == SECRET_LENGTH and set(secret) <= set(BASE62)
    return of_form and check == checksum(secret)


def mac(pepper: bytes, key: str) -> bytes:
    """HMAC-SHA256 of a key under the server's pepper: all that is kept of it."""
    return hmac.digest(pepper, key.encode(), hashlib.sha256)


def redacted(key: str) -> str:
    """What may be shown of a key: enough to tell it from others."""
    return f"{key[: len(PREFIX) + 3]}...{key[-4:]}"
