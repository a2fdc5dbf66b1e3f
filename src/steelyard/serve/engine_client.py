"""The HTTP process's end of one engine process: starts it, hands it requests, passes on what it answers, restarts it.

Whatever happens to the engine, nobody waits for it in vain: every open request ends with its last output or with
an error. It knows messages and processes; it knows neither HTTP nor text.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Literal, Protocol

from steelyard.errors import EngineUnavailableError, ModelNotFoundError, RequestError, SteelyardError
from steelyard.infer import wire
from steelyard.infer.request import (
    Abort,
    Aborted,
    AdapterChanged,
    CacheKind,
    DropAdapter,
    EngineStats,
    Failure,
    Fatal,
    FromEngine,
    LoadAdapter,
    Output,
    Ready,
    Request,
    Sampling,
)
from steelyard.serve.inbox import Inbox

FIRST_DELAY, LAST_DELAY = 0.1, 5.0
"""Seconds before a restart: doubling from the first to the last."""
STEADY = 10.0
"""An engine that was ready for this many seconds restarts after the first delay again."""
GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL."""
MOST_OPEN = 4096
"""Requests of an engine that wait or run; more are told to come again."""
CANARY_SECONDS = 2.0
"""How often a ready engine is asked for one token of nobody's."""
STALL_SECONDS = 5.0
"""An engine that is asked and says nothing at all for so long is stalled."""
DRAIN_POLL_SECONDS = 0.1
LAST_WORDS = 0.5
"""Seconds to read on after the process has ended."""

SECRET_VARIABLES = (
    "STEELYARD_API_KEY",
    "STEELYARD_ADMIN_KEY",
    "STEELYARD_SECRETS",
    "STEELYARD_DATABASE",
    "OTEL_EXPORTER_OTLP_HEADERS",
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
)
"""What an engine process is not told."""

Status = Literal["starting", "ready", "restarting", "failed", "stopped"]
Command = Callable[[Path, str, Mapping[str, Path], int], list[str]]
"""(checkpoint, model, adapters, socket descriptor) -> the command line of an engine process."""

log = logging.getLogger("steelyard.engine")


def worker_command(checkpoint: Path, model: str, adapters: Mapping[str, Path], descriptor: int) -> list[str]:
    """The command line of our own engine process."""
    command = [sys.executable, "-m", "steelyard.explain.worker", str(checkpoint), "--model", model]
    command += ["--socket", str(descriptor)]
    for name, path in adapters.items():
        command += ["--adapter", f"{name}={path}"]
    return command


class Meter(Protocol):
    """Counts what requests come to. It hears of each until that is over, whoever waits for it."""

    def begin(self) -> None:
        """The engine has been asked."""

    def count(self, output: Output) -> bool:
        """What a choice has come to; returns whether its request is over."""

    def abort(self, aborted: Aborted) -> None:
        """A request was given up, having come to this."""

    def lose(self, request_id: str) -> None:
        """A request failed, or the engine is gone."""


