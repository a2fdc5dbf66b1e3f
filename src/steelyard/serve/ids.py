"""Names of things: a prefix that says of what, then the moment, then chance. So what was made later sorts later."""

from __future__ import annotations

import secrets
import time


def fresh(prefix: str) -> str:
    """A new name."""
    return f"{prefix}{time.time_ns() // 1_000_000:012x}{secrets.token_hex(8)}"
