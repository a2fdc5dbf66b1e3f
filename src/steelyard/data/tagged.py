"""Sentences of words, each word with a tag.

{"tokens": ["The", "jury", "said"], "tags": ["at", "nn", "vbd"]}     JSONL
The<TAB>at                                                            TSV: a word a line, a blank line between sentences
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from steelyard.data.chat import FormatConfig
from steelyard.data.readers import json_rows, lines
from steelyard.errors import DataError

MAX_WORDS = 4096
MAX_WORD = 1024
"""Characters."""


class TaggedSentence(msgspec.Struct, frozen=True, kw_only=True):
    """A row."""

    words: tuple[str, ...]
    tags: tuple[str, ...] | None
    file: Path
    line: int
    """Where it begins."""


def read(path: Path, config: FormatConfig, *, tagged: bool = True) -> list[TaggedSentence]:
    """All sentences of a file.

    Args:
        path: JSONL or TSV.
        config: names the fields of JSONL.
        tagged: whether each has to have tags.

    Raises:
        DataError: a row that is wrong, or no row at all; file, line and field are named.
    """
    tabular = path.suffix.lower() == ".tsv"
    rows = list(_columns(path, tagged) if tabular else _objects(path, config, tagged))
    if not rows:
        raise DataError("the file has no rows", file=path)
    return rows


def _objects(path: Path, config: FormatConfig, tagged: bool) -> Iterator[TaggedSentence]:
    for line, row in json_rows(path):
        yield sentence(row, path, line, config, tagged)


def sentence(row: dict[str, Any], path: Path, line: int, config: FormatConfig, tagged: bool) -> TaggedSentence:
    """A row of JSONL.

    Raises:
        DataError: a field that is no list of texts, or as many tags as there are no words.
    """
    words, tags = row.get(config.tokens), row.get(config.tags)
    for field, value in ((config.tokens, words), (config.tags, tags)):
        if value is None and field == config.tags and not tagged:
            continue
        whole = isinstance(value, list) and value and all(isinstance(each, str) and each.strip() for each in value)
        if not whole:
            reason = f"must be a list of texts, none of them empty; the row has: {', '.join(row) or 'nothing'}"
            raise DataError(reason, file=path, line=line, field=field)
    assert isinstance(words, list), "checked above"
    if tags is not None and len(tags) != len(words):
        raise DataError(f"{len(tags)} tags for {len(words)} words", file=path, line=line, field=config.tags)
    return _bounded(words, tags, path, line)


def _columns(path: Path, tagged: bool) -> Iterator[TaggedSentence]:
    words: list[str] = []
    tags: list[str] = []
    begun = 1
    for line, text in lines(path):
        if not text.strip():
            if words:
                yield _bounded(words, tags or None, path, begun)
            words, tags = [], []
            continue
        word, *rest = text.split("\t")
        if len(rest) != 1 and (tagged or rest):
            raise DataError("a word and its tag are needed, with one tab between them", file=path, line=line)
        if not word.strip() or (rest and not rest[0].strip()):
            raise DataError("the word or its tag is empty", file=path, line=line)
        begun = begun if words else line
        words.append(word)
        tags += rest
        if tags and len(tags) != len(words):
            raise DataError("some words of the sentence have tags and some have none", file=path, line=line)
    if words:
        yield _bounded(words, tags or None, path, begun)


def _bounded(words: list[str], tags: list[str] | None, path: Path, line: int) -> TaggedSentence:
    if len(words) > MAX_WORDS or max(map(len, words)) > MAX_WORD:
        reason = f"at most {MAX_WORDS} words of at most {MAX_WORD} characters are taken"
        raise DataError(reason, file=path, line=line)
    return TaggedSentence(words=tuple(words), tags=None if tags is None else tuple(tags), file=path, line=line)