class EngineClient:
    """One engine process and the requests that it works on. Lives on one event loop.

    Args:
        model: the base model's name.
        checkpoint: its folder.
        adapters: LoRA adapter folders by name, loaded beside it; one that does not load is fatal.
        draft: folder of a smaller model that guesses tokens for it.
        kv_cache: how keys and values are kept.
        command: makes the command line; another one in tests.
    """

    def __init__(
        self,
        model: str,
        checkpoint: Path,
        adapters: Mapping[str, Path] | None = None,
        *,
        draft: Path | None = None,
        kv_cache: CacheKind = "bfloat16",
        command: Command = worker_command,
    ) -> None:
        self.draft, self.kv_cache = draft, kv_cache
        self.stats = EngineStats()
        """What the engine process has last said of its work; zeros until it has."""
        self.model, self.checkpoint, self.adapters = model, checkpoint, dict(adapters or {})
        self.status: Status = "starting"
        self.ready: Ready | None = None
        """What the engine serves; None while it is not ready."""
        self.stalled = False
        """Whether it is ready and says nothing."""
        self._heard = 0.0
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._inboxes: dict[str, Inbox] = {}
        self._meters: dict[str, Meter] = {}
        self._changes: dict[str, tuple[LoadAdapter | DropAdapter, asyncio.Future[AdapterChanged]]] = {}
        self._restoring: asyncio.Task[None] | None = None
        self._was_ready = False
        self._fatal: str | None = None
        self._settled = asyncio.Event()  # set while the status is ready or failed
        self._supervisor: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """The running engine process; None while there is none."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the engine process and keep it running. Returns at once; see `wait_ready`."""
        assert self._supervisor is None, "an engine client is started once"
        self._supervisor = asyncio.create_task(self._supervise(), name=f"engine {self.model}")
        self._watcher = asyncio.create_task(self._watch(), name=f"canary {self.model}")

    async def wait_ready(self) -> Ready:
        """Wait until the engine is ready.

        Raises:
            EngineUnavailableError: it cannot start, for the reason that it gave.
        """
        while self.ready is None:
            await self._settled.wait()
            if self.ready is None:
                raise EngineUnavailableError(
                    f"the engine of '{self.model}' cannot start: {self._fatal or 'it is stopped'}"
                )
        return self.ready

    async def stop(self) -> None:
        """End the engine process: SIGTERM, then SIGKILL after `GRACE`. Open requests get an error."""
        self._stopping = True  # a cancellation can be lost in asyncio.wait_for, where the engine has just died
        for task in (self._watcher, self._supervisor):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if self._process is not None:  # the supervisor was cancelled while it ended a process
            await _end(self._process)
            self._process = None
        self._settle("stopped")

    async def drained(self, seconds: float) -> None:
        """Wait until nobody waits for it, but no longer than this."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._inboxes:
                    await asyncio.sleep(DRAIN_POLL_SECONDS)

    async def submit(self, *requests: Request, meter: Meter | None = None) -> AsyncGenerator[list[Output], None]:
        """The outputs of requests, as they come, those that came at once together, until every choice has finished.

        Args:
            requests: what is asked.
            meter: counts them, from when they are sent until each is over.

        Use it under `contextlib.aclosing`: what has not finished when the generator closes is aborted.

        Raises:
            RequestError: the engine refuses a request; `param` is named.
            EngineUnavailableError: the engine is not ready or full, could not finish a request, or died meanwhile.
        """
        if self.ready is None:
            raise self._unavailable()
        if len(self._inboxes) + len(requests) > MOST_OPEN:
            raise self._unavailable(f"is full: {MOST_OPEN} requests wait or run")
        open_choices = Counter({request.id: request.n for request in requests})
        assert len(open_choices) == len(requests), "request ids are unique"
        assert self._inboxes.keys().isdisjoint(open_choices), "request ids are unique"
        frames = [wire.frame(request) for request in requests]
        inbox = Inbox()
        self._inboxes |= dict.fromkeys(open_choices, inbox)
        if meter is not None:
            meter.begin()
            self._meters |= dict.fromkeys(open_choices, meter)
        try:
            self._write(*frames)
            while open_choices:
                item, outputs = await inbox.get(), list[Output]()
                while isinstance(item, Output):
                    outputs.append(item)
                    if item.finish_reason is not None:
                        open_choices[item.id] -= 1
                        if not open_choices[item.id]:
                            del open_choices[item.id]
                            self._inboxes.pop(item.id, None)
                    if not open_choices or inbox.empty():  # what follows a whole answer is nothing to its reader
                        break
                    item = inbox.get_nowait()
                if outputs:
                    yield outputs
                if item is None:  # aborted from outside
                    return
                if isinstance(item, SteelyardError):
                    raise item
        finally:
            for request_id in open_choices:
                self.abort(request_id)

    def abort(self, request_id: str) -> None:
        """Stop a request; its iterator ends. One that has ended already, or failed, is left alone."""
        inbox = self._inboxes.pop(request_id, None)
        if inbox is not None:
            inbox.put_nowait(None)
            self._write(wire.frame(Abort(request_id)))

    def counts(self, request_id: str) -> bool:
        """Whether a meter has still to hear what a request comes to."""
        return request_id in self._meters

    async def load_adapter(self, name: str, path: Path) -> str:
        """Let requests wear an adapter by this name from now on, after a restart of the engine too.

        Args:
            name: what requests say; requests of another adapter that had the name run to their end with that one.
            path: its folder, which the engine process reads.

        Returns:
            The adapter's digest.

        Raises:
            RequestError: the adapter cannot be read, or does not fit the base.
            EngineUnavailableError: the engine is not ready, or died meanwhile.
        """
        if self.ready is None:
            raise self._unavailable()
        changed = await self._change(LoadAdapter(secrets.token_hex(16), name, str(path)))
        assert changed.digest is not None
        return changed.digest

    async def drop_adapter(self, name: str) -> None:
        """Forget an adapter; requests that wear it run to their end.

        Raises:
            ModelNotFoundError: the engine has none of this name.
            EngineUnavailableError: the engine is not ready, or died meanwhile.
        """
        if self.ready is None:
            raise self._unavailable()
        await self._change(DropAdapter(secrets.token_hex(16), name))

    async def _change(self, message: LoadAdapter | DropAdapter) -> AdapterChanged:
        answer: asyncio.Future[AdapterChanged] = asyncio.get_running_loop().create_future()
        self._changes[message.id] = message, answer
        self._write(wire.frame(message))
        return await answer

    async def _restore(self, ready: Ready) -> None:
        """Give a restarted engine the adapters of the one before. One that fails now is tried at the next restart."""
        for name, path in list(self.adapters.items()):
            try:
                await self._change(LoadAdapter(secrets.token_hex(16), name, str(path)))
            except SteelyardError as error:
                log.error("the engine of '%s' restarted without the adapter '%s': %s", self.model, name, error)
        self._begin(ready)

    def _begin(self, ready: Ready) -> None:
        self.ready, self._was_ready, self.stalled = ready, True, False
        self._settle("ready")

    async def _supervise(self) -> None:
        delay = FIRST_DELAY
        while not self._stopping:
            try:
                steady = await self._run()
            except Exception as error:  # the supervisor outlives everything but its cancellation
                log.error("the engine of '%s' failed: %s", self.model, error)
                steady = False
            if self._fatal is not None:
                log.error("the engine of '%s' cannot start: %s", self.model, self._fatal)
                self._settle("failed")
                return
            delay = FIRST_DELAY if steady else delay
            log.warning("the engine of '%s' ended; it is restarted in %.1f s", self.model, delay)
            await asyncio.sleep(delay)
            delay = min(2 * delay, LAST_DELAY)

    async def _run(self) -> bool:
        """One life of the engine process; returns whether it was a long one."""
        ours, theirs = socket.socketpair()
        adapters = {} if self._was_ready else self.adapters  # later ones are restored, and fatal no more
        began = time.monotonic()
        try:
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command(self.checkpoint, self.model, adapters, theirs.fileno()),
                    *([] if self.draft is None else ["--draft", str(self.draft)]),
                    *([] if self.kv_cache == "bfloat16" else ["--kv-cache", self.kv_cache]),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=2,  # what an engine prints belongs to the log
                    start_new_session=True,  # Ctrl+C reaches the server, which lets requests finish first
                    env={name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES},
                )
            reader, self._writer = await asyncio.open_connection(sock=ours)
            await self._until_ended(self._process, asyncio.create_task(self._read(reader)))
        finally:
            steady = self.ready is not None and time.monotonic() - began > STEADY
            self._lose()
            if self._writer is None:
                ours.close()
            else:
                self._writer.transport.abort()
                self._writer = None
            if self._process is not None:
                await _end(self._process)
                self._process = None
        return steady

    async def _watch(self) -> None:
        """Ask for a canary token now and then: whether the engine still computes, not only whether it runs."""
        while True:
            await asyncio.sleep(CANARY_SECONDS)
            if self.ready is None:
                continue
            asked = time.monotonic()
            request = Request(
                id=f"canary-{secrets.token_hex(8)}",
                prompt=[0],
                sampling=Sampling(max_tokens=1, temperature=0),
                counted=False,
            )
            with contextlib.suppress(TimeoutError, SteelyardError):
                async with asyncio.timeout(STALL_SECONDS):
                    async for _ in self.submit(request):
                        pass
            stalled = self._heard < asked
            if stalled != self.stalled:
                log.warning("the engine of '%s' %s", self.model, "says nothing" if stalled else "answers again")
            self.stalled = stalled

    async def _until_ended(self, process: asyncio.subprocess.Process, reading: asyncio.Task[None]) -> None:
        ended = asyncio.create_task(process.wait())
        try:
            await asyncio.wait({reading, ended}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({reading}, timeout=LAST_WORDS)
        finally:
            ended.cancel()
            reading.cancel()
            results = await asyncio.gather(reading, ended, return_exceptions=True)
        if isinstance(results[0], SteelyardError):
            raise results[0]

    async def _read(self, reader: asyncio.StreamReader) -> None:
        frames = wire.FrameReader(reader)
        while messages := await frames.receive():
            self._heard = time.monotonic()
            for message in messages:
                self._take(message)

    def _take(self, message: FromEngine) -> None:
        match message:
            case Output(id=request_id):
                self._meter(message)
                self._deliver(request_id, message)
            case Aborted(id=request_id):
                meter = self._meters.pop(request_id, None)
                if meter is not None:
                    meter.abort(message)
                self._deliver(request_id, self._unavailable("gave the request up"), ends=True)
            case AdapterChanged(id=change_id) if change_id in self._changes:
                change, answer = self._changes.pop(change_id)
                if isinstance(change, LoadAdapter):
                    self.adapters[change.name] = Path(change.path)
                else:
                    self.adapters.pop(change.name, None)
                if not answer.done():
                    answer.set_result(message)
            case Failure(id=change_id) if change_id in self._changes:
                _, answer = self._changes.pop(change_id)
                if not answer.done():
                    answer.set_exception(self._explain(message))
            case Failure(id=request_id):
                meter = self._meters.pop(request_id, None)
                if meter is not None:
                    meter.lose(request_id)
                self._deliver(request_id, self._explain(message), ends=True)
            case Ready():
                if self._was_ready and self.adapters:
                    self._restoring = asyncio.create_task(self._restore(message), name=f"adapters of {self.model}")
                else:
                    self._begin(message)
            case EngineStats():
                self.stats = message
            case Fatal():
                self._fatal = message.message

    def _explain(self, failure: Failure) -> SteelyardError:
        if failure.param is None:
            return self._unavailable(f"could not finish: {failure.message}")
        kind = ModelNotFoundError if failure.code == "model_not_found" else RequestError
        return kind(failure.message, param=failure.param, code=failure.code)

    def _meter(self, output: Output) -> None:
        meter = self._meters.get(output.id)
        if meter is not None and meter.count(output):
            del self._meters[output.id]

    def _deliver(self, request_id: str, item: Output | SteelyardError, *, ends: bool = False) -> None:
        # An unknown id was aborted while this was on its way.
        inbox = self._inboxes.pop(request_id, None) if ends else self._inboxes.get(request_id)
        if inbox is not None:
            inbox.put_nowait(item)

    def _lose(self) -> None:
        """The engine is gone: everybody who waits for it learns so."""
        self.ready, self.stats = None, EngineStats()
        self.status = "restarting"
        self._settled.clear()
        meters, self._meters = self._meters, {}
        for request_id, meter in meters.items():
            meter.lose(request_id)
        waiting, self._inboxes = self._inboxes, {}
        for inbox in set(waiting.values()):
            inbox.put_nowait(self._unavailable("stopped while it worked on this request"))
        if self._restoring is not None:
            self._restoring.cancel()
        changes, self._changes = self._changes, {}
        for _, answer in changes.values():
            if not answer.done():
                answer.set_exception(self._unavailable("stopped while it loaded an adapter"))

    def _settle(self, status: Status) -> None:
        self.status = status
        self._settled.set()

    def _write(self, *frames: bytes) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(b"".join(frames))

    def _unavailable(self, what: str | None = None) -> EngineUnavailableError:
        reason = what or {"failed": "cannot start; the server's log says why"}.get(self.status, f"is {self.status}")
        return EngineUnavailableError(f"the engine of '{self.model}' {reason}: try again shortly")


async def _end(process: asyncio.subprocess.Process) -> None:
    """No process is left behind."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), GRACE)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
