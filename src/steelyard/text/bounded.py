"""Small text files of a checkpoint folder, bounded in size before they are parsed.

Knows file names, UTF-8 and JSON; nothing of tokens or templates.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from steelyard.errors import CheckpointError


def read_bytes(path: Path, limit: int) -> bytes:
    """The file's bytes, at most `limit`.

    Raises:
        CheckpointError: missing, unreadable or larger.
    """
    if not path.is_file():
        raise CheckpointError(f"'{path.parent}' has no {path.name}: the checkpoint is incomplete; pull it again")
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}; check its permissions") from None
    if len(content) > limit:
        size = f"{limit >> 20} MB" if limit >= 1 << 20 else f"{limit >> 10} KB"
        raise CheckpointError(f"'{path}' is over {size}: this is no {path.name}; pull the checkpoint again")
    return content


def read_object(path: Path, limit: int = 4 << 20) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: missing, larger than `limit` bytes, not JSON, or not an object.
    """
    try:
        value = json.loads(read_bytes(path, limit))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is not JSON: {error}; pull the checkpoint again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"'{path}' holds no JSON object; pull the checkpoint again")
    return value


def read_optional_object(path: Path, limit: int = 4 << 20) -> dict[str, Any]:
    """As `read_object`, but a file that is not there reads as an empty object."""
    return read_object(path, limit) if path.is_file() else {}


def token_content(value: object) -> str | None:
    """A special token as tokenizer_config.json spells it: a string, or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
