"""The worker process of one chat template: started when first needed, killed when it is late, started again.

Knows frames, pipes, deadlines and the death of processes; nothing of conversations. Not thread-safe: its owner
holds a lock.
"""

from __future__ import annotations

import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

from steelyard.errors import TemplateError

CPU_SECONDS = 0.15
MEMORY = 64 << 20
MAX_OUTPUT = 1_000_000  # characters of one rendering
MAX_REPLY = 8 << 20  # bytes of one frame from the worker: MAX_OUTPUT characters, escaped
START_SECONDS = 20.0
WALL_SECONDS = 2.0
_LENGTH = struct.Struct(">I")
_PACKAGES = str(Path(__file__).parents[2])


class TemplateProcess:
    """Renders through a worker. Every failure is a TemplateError, after which the next call has a new worker."""

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        self._hello = {
            "source": source,
            "variables": variables,
            "cpu_seconds": CPU_SECONDS,
            "memory": MEMORY,
            "output": MAX_OUTPUT,
        }
        self._worker: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[Any, Any] | None = None

    def render(self, content: bytes, count: int) -> tuple[list[str], str | None]:
        """The texts of one frame of `count` conversations, up to the first that fails, and why that one fails.

        Raises:
            TemplateError: the worker does not start.
        """
        texts: list[str] = []
        self.start()
        try:
            self._write(content)
            while len(texts) < count:
                texts.append(self._reply_text())
        except TemplateError as error:
            return texts, str(error)
        except BaseException:  # what follows in the pipes would be taken for the next answer
            self.stop()
            raise
        return texts, None

    def start(self) -> subprocess.Popen[bytes]:
        """The running worker.

        Raises:
            TemplateError: it does not start.
        """
        if self._worker is not None and self._worker.poll() is None:
            return self._worker
        self.stop()
        self._worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "steelyard.text.template_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            env={"PYTHONPATH": _PACKAGES, **{name: os.environ[name] for name in ("TZ",) if name in os.environ}},
        )
        # Also at the exit of the interpreter.
        self._end = weakref.finalize(self, _end, self._worker, os.getpid())
        os.set_blocking(self._stdin(), False)
        self._write(frame(self._hello), START_SECONDS)
        if self._read(START_SECONDS).get("ready") is not True:
            self.stop()
            raise TemplateError("the template worker does not start: is jinja2 installed for this Python?")
        return self._worker

    def stop(self) -> None:
        """Kill the worker, if there is one, and wait for its end. In a forked child: let go of the parent's worker."""
        if self._end is not None:
            self._end()
        self._worker = self._end = None

    def _stdin(self) -> int:
        assert self._worker is not None
        assert self._worker.stdin is not None
        return self._worker.stdin.fileno()

    def _write(self, content: bytes, seconds: float = WALL_SECONDS) -> None:
        deadline, rest, descriptor = time.monotonic() + seconds, memoryview(content), self._stdin()
        while rest:
            self._await(descriptor, select.POLLOUT, deadline)
            try:
                rest = rest[os.write(descriptor, rest) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise self._died() from None

    def _reply_text(self) -> str:
        reply = self._read(WALL_SECONDS)
        text = reply.get("text")
        if isinstance(text, str):
            return text
        if reply.get("ended"):
            self.stop()
        raise TemplateError(f"the chat template {reply.get('error')}")

    def _read(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        (length,) = _LENGTH.unpack(self._read_bytes(_LENGTH.size, deadline))
        if length <= MAX_REPLY:
            content = self._read_bytes(length, deadline)
            try:
                reply = json.loads(content)
            except ValueError:
                reply = None
            if isinstance(reply, dict):
                return reply
        self.stop()
        raise TemplateError("the chat template broke its worker's answer; do not use this model's template")

    def _read_bytes(self, size: int, deadline: float) -> bytes:
        assert self._worker is not None
        assert self._worker.stdout is not None
        descriptor, content = self._worker.stdout.fileno(), bytearray()
        while len(content) < size:
            self._await(descriptor, select.POLLIN, deadline)
            piece = os.read(descriptor, size - len(content))
            if not piece:
                raise self._died()
            content += piece
        return bytes(content)

    def _await(self, descriptor: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            self.stop()
            raise TemplateError("the chat template's worker did not answer in time")

    def _died(self) -> TemplateError:
        """Why the worker's end of the pipe is closed."""
        assert self._worker is not None
        try:
            status = self._worker.wait(WALL_SECONDS)
        except subprocess.TimeoutExpired:
            status = 0
        self.stop()
        if status == -signal.SIGPROF:
            return TemplateError(f"the chat template took over {CPU_SECONDS * 1000:.0f} ms")
        return TemplateError(f"the chat template ended its worker (status {status}): memory or stack ran out")


def frame(value: object) -> bytes:
    """One frame of the protocol."""
    text = json.dumps(value, ensure_ascii=False).encode()
    return _LENGTH.pack(len(text)) + text


def _end(worker: subprocess.Popen[bytes], owner: int) -> None:
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            pipe.close()
    if os.getpid() == owner:
        worker.kill()
        worker.wait()
    else:
        worker.returncode = 0  # not a child of this process: never to be waited for
