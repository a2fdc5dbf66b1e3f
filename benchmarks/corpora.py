"""Plain texts that packages ship, as documents of some 2,000 characters: Austen's novels, Brown's words, chats."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator

from assets import fetch

CHARACTERS = 2000
"""Of a document, about."""
TEXT = b"\x00\x04\x00\x09"
"""How R's serialisation marks a text of UTF-8 or ASCII; its length follows."""


def austen() -> Iterator[str]:
    """Six novels, by paragraphs. R keeps them as compressed objects, one after the other; only their texts are read."""
    content = next(fetch("austen").rglob("Rdata.rdb")).read_bytes()
    at = 0
    while at < len(content):
        unpacker = zlib.decompressobj()
        novel = unpacker.decompress(content[at + 4 :], struct.unpack_from(">I", content, at)[0])
        at = len(content) - len(unpacker.unused_data)
        yield from _documents("\n".join(_texts(novel)).split("\n\n"), "\n\n")


def _texts(content: bytes) -> Iterator[str]:
    """The lines of a serialised character vector, which stand one after the other."""
    at = content.index(TEXT)
    while content.startswith(TEXT, at):
        size = struct.unpack_from(">i", content, at + 4)[0]
        yield content[at + 8 : at + 8 + size].decode("utf-8", "replace")
        at += 8 + size


def brown() -> Iterator[str]:
    """The Brown corpus without its tags."""
    for file in sorted((fetch("brown") / "package").glob("c[a-r][0-9][0-9]")):
        lines = file.read_text("latin-1").splitlines()
        sentences = (" ".join(token.rpartition("/")[0] for token in line.split()) for line in lines)
        yield from _documents((sentence for sentence in sentences if sentence), "\n")


def chats() -> Iterator[str]:
    """Dialogues of two, a line a turn."""
    dialogues = json.loads(next(fetch("chitchat").rglob("dataset.json")).read_text())
    turns = (
        "\n".join("- " + " ".join(message["text"] for message in turn) for turn in dialogue["messages"])
        for dialogue in dialogues.values()
    )
    yield from _documents(turns, "\n\n")


def _documents(parts: Iterable[str], between: str) -> Iterator[str]:
    gathered: list[str] = []
    size = 0
    for part in parts:
        gathered.append(part)
        size += len(part)
        if size >= CHARACTERS:
            yield between.join(gathered)
            gathered, size = [], 0
    if size:
        yield between.join(gathered)
