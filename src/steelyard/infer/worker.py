"""The engine process: one engine, fed from a socket until the other side goes away.

    python -m steelyard.explain.worker CHECKPOINT --model NAME --socket FD [--adapter NAME=PATH ...] [--draft PATH]
        [--kv-cache KIND]

A thread reads messages into a queue; the main thread takes them between steps. Adapters are read, and grammars
compiled, by threads of their own, and taken in between steps too. It draws one canary token before it says that it is
ready. While it works it says once a second what it has done, and once more when it falls idle. What explains the model
is handed down: it works between steps, see `asides.py`.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import msgspec

from steelyard.checkpoint import manifest
from steelyard.errors import ArtifactError, CheckpointError, RequestError, SteelyardError
from steelyard.infer import fidelity
from steelyard.infer.adapters import Prepared
from steelyard.infer.asides import Asides, Explainer
from steelyard.infer.encoder_engine import ClassReader, EncoderEngine, open_reader
from steelyard.infer.engine import Engine, EngineConfig
from steelyard.infer.example_reader import ExampleReader
from steelyard.infer.grammars import State
from steelyard.infer.hearing import open_hearer
from steelyard.infer.hearing_engine import HearingEngine
from steelyard.infer.request import (
    Abort,
    Aborted,
    AdapterChanged,
    CacheKind,
    DropAdapter,
    Failure,
    Fatal,
    FromEngine,
    LoadAdapter,
    Ready,
    Request,
    Sampling,
)
from steelyard.infer.wire import EngineSocket

STATS_SECONDS = 1.0
"""How often a working engine says what it has done."""

log = logging.getLogger("steelyard.engine")


@dataclass(frozen=True)
class Arrived:
    """A request, and when it came, in seconds of the monotonic clock: it may wait here for the end of a step."""

    request: Request
    at: float


@dataclass(frozen=True)
class AdapterRead:
    """The thread has read what a `LoadAdapter` names, or failed to."""

    asked: LoadAdapter
    read: Future[Prepared]


@dataclass(frozen=True)
class Compiled:
    """The thread has compiled a request's grammar, or failed to."""

    arrived: Arrived
    state: Future[State]


Message = Arrived | Compiled | Abort | LoadAdapter | DropAdapter | AdapterRead
Inbox = queue.SimpleQueue[Message | None]


def receive(socket: EngineSocket, inbox: Inbox) -> None:
    """Put what comes into the inbox, and None when the other side is gone."""
    try:
        while (message := socket.receive()) is not None:
            inbox.put(Arrived(message, time.monotonic()) if isinstance(message, Request) else message)
    except ArtifactError as error:
        log.error("%s", error)
    inbox.put(None)


Reading = EncoderEngine | HearingEngine
AnyEngine = Engine | Reading
Explaining = Callable[[AnyEngine, Path], Explainer | None]
"""An engine and its checkpoint -> what explains it; None: nothing does."""


def serve(engine: AnyEngine, inbox: Inbox, socket: EngineSocket, explainer: Explainer | None = None) -> None:
    """Step while there is work, wait while there is none, until the other side is gone (None)."""
    told = 0.0
    compiling, asides = Compiling(engine, inbox), Asides(explainer)
    while True:
        messages: list[Message | None] = [] if engine.busy or asides.busy else [inbox.get()]
        while not inbox.empty():
            messages.append(inbox.get())
        for message in messages:
            if message is None:
                return
            answer = _take(engine, message, inbox, compiling, asides)
            if answer is not None:
                socket.send([answer])
        began = time.monotonic()
        answers: list[FromEngine] = [*engine.step()] if engine.busy else []
        if not (engine.busy or asides.busy) or time.monotonic() - told >= STATS_SECONDS:
            told = time.monotonic()
            answers.append(engine.stats())
        if answers:  # before any other work: somebody waits for them
            socket.send(answers)
        spent = time.monotonic() - began
        if explained := asides.turn(spent, others=engine.busy, asked=lambda: not inbox.empty()):
            socket.send(explained)
        if not engine.busy:
            engine.check_integrity()


