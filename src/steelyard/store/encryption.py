"""Envelope encryption: a data key for each object, wrapped by its project's key, wrapped by the server's root key.

An object is a header and chunks of AES-256-GCM. A chunk's nonce is its number, its associated data say whether it is
the last: chunks that are changed, cut off, moved or taken from another object are found when they are read.

    magic (8)  wrapped data key (60)  chunks: 1 MiB of text and 16 bytes of tag each, the last one shorter
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from steelyard.errors import DamagedError, StorageError

MAGIC = b"SYAES1\x00\x00"
CHUNK = 1 << 20
TAG, NONCE, KEY = 16, 12, 32
WRAPPED = NONCE + KEY + TAG


def new_key() -> bytes:
    """32 random bytes."""
    return secrets.token_bytes(KEY)


def wrap(outer: bytes, key: bytes, name: str) -> bytes:
    """A key that only `outer` opens, for what is called `name` alone; 60 bytes."""
    return seal(outer, key, name)


def unwrap(outer: bytes, wrapped: bytes, name: str) -> bytes:
    """The key within.

    Raises:
        StorageError: another outer key, another name, or it was altered.
    """
    try:
        return unseal_small(outer, wrapped, name)
    except DamagedError:
        raise StorageError(
            f"the key of '{name}' does not open: is this the secrets.json that it was made with?"
        ) from None


def seal(key: bytes, content: bytes, name: str) -> bytes:
    """Something small, encrypted under a key, for what is called `name` alone."""
    nonce = secrets.token_bytes(NONCE)
    return nonce + AESGCM(key).encrypt(nonce, content, name.encode())


def unseal_small(key: bytes, sealed: bytes, name: str) -> bytes:
    """What `seal` was given.

    Raises:
        DamagedError: another key, another name, or it was altered.
    """
    try:
        return AESGCM(key).decrypt(sealed[:NONCE], sealed[NONCE:], name.encode())
    except (InvalidTag, ValueError):
        raise DamagedError(f"what is sealed of '{name}' does not open: it was altered") from None


class Sealer:
    """Writes an object, encrypted, as its text comes.

    Args:
        file: takes the bytes.
        project_key: wraps the data key.
        name: of the object; it opens under no other.
    """

    def __init__(self, file: BinaryIO, project_key: bytes, name: str) -> None:
        key = new_key()
        self._file, self._cipher, self._number = file, AESGCM(key), 0
        self._rest = bytearray()
        file.write(MAGIC + wrap(project_key, key, name))

    def write(self, content: bytes) -> None:
        """Take in some of the text."""
        self._rest += content
        while len(self._rest) > CHUNK:  # the last chunk is known only at the end
            self._seal(bytes(self._rest[:CHUNK]), last=False)
            del self._rest[:CHUNK]

    def finish(self) -> None:
        """Write what is left; the file is the caller's to close."""
        self._seal(bytes(self._rest), last=True)

    def _seal(self, content: bytes, *, last: bool) -> None:
        self._file.write(self._cipher.encrypt(_nonce(self._number), content, _position(last)))
        self._number += 1


def unseal(file: BinaryIO, project_key: bytes, name: str) -> Iterator[bytes]:
    """An object's text, chunk by chunk, each checked before it is given out.

    Raises:
        DamagedError: it was altered or cut off, or the key is another's.
    """
    header = file.read(len(MAGIC) + WRAPPED)
    if len(header) != len(MAGIC) + WRAPPED or header[: len(MAGIC)] != MAGIC:
        raise DamagedError(f"the stored object '{name}' is damaged: it has no header")
    cipher = AESGCM(unseal_small(project_key, header[len(MAGIC) :], name))
    content, number = _read(file, CHUNK + TAG), 0
    while True:
        following = _read(file, CHUNK + TAG) if len(content) == CHUNK + TAG else b""
        try:
            yield cipher.decrypt(_nonce(number), content, _position(not following))
        except (InvalidTag, ValueError):
            raise DamagedError(f"the stored object '{name}' was altered or cut off") from None
        if not following:
            return
        content, number = following, number + 1


def _nonce(number: int) -> bytes:
    return number.to_bytes(NONCE, "big")  # a data key seals one object, so a number is used once


def _position(last: bool) -> bytes:
    return b"last" if last else b"more"


def _read(file: BinaryIO, size: int) -> bytes:
    """As much as there is, up to `size`: remote files give less at a time."""
    content = bytearray()
    while len(content) < size and (piece := file.read(size - len(content))):
        content += piece
    return bytes(content)
