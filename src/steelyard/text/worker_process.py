"""A process that works on what is not trusted: started when first needed, killed when it is late, started again.

Knows frames, pipes, deadlines and the death of processes; nothing of what is worked on. `confined` is the other end.
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
from threading import Lock
from typing import Any, NamedTuple

MAX_REPLY = 8 << 20  # bytes of one frame from the worker
START_SECONDS = 20.0
WALL_SECONDS = 2.0
_LENGTH = struct.Struct(">I")
_PACKAGES = str(Path(__file__).parents[2])

Reply = dict[str, Any]


class Failure(NamedTuple):
    """What a worker did."""

    reason: str
    """To be read after the name of what it works on."""
    theirs: bool
    """Whether what it works on did it; else this machine, and the next time may be better."""


class WorkerProcess:
    """Asks a worker. After every failure the next one who asks has a new one. For any thread, and after a fork.

    Args:
        module: what runs in it.
        hello: what it is told first.
        cpu_seconds: of processor time for an answer.
        memory: bytes that it may have beside what it has when it is ready.
    """

    def __init__(self, module: str, hello: Reply, *, cpu_seconds: float, memory: int) -> None:
        self._module, self._cpu_seconds = module, cpu_seconds
        self._hello = {**hello, "cpu_seconds": cpu_seconds, "memory": memory}
        self._worker: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[Any, Any] | None = None
        self._ready = False
        """Whether the worker has said so."""
        self._lock = Lock()
        _PROCESSES.add(self)

    def exchange(self, content: bytes, count: int = 1) -> tuple[list[Reply], Failure | None]:
        """Send a frame.

        Returns:
            Its answers, `count` or as many as come before one with `error`; and what the worker did, if it failed.
        """
        replies: list[Reply] = []
        with self._lock:
            try:
                self.start()
                self._write(content, WALL_SECONDS)
                while len(replies) < count:
                    replies.append(self._read(WALL_SECONDS))
                    if replies[-1].get("ended"):
                        self._stop()
                    if "error" in replies[-1]:
                        break
            except _Failed as error:
                return replies, error.failure
            except BaseException:  # what follows in the pipes would be taken for the next answer
                self._stop()
                raise
        return replies, None

    def start(self) -> subprocess.Popen[bytes]:
        """The running worker; for who holds the lock."""
        if self._worker is not None and self._worker.poll() is None:
            return self._worker
        self._stop()
        self._worker = subprocess.Popen(
            [sys.executable, "-P", "-m", self._module],
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
        self._ready = False
        self._write(frame(self._hello), START_SECONDS)
        if self._read(START_SECONDS).get("ready") is not True:
            self._stop()
            raise _Failed("has a worker that does not start: is Steelyard installed whole?", theirs=False)
        self._ready = True
        return self._worker

    def stop(self) -> None:
        """End the worker, if there is one. The next one who asks has a new one."""
        with self._lock:
            self._stop()

    def after_fork(self) -> None:
        """In a forked child: let go of the parent's worker, and of a lock that may be held."""
        self._lock = Lock()
        self._stop()

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._worker = self._end = None

    def _stdin(self) -> int:
        assert self._worker is not None
        assert self._worker.stdin is not None
        return self._worker.stdin.fileno()

    def _write(self, content: bytes, seconds: float) -> None:
        deadline, rest, descriptor = time.monotonic() + seconds, memoryview(content), self._stdin()
        while rest:
            self._await(descriptor, select.POLLOUT, deadline)
            try:
                rest = rest[os.write(descriptor, rest) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise self._died() from None

    def _read(self, seconds: float) -> Reply:
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
        self._stop()
        raise _Failed("broke its worker's answer: do not use it")

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
            self._stop()
            raise _Failed("did not answer in time", theirs=False)

    def _died(self) -> _Failed:
        """Why the worker's end of the pipe is closed."""
        assert self._worker is not None
        try:
            status = self._worker.wait(WALL_SECONDS)
        except subprocess.TimeoutExpired:
            status = 0
        self._stop()
        if status == -signal.SIGPROF:
            return _Failed(f"took over {self._cpu_seconds * 1000:.0f} ms")
        if not self._ready:
            return _Failed(f"has a worker that does not start (status {status})", theirs=False)
        if status == -signal.SIGKILL:
            return _Failed("has a worker that somebody killed", theirs=False)
        return _Failed(f"ended its worker (status {status}): memory or stack ran out")


class _Failed(Exception):
    def __init__(self, reason: str, *, theirs: bool = True) -> None:
        self.failure = Failure(reason, theirs)


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


# After a fork the child has a copy of the lock, maybe held, and of the pipes to its parent's worker.
_PROCESSES: weakref.WeakSet[WorkerProcess] = weakref.WeakSet()


def _after_fork() -> None:
    for process in _PROCESSES:
        process.after_fork()


os.register_at_fork(after_in_child=_after_fork)