class Compiling:
    """Requests whose grammars are being compiled, one after the other."""

    def __init__(self, engine: AnyEngine, inbox: Inbox) -> None:
        self._engine, self._inbox = engine, inbox
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._asked: set[str] = set()

    def begin(self, arrived: Arrived) -> None:
        """Compile a request's grammar, which then comes to the inbox."""
        grammar, field = arrived.request.grammar, arrived.request.grammar_field
        assert grammar is not None, "see the caller"
        assert self._engine.grammars is not None, "see the caller"
        self._asked.add(arrived.request.id)
        state = self._thread.submit(self._engine.grammars.begin, grammar, field)
        state.add_done_callback(lambda state: self._inbox.put(Compiled(arrived, state)))

    def end(self, request_id: str) -> bool:
        """Whether a request is still wanted, which is here no more."""
        wanted = request_id in self._asked
        self._asked.discard(request_id)
        return wanted


def _take(
    engine: AnyEngine, message: Message, inbox: Inbox, compiling: Compiling, asides: Asides
) -> Aborted | AdapterChanged | Failure | None:
    match message:
        case Abort(id=id):
            if compiling.end(id):
                return Aborted(id=id, prompt_tokens=0, cached_tokens=0, completion_tokens=[])
            return engine.abort(id) or asides.abort(id)
        case Arrived(request=request, at=arrived) if request.explain is not None:
            return _add(partial(asides.add, request, arrived), request)
        case Arrived(request=request) if request.grammar is not None and engine.grammars is not None:
            compiling.begin(message)
            return None
        case Arrived(request=request, at=arrived):
            return _add(partial(engine.add, request, arrived), request)
        case Compiled(arrived=asked, state=state):
            if not compiling.end(asked.request.id):
                return None
            return _add(lambda: engine.add(asked.request, asked.at, state.result()), asked.request)
        case _:
            return _change(engine, message, inbox)


def _change(
    engine: AnyEngine, message: LoadAdapter | DropAdapter | AdapterRead, inbox: Inbox
) -> AdapterChanged | Failure | None:
    match message:
        case LoadAdapter(path=path) if isinstance(engine, Engine):
            reading = engine.adapters.begin(Path(path))
            reading.add_done_callback(lambda read: inbox.put(AdapterRead(message, read)))
            return None
        case AdapterRead(asked=asked, read=read) if isinstance(engine, Engine):
            return _put(engine, asked, read)
        case DropAdapter() if isinstance(engine, Engine):
            return _drop(engine, message)
        case LoadAdapter(id=id) | DropAdapter(id=id) | AdapterRead(asked=LoadAdapter(id=id)):
            return Failure(id, "this model wears no adapters", "lora_name", "invalid_adapter")


def _add(add: Callable[[], None], request: Request) -> Failure | None:
    try:
        add()
    except RequestError as error:
        return Failure(request.id, str(error), error.param, error.code)
    except Exception as error:  # a request may be anything: running ones do not end for it
        log.exception("a request could not be taken in")
        return Failure(request.id, f"the request cannot be taken in: {type(error).__name__}", "model")
    return None


def _drop(engine: Engine, asked: DropAdapter) -> AdapterChanged | Failure:
    try:
        engine.drop_adapter(asked.name)
    except RequestError as error:
        return Failure(asked.id, str(error), error.param, error.code)
    return AdapterChanged(asked.id, None)


def _put(engine: Engine, asked: LoadAdapter, read: Future[Prepared]) -> AdapterChanged | Failure:
    try:
        return AdapterChanged(asked.id, engine.adapters.put(asked.name, read.result()))
    except CheckpointError as error:
        return Failure(asked.id, str(error), "lora_path", "invalid_adapter")
    except Exception as error:  # an adapter may be anything: running rows do not end for it
        log.exception("adapter '%s' from '%s'", asked.name, asked.path)
        return Failure(asked.id, f"the adapter cannot be read: {type(error).__name__}")


