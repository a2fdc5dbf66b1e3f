"""What an answer may be: a JSON schema, a pattern, a choice or a grammar, as one text that an engine compiles.

llguidance reads them all, with limits on what each may cost. Knows neither models nor HTTP; no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher, LLParserLimits

from steelyard.errors import RequestError
from steelyard.text import recursion, tool_calls

MOST_CHARACTERS = 1 << 16
MOST_WRITTEN_OUT = 1 << 18
"""Of a recursive schema on all its levels."""
MOST_RULES = 256
"""Of a grammar that is written by hand: the library follows them by recursion."""
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


_RULE = re.compile(r"(?:^|\n)[^\n:]*:")


def of_schema(schema: dict[str, Any], param: str, depth: int = recursion.DEPTH) -> str:
    """JSON of a schema.

    Args:
        schema: what JSON has to be.
        param: the field that it came from.
        depth: how often a definition may stand within itself.

    Raises:
        RequestError: a keyword that is not kept here, by name, a schema that is none, or that has no answer so shallow.
    """
    _short(_written(schema, param), param)
    plain = recursion.plain_names(schema, param)
    flat = _written_out(plain, param, depth)
    return _checked(_of_json(flat, param), param, MOST_CHARACTERS if flat is plain else MOST_WRITTEN_OUT)


def _written(schema: dict[str, Any], param: str) -> str:
    try:
        return json.dumps(schema)
    except RecursionError:
        raise _too_deep(param) from None


def _of_json(schema: dict[str, Any], param: str) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=LAYOUT)  # type: ignore[arg-type]
    except (ValueError, RecursionError):
        raise _too_deep(param) from None


def _written_out(schema: dict[str, Any], param: str, depth: int) -> dict[str, Any]:
    try:
        return recursion.unroll(schema, param, depth)
    except RecursionError:
        raise _too_deep(param) from None


def _too_deep(param: str) -> RequestError:
    return RequestError(f"'{param}' is nested too deeply: name its parts in $defs", param=param)


def of_pattern(pattern: str, param: str) -> str:
    """What a regular expression matches as a whole. Raises as `of_schema` does."""
    return _checked(LLMatcher.grammar_from_regex(pattern), param)


def of_choice(texts: Sequence[str], param: str) -> str:
    """One of these texts. Raises as `of_schema` does."""
    either = "|".join("".join(map(_literal, text)) for text in texts)
    return _checked(LLMatcher.grammar_from_regex(f"(?:{either})"), param)


def _literal(sign: str) -> str:
    """A character as a pattern has it."""
    return sign if sign.isascii() and sign.isalnum() else f"\\x{{{ord(sign):X}}}"


def of_rules(rules: str, param: str) -> str:
    """What Lark's rules say, from `start` on. Raises as `of_schema` does."""
    if len(_RULE.findall(rules)) > MOST_RULES:
        raise RequestError(f"'{param}' has more than {MOST_RULES} rules", param=param)
    return _checked(LLMatcher.grammar_from_lark(rules), param)


def of_calls(tools: Sequence[tuple[str, dict[str, Any], str]], *, text: bool, several: bool, param: str) -> str:
    """Calls of tools as `tool_calls` reads them.

    Args:
        tools: of each its name, the schema of its arguments, and the field that this came from.
        text: there may be text before calls, or instead of any.
        several: there may be more than one.
        param: the field of all.

    Raises:
        RequestError: a schema's keyword that is not kept here, by the tool's field.
    """
    calls, rules, most = list[str](), list[str](), MOST_CHARACTERS
    _short("".join(_written(schema, own) for _, schema, own in tools), param)  # before any is compiled
    for number, (name, schema, own) in enumerate(tools):
        of_schema(schema, own)
        plain = recursion.plain_names(schema, own)
        flat = _written_out(plain, own, recursion.DEPTH)
        most = most if flat is plain else MOST_WRITTEN_OUT
        calls.append(f"call_{number}")
        arguments = json.dumps({**flat, "x-guidance": LAYOUT})
        begin, end = json.dumps(tool_calls.head(name)), json.dumps("}" + tool_calls.CLOSE)
        rules.append(f"call_{number}: {begin} %json {arguments} {end}")
    mark = json.dumps(tool_calls.OPEN)
    either = f"({' | '.join(calls)})"
    more = "+" if several else ""
    if text:
        lines = [f"start: TEXT | (head {either}){more}", f"head[lazy]: TEXT {mark}", r"TEXT: /(.|\n)*/"]
    else:
        lines = [f"start: ({mark} {either}){more}"]
    return _checked("%llguidance {}\n" + "\n".join([*lines, *rules]), param, most)


def _checked(grammar: str, param: str, most: int = MOST_CHARACTERS) -> str:
    _short(grammar, param, most)
    if reason := LLMatcher.validate_grammar(grammar, limits=LIMITS):
        told = " ".join(reason.split())[:300]
        raise RequestError(f"'{param}' is nothing that an answer can be held to: {told}", param=param)
    return grammar


def _short(grammar: str, param: str, most: int = MOST_CHARACTERS) -> None:
    if len(grammar) > most:
        raise RequestError(f"'{param}' is longer than {most} characters", param=param)
