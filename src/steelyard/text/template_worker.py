"""The worker that renders one chat template: `python -m steelyard.text.template_worker`, see worker_process.

A template comes with a model and is not trusted. Here it can read the messages and nothing else, and whatever it
does is bounded: see `confined`; its output by a count.

In: first `{source, variables, output}`, then `[{messages, add_generation_prompt}, ...]`. Out, per rendering: `{text}`
or `{error, ended}`.
"""

from __future__ import annotations

import json
import os
import textwrap
import time
from datetime import datetime
from typing import Any

import jinja2.debug
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from steelyard.text.confined import confine, line, receive, send, timed

# The parts of jinja2 and of the codecs that are imported on first use: no file can be opened later.
PRELOADED = (jinja2.debug.rewrite_traceback_stack, textwrap.wrap, b"\\x41".decode("unicode-escape"))


class OutputTooLong(Exception):
    """The text passed its limit."""


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which marks what the assistant says, as a plain block."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Give the body in place of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class PlainNamespace(Namespace):
    """`namespace()` that refuses underscore names, which lead to the interpreter's own attributes."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `namespace(self=1)` is allowed
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace cannot have an attribute {name!r}")


def environment() -> ImmutableSandboxedEnvironment:
    """What a chat template finds around it: transformers' globals and filters, in the sandbox."""

    def raise_exception(message: object) -> None:
        raise TemplateError(str(message))

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    jinja = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    jinja.filters["tojson"] = tojson
    jinja.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": PlainNamespace,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),  # not the type itself
    }
    del jinja.globals["lipsum"]
    return jinja


def render(template: jinja2.Template, variables: dict[str, Any], output: int) -> str:
    """The template's text, of at most `output` characters.

    Raises:
        OutputTooLong: the text is longer.
    """
    pieces, length = [], 0
    for piece in template.generate(variables):
        length += len(piece)
        if length > output:
            raise OutputTooLong(f"wrote over {output:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def reason(error: Exception, memory: int) -> str:
    """One line for the provider: what the template did."""
    if isinstance(error, OutputTooLong):
        return str(error)
    if isinstance(error, MemoryError):
        return f"needed over {memory >> 20} MB"
    if isinstance(error, RecursionError):
        return "nests too deeply"
    if isinstance(error, TemplateSyntaxError):
        return f"line {error.lineno}: {line(error.message or 'syntax error')}"
    return f"raised: {line(str(error)) or type(error).__name__}"


def main() -> None:
    """Render what is asked for until the input ends."""
    hello = receive()
    jinja, template = environment(), None
    render(jinja.from_string("{% for x in [1] %}{{ {'x': x} | tojson }}{% endfor %}"), {}, 10)
    time.tzset()
    confine(hello["memory"])
    while True:
        for conversation in receive():
            try:
                with timed(hello["cpu_seconds"]):
                    # The first rendering pays for compiling the template, out of the same time.
                    template = template or jinja.from_string(hello["source"])
                    text = render(template, hello["variables"] | conversation, hello["output"])
                send({"text": text})
            except Exception as error:
                # What these two leave behind is nothing to build on.
                ended = isinstance(error, MemoryError | RecursionError)
                send({"error": reason(error, hello["memory"]), "ended": ended})
                if ended:
                    os._exit(0)
                break


if __name__ == "__main__":
    main()
