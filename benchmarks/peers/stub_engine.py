"""An engine process without a model, for the gateway benchmark: answers every request with 32 tokens at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from steelyard.infer.request import Abort, Output, Ready, Request
from steelyard.infer.wire import EngineSocket

TOKENS = 32


def main() -> None:
    """Answer until the other side is gone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--socket", type=int, required=True)
    options = parser.parse_args()
    wire = EngineSocket(options.socket)
    ready = Ready(model=options.model, checkpoint_id="sha256:stub", adapters=[], context=8192, vocabulary=49152)
    wire.send([ready])
    while (message := wire.receive()) is not None:
        if isinstance(message, Request):
            wire.send([output(message, number) for number in range(1, TOKENS + 1)])
        else:
            assert isinstance(message, Abort)  # of one that has ended


def output(request: Request, number: int) -> Output:
    """A token of the answer."""
    return Output(
        id=request.id,
        choice=0,
        text="hi ",
        tokens=[number],
        finish_reason="length" if number == TOKENS else None,
        prompt_tokens=len(request.prompt),
        completion_tokens=number,
    )


if __name__ == "__main__":
    main()
