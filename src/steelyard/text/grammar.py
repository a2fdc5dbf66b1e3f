"""What an answer may be: a JSON schema, a pattern, a choice or a grammar, as one text that an engine compiles.

llguidance reads them all, in a process of its own (`grammar_worker`) that may be ended by what it reads. Knows neither
models nor HTTP; no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from steelyard.errors import EngineUnavailableError, RequestError
from steelyard.text import recursion, tool_calls
from steelyard.text.grammar_worker import LAYOUT
from steelyard.text.worker_process import WorkerProcess, frame

MOST_CHARACTERS = 1 << 16
MOST_WRITTEN_OUT = 1 << 18
"""Of a recursive schema on all its levels."""
CPU_SECONDS = 0.1
MEMORY = 256 << 20
KEPT, KEPT_CHARACTERS = 256, 1 << 14
"""Grammars that are known to be good, and how long these may be."""


def of_schema(schema: dict[str, Any], param: str, depth: int = recursion.DEPTH) -> str:
    """JSON of a schema.

    Args:
        schema: what JSON has to be.
        param: the field that it came from.
        depth: how often a definition may stand within itself.

    Raises:
        RequestError: a keyword that is not kept here, by name, a schema that is none, or that has no answer so shallow.
        EngineUnavailableError: it could not be checked now.
    """
    _short(_written(schema, param), param)
    plain = recursion.plain_names(schema, param)
    flat = _written_out(plain, param, depth)
    most = MOST_CHARACTERS if flat is plain else MOST_WRITTEN_OUT
    return _checked("schema", _written(flat, param), param, most)


def _written(schema: dict[str, Any], param: str) -> str:
    try:
        return json.dumps(schema)
    except RecursionError:
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
    return _checked("pattern", pattern, param)


def of_choice(texts: Sequence[str], param: str) -> str:
    """One of these texts. Raises as `of_schema` does."""
    either = "|".join("".join(map(_literal, text)) for text in texts)
    return _checked("pattern", f"(?:{either})", param)


def _literal(sign: str) -> str:
    """A character as a pattern has it."""
    return sign if sign.isascii() and sign.isalnum() else f"\\x{{{ord(sign):X}}}"


def of_rules(rules: str, param: str) -> str:
    """What Lark's rules say, from `start` on. Raises as `of_schema` does."""
    return _checked("rules", rules, param)


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
    return _checked("grammar", "%llguidance {}\n" + "\n".join([*lines, *rules]), param, most)


_WORKER = WorkerProcess("steelyard.text.grammar_worker", {}, cpu_seconds=CPU_SECONDS, memory=MEMORY)


def _checked(kind: str, text: str, param: str, most: int = MOST_CHARACTERS) -> str:
    _short(text, param, most)
    return _asked(kind, text, param, most) if len(text) > KEPT_CHARACTERS else _known(kind, text, param, most)


@lru_cache(KEPT)
def _known(kind: str, text: str, param: str, most: int) -> str:
    """Most ask with the same schema again and again."""
    return _asked(kind, text, param, most)


def _asked(kind: str, text: str, param: str, most: int) -> str:
    try:
        content = frame({"kind": kind, "text": text, "most": most})
    except UnicodeEncodeError:
        reason = f"'{param}' has a lone surrogate (\\ud800 to \\udfff): send well-formed Unicode"
        raise RequestError(reason, param=param) from None
    replies, failure = _WORKER.exchange(content)
    if failure is not None and not failure.theirs:
        raise EngineUnavailableError(f"what checks '{param}' {failure.reason}: try again shortly")
    if failure is not None:
        raise RequestError(f"'{param}' is too much: what checks it {failure.reason}; make it simpler", param=param)
    (reply,) = replies
    if "long" in reply:
        raise _too_long(param, most)
    if "recursion limit" in reply.get("error", ""):
        raise _too_deep(param)
    if "error" in reply:
        raise RequestError(f"'{param}' is nothing that an answer can be held to: {reply['error']}", param=param)
    grammar: str = reply["grammar"]
    return grammar


def _short(text: str, param: str, most: int = MOST_CHARACTERS) -> None:
    if len(text) > most:
        raise _too_long(param, most)


def _too_long(param: str, most: int) -> RequestError:
    return RequestError(f"'{param}' is longer than {most} characters", param=param)
