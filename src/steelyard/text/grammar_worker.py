"""The worker that checks grammars: `python -m steelyard.text.grammar_worker`, see worker_process.

A schema, a pattern, a grammar comes from whoever sends a request. The library that reads them follows them by recursion
and has limits for some of what they may cost; here the rest is bounded, too: see `confined`. Its stack is an eighth of
that of an engine's thread: what fits here fits there.

In: `{kind, text, most}`. Out: `{grammar}`, or `{error}`, a line, `{error, long}`, it has more than `most` characters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llguidance import LLMatcher, LLParserLimits

from steelyard.text.confined import confine, line, receive, send, timed

LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
"""Some 20 ms each, and tens of megabytes."""
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON on one line, as models have mostly seen it: free space is where small ones get lost."""
STACK = 1 << 20


def _json(schema: str) -> str:
    return LLMatcher.grammar_from_json_schema(schema, overrides=LAYOUT)  # type: ignore[arg-type]


KINDS: dict[str, Callable[[str], str]] = {
    "schema": _json,
    "pattern": LLMatcher.grammar_from_regex,
    "rules": LLMatcher.grammar_from_lark,
    "grammar": str,
}


def checked(kind: str, text: str, most: int) -> dict[str, Any]:
    """What the library makes of a text, or why it makes nothing of it."""
    try:
        grammar = KINDS[kind](text)
    except (ValueError, RecursionError) as error:
        return {"error": line(str(error))}
    if len(grammar) > most:
        return {"error": "it is too long", "long": True}
    if reason := LLMatcher.validate_grammar(grammar, limits=LIMITS):
        return {"error": line(reason)}
    return {"grammar": grammar}


def main() -> None:
    """Check what is asked for until the input ends."""
    hello = receive()
    checked("schema", '{"type": "object"}', 1 << 16)
    confine(hello["memory"], STACK)
    while True:
        asked = receive()
        with timed(hello["cpu_seconds"]):
            reply = checked(**asked)
        send(reply)


if __name__ == "__main__":
    main()
