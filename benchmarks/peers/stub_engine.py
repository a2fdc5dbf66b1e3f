"""An engine process without a model, for the benchmarks of the service: answers with as many tokens as are asked for.

A request's `seed` is the milliseconds that a token takes; without one all tokens come at once. It tells what it has
generated as the real one does.
"""

from __future__ import annotations

import argparse
import queue
import threading
import time
from pathlib import Path

from steelyard.infer.request import Abort, Aborted, EngineStats, Output, Ready, Request, Timeline, ToEngine
from steelyard.infer.wire import EngineSocket

CONTEXT, VOCABULARY = 8192, 49152


class Running:
    """A request under way, one choice alone."""

    def __init__(self, request: Request) -> None:
        self.request, self.made, self.due = request, 0, time.monotonic()
        self.arrived = self.due

    def step(self) -> Output:
        """Its next token."""
        self.made += 1
        ends, now, arrived = self.made >= self.request.sampling.max_tokens, time.monotonic(), self.arrived
        self.due += (self.request.sampling.seed or 0) / 1000
        return Output(
            id=self.request.id,
            choice=0,
            text="hi ",
            tokens=[self.made],
            finish_reason="length" if ends else None,
            prompt_tokens=len(self.request.prompt),
            completion_tokens=self.made,
            timeline=Timeline(arrived=arrived, scheduled=arrived, first_token=arrived, last_token=now)
            if ends
            else None,
        )


def main() -> None:
    """Answer until the other side is gone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--socket", type=int, required=True)
    options = parser.parse_args()
    wire = EngineSocket(options.socket)
    ready = Ready(model=options.model, checkpoint_id="sha256:stub", adapters=[], context=CONTEXT, vocabulary=VOCABULARY)
    wire.send([ready])
    inbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()

    def read() -> None:
        while (message := wire.receive()) is not None:
            inbox.put(message)
        inbox.put(None)

    threading.Thread(target=read, daemon=True).start()
    running: dict[str, Running] = {}
    generated = 0
    while True:
        due = min((one.due for one in running.values()), default=time.monotonic() + 60)
        try:
            message = inbox.get(timeout=max(0.0, due - time.monotonic()))
        except queue.Empty:
            message = Abort("")  # nothing came
        if message is None:
            return
        if isinstance(message, Request):
            running[message.id] = Running(message)
        elif isinstance(message, Abort) and (gone := running.pop(message.id, None)) is not None:
            size = len(gone.request.prompt)
            told = Aborted(id=message.id, prompt_tokens=size, cached_tokens=0, completion_tokens=[gone.made])
            wire.send([told, EngineStats(generated_tokens=generated, running=len(running))])
        outputs: list[Output] = []
        now = time.monotonic()
        for one in list(running.values()):
            while one.due <= now and one.request.id in running:
                outputs.append(one.step())
                generated += one.request.counted
                if outputs[-1].finish_reason is not None:
                    del running[one.request.id]
        if outputs:
            wire.send([*outputs, EngineStats(generated_tokens=generated, running=len(running))])


if __name__ == "__main__":
    main()