def start(
    checkpoint: Path, adapters: dict[str, Path], draft: Path | None = None, config: EngineConfig | None = None
) -> AnyEngine:
    """Load the engine, see that it computes what was certified, and draw a canary token from it and each adapter."""
    if (reading := _reading(checkpoint)) is not None:
        if adapters or draft is not None:
            raise CheckpointError(f"'{checkpoint}' reads and does not write: it wears no adapters and has no draft")
        reading.add(Request(id="canary", prompt=[0], counted=False))
        while reading.busy:
            for output in reading.step():
                if isinstance(output, Failure):
                    raise CheckpointError(output.message)
        return reading
    engine = Engine.load(checkpoint, adapters, config, draft=draft)
    fidelity.recheck(engine, checkpoint)
    for name in (None, *adapters):
        request = Request(id="canary", prompt=[0], sampling=Sampling(max_tokens=1, temperature=0), adapter=name)
        for _ in engine.run([request]):
            pass
    return engine


def _reading(checkpoint: Path) -> Reading | None:
    """The engine of a network that reads or hears."""
    if (hearer := open_hearer(checkpoint)) is not None:
        return HearingEngine(hearer)
    return None if (reader := open_reader(checkpoint)) is None else EncoderEngine(reader)


def _populate(engine: AnyEngine, ending: threading.Event) -> None:
    """Take the cache's memory from the system where the processor has nothing better to do."""
    if not isinstance(engine, Engine):
        return  # it has none
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    engine.runner.populate(lambda: not ending.is_set())


def _ready(engine: AnyEngine, model: str, checkpoint_id: str, adapters: list[str]) -> Ready:
    """What an engine says of itself."""
    ready = Ready(
        model=model,
        checkpoint_id=checkpoint_id,
        adapters=adapters,
        context=engine.context,
        vocabulary=engine.vocabulary,
    )
    if isinstance(engine, HearingEngine):
        return msgspec.structs.replace(ready, task=engine.task, hears=engine.hears)
    if isinstance(engine, EncoderEngine):
        reader = engine.reader
        ready = msgspec.structs.replace(ready, task=reader.task, labels=list(reader.labels), width=reader.width)
        if isinstance(reader, ClassReader):
            return msgspec.structs.replace(ready, window=reader.window, around=reader.around)
        if isinstance(reader, ExampleReader):
            return msgspec.structs.replace(ready, kinds=list(reader.kinds), sees=reader.sees)
        return ready
    return ready


def main(arguments: Sequence[str] | None = None, explaining: Explaining = lambda engine, folder: None) -> int:
    """Run the engine process; returns its exit code."""
    parser = argparse.ArgumentParser(description="the engine process; started by `steelyard serve`")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--draft", type=Path, metavar="PATH")
    parser.add_argument("--kv-cache", choices=get_args(CacheKind), default="bfloat16")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # A terminal's Ctrl-C reaches the whole process group: the HTTP process decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    socket = EngineSocket(options.socket)
    adapters = {name: Path(path) for name, _, path in (item.partition("=") for item in options.adapter)}
    try:
        engine = start(options.checkpoint, adapters, options.draft, EngineConfig(kv_cache=options.kv_cache))
    except (SteelyardError, FloatingPointError, MemoryError) as error:
        socket.send([Fatal(message=str(error) or "not enough memory")])
        return 1
    socket.send([_ready(engine, options.model, manifest.read(options.checkpoint).id, list(adapters))])
    ending = threading.Event()
    threading.Thread(target=_populate, args=(engine, ending), name="cache").start()
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=receive, args=(socket, inbox), daemon=True, name="reader").start()
    try:
        serve(engine, inbox, socket, explaining(engine, options.checkpoint))
    except (BrokenPipeError, ConnectionError):
        return 0  # the HTTP process is gone
    finally:
        ending.set()
    return 0
