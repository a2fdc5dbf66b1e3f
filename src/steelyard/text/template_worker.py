"""The worker that renders one chat template: `python -m steelyard.text.template_worker`, fed by template_process.

A template comes with a model and is not trusted. Here it can read the messages and nothing else, and whatever it
does is bounded: its CPU time by a timer whose signal kills this process even inside C code, its memory by an
address-space limit, its output by a count, its files and processes by limits of zero. Imports nothing of steelyard.

Frames are a 4-byte big-endian length and JSON. In: first `{source, variables, cpu_seconds, memory, output}`, then
`[{messages, add_generation_prompt}, ...]`. Out: `{ready: true}`, then per rendering `{text}` or
`{error, ended}`; an error ends the answer to a frame, `ended` says that the process ends too.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
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

# The parts of jinja2 and of the codecs that are imported on first use: no file can be opened later.
PRELOADED = (jinja2.debug.rewrite_traceback_stack, textwrap.wrap, b"\\x41".decode("unicode-escape"))

_LENGTH = struct.Struct(">I")


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


def limit(memory: int) -> None:
    """Confine this process from here on: `memory` more bytes than it has now, no further file or process."""
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
    for kind, value in ((resource.RLIMIT_NOFILE, 3), (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (value, value))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


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
        return f"line {error.lineno}: {_line(error.message or 'syntax error')}"
    return f"raised: {_line(str(error)) or type(error).__name__}"


def _line(message: str) -> str:
    return " ".join(message[:2000].encode(errors="replace").decode().split())[:300]


def _read(size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        piece = os.read(0, min(size - len(content), 1 << 20))
        if not piece:
            # The parent has closed the pipe or is gone.
            os._exit(0)
        content += piece
    return bytes(content)


def receive() -> Any:
    """The next frame from the parent; ends the process at the end of the input."""
    return json.loads(_read(_LENGTH.unpack(_read(_LENGTH.size))[0]))


def send(reply: dict[str, Any]) -> None:
    """Write one frame."""
    text = json.dumps(reply, ensure_ascii=False).encode()
    content = memoryview(_LENGTH.pack(len(text)) + text)
    while content:
        content = content[os.write(1, content) :]


def main() -> None:
    """Render what is asked for until the input ends."""
    hello = receive()
    jinja, template = environment(), None
    render(jinja.from_string("{% for x in [1] %}{{ {'x': x} | tojson }}{% endfor %}"), {}, 10)
    time.tzset()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    limit(hello["memory"])
    send({"ready": True})
    while True:
        for conversation in receive():
            signal.setitimer(signal.ITIMER_PROF, hello["cpu_seconds"])
            try:
                # The first rendering pays for compiling the template, out of the same time.
                template = template or jinja.from_string(hello["source"])
                send({"text": render(template, hello["variables"] | conversation, hello["output"])})
                signal.setitimer(signal.ITIMER_PROF, 0)
            except Exception as error:
                signal.setitimer(signal.ITIMER_PROF, 0)
                # What these two leave behind is nothing to build on.
                ended = isinstance(error, MemoryError | RecursionError)
                send({"error": reason(error, hello["memory"]), "ended": ended})
                if ended:
                    os._exit(0)
                break


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        sys.exit(0)
