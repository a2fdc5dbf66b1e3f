"""What a worker process does to work on what is not trusted: frames by its standard streams, and limits of itself.

Frames are a 4-byte big-endian length and JSON. In: first what it is told once, with `cpu_seconds` and `memory`, then
what is to be done. Out: `{ready: true}`, then answers; one with `error` ends the answers to a frame, `ended` beside it
says that the process ends too. Its CPU time is bounded by a timer whose signal kills the process even inside C code,
its memory by an address-space limit, its files and processes by limits of zero.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LENGTH = struct.Struct(">I")


def confine(memory: int, stack: int | None = None) -> None:
    """From here on: `memory` more bytes than it has now, no further file or process, a stack of so many bytes."""
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
    if stack is not None:
        resource.setrlimit(resource.RLIMIT_STACK, (stack, stack))
    for kind, value in ((resource.RLIMIT_NOFILE, 3), (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (value, value))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    send({"ready": True})


@contextmanager
def timed(seconds: float) -> Iterator[None]:
    """Whoever takes longer is killed."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def receive() -> Any:
    """The next frame from the parent; ends the process at the end of the input."""
    return json.loads(_read(_LENGTH.unpack(_read(_LENGTH.size))[0]))


def send(reply: dict[str, Any]) -> None:
    """Write one frame; ends the process if nobody reads it."""
    text = json.dumps(reply, ensure_ascii=False).encode()
    content = memoryview(_LENGTH.pack(len(text)) + text)
    try:
        while content:
            content = content[os.write(1, content) :]
    except BrokenPipeError:
        os._exit(0)


def line(message: str) -> str:
    """One line of a library's complaint, short."""
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
