"""An engine process without a model: speaks the wire and answers with one sentence, over and over.

Choice c begins c tokens later. A prompt's tokens have the log-probabilities -1, -2 and so on. `seed` is the
milliseconds that a token takes. Explanations give every token the same share. The prompt [7, 7, 7] is refused,
[8, 8, 8] fails, [9, 9, 9] kills the process. Files in the checkpoint folder: `fatal` makes it refuse to start,
`stubborn` makes it ignore SIGTERM and the end of the socket.
It loads any adapter whose path does not say `broken`; loading `deadly` kills it. Every message that it receives is
written to `received`, one per line.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec

from steelyard.infer.request import (
    Abort,
    Aborted,
    AdapterChanged,
    DropAdapter,
    EngineStats,
    Explanation,
    Failure,
    Fatal,
    LoadAdapter,
    Output,
    PromptLogprob,
    Ready,
    Request,
    Timeline,
    ToEngine,
    TokenLogprob,
)
from steelyard.infer.wire import EngineSocket
from steelyard.text.detokenizer import Detokenizer
from steelyard.text.stop import StopStrings
from steelyard.text.tokenizer import Tokenizer

SENTENCE = "Grüße: the steelyard weighs exactly 😀 with one moving weight. "
CONTEXT = 256


class Choice:
    def __init__(self, request: Request, number: int, tokenizer: Tokenizer, choices: list[Choice]) -> None:
        self.request, self.number, self.tokenizer, self.choices = request, number, tokenizer, choices
        self.detokenizer, self.stop = Detokenizer(tokenizer), StopStrings(request.sampling.stop)
        self.generated, self.due = 0, time.monotonic()
        self.arrived, self.first_token, self.ended = self.due, 0.0, False

    def step(self, sentence: list[int]) -> Output:
        sampling = self.request.sampling
        token = sentence[(self.number + self.generated) % len(sentence)]
        self.generated += 1
        now = time.monotonic()
        self.first_token = self.first_token or now
        self.due = now + (sampling.seed or 0) / 1000
        text, stopped = self.stop.push(self.detokenizer.push(token))
        full = self.generated >= sampling.max_tokens or self.generated + len(self.request.prompt) >= CONTEXT
        if full and not stopped:
            text += self.stop.push(self.detokenizer.flush())[0] + self.stop.flush()
        logprobs = None
        if sampling.logprobs is not None:
            top = [(token + n, self.tokenizer.token_text(token + n), -0.25 - n) for n in range(sampling.logprobs)]
            logprobs = [TokenLogprob(token, self.tokenizer.token_text(token), -0.25, top)]
        self.ended = stopped or full
        return Output(
            id=self.request.id,
            choice=self.number,
            text=text,
            tokens=[token],
            logprobs=logprobs,
            finish_reason="stop" if stopped else "length" if full else None,
            prompt_tokens=len(self.request.prompt),
            completion_tokens=self.generated,
            timeline=timeline(self.arrived, self.choices[0].first_token, now) if self.over else None,
        )

    @property
    def over(self) -> bool:
        return all(choice.ended for choice in self.choices)


def timeline(arrived: float, first_token: float, last_token: float) -> Timeline:
    return Timeline(arrived=arrived, scheduled=arrived, first_token=first_token, last_token=last_token)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--draft", default="")
    arguments = parser.parse_args()
    wire = EngineSocket(arguments.socket)
    stubborn = (arguments.checkpoint / "stubborn").exists()
    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if (arguments.checkpoint / "fatal").exists():
        wire.send([Fatal(message="the weights do not fit")])
        sys.exit(6)
    (arguments.checkpoint / "draft").write_text(arguments.draft)
    (arguments.checkpoint / "environment").write_text("\n".join(os.environ))
    tokenizer = Tokenizer.load(arguments.checkpoint)
    sentence = tokenizer.encode(SENTENCE)
    inbox: queue.Queue[ToEngine | None] = queue.Queue()

    def read() -> None:
        with (arguments.checkpoint / "received").open("ab", buffering=0) as received:
            while (message := wire.receive()) is not None:
                received.write(msgspec.json.encode(message) + b"\n")
                inbox.put(message)
        inbox.put(None)

    threading.Thread(target=read, daemon=True).start()
    wire.send(
        [
            Ready(
                model=arguments.model,
                checkpoint_id="sha256:0123456789abcdef",
                adapters=[adapter.partition("=")[0] for adapter in arguments.adapter],
                context=CONTEXT,
                vocabulary=tokenizer.vocabulary,
            )
        ]
    )
    running: list[Choice] = []
    generated = 0
    while True:
        due = min((choice.due for choice in running), default=time.monotonic() + 60)
        try:
            while True:
                message = inbox.get(timeout=max(0.0, due - time.monotonic()))
                if message is None:
                    time.sleep(60 if stubborn else 0)
                    return
                running = take(message, running, tokenizer, wire)
                if isinstance(message, Abort):
                    wire.send([EngineStats(generated_tokens=generated, running=len(running), used_blocks=1, blocks=4)])
                due = min((choice.due for choice in running), default=time.monotonic() + 60)
        except queue.Empty:
            pass
        outputs = [choice.step(sentence) for choice in running if choice.due <= time.monotonic()]
        ended = {(output.id, output.choice) for output in outputs if output.finish_reason}
        running = [choice for choice in running if (choice.request.id, choice.number) not in ended]
        generated += sum(not output.id.startswith("canary-") for output in outputs)
        stats = EngineStats(generated_tokens=generated, running=len(running), used_blocks=1, blocks=4)
        wire.send([*outputs, stats])


def take(message: ToEngine, running: list[Choice], tokenizer: Tokenizer, wire: EngineSocket) -> list[Choice]:
    if isinstance(message, LoadAdapter | DropAdapter):
        path = message.path if isinstance(message, LoadAdapter) else ""
        if "deadly" in path:
            os.kill(os.getpid(), signal.SIGKILL)
        if "broken" in path:
            wire.send([Failure(message.id, f"'{path}' does not fit", "lora_path", "invalid_adapter")])
        else:
            wire.send([AdapterChanged(message.id, f"digest of {path}" if path else None)])
        return running
    if isinstance(message, Abort):
        if given_up := [choice for choice in running if choice.request.id == message.id]:
            counts = [0] * given_up[0].request.n
            for choice in given_up:
                counts[choice.number] = choice.generated
            prompt = len(given_up[0].request.prompt)
            wire.send([Aborted(id=message.id, prompt_tokens=prompt, cached_tokens=0, completion_tokens=counts)])
        return [choice for choice in running if choice.request.id != message.id]
    if message.prompt == [7, 7, 7]:
        wire.send([Failure(message.id, "sevens are refused", "prompt")])
        return running
    if message.prompt == [8, 8, 8]:
        wire.send([Failure(message.id, "the logits are not finite")])
        return running
    if message.prompt == [9, 9, 9]:
        os.kill(os.getpid(), signal.SIGKILL)
    if message.explain is not None:
        wire.send([explained(message)])
        return running
    if message.sampling.prompt_logprobs is not None:
        told = [scored(message, place, tokenizer) for place in range(1, len(message.prompt))]
        for piece in (told[:2], told[2:]):  # long prompts come in pieces
            wire.send([Output(id=message.id, choice=0, text="", tokens=[], prompt_logprobs=piece or None)])
    if message.sampling.max_tokens == 0:
        size, now = len(message.prompt), time.monotonic()
        ends = [
            Output(
                id=message.id,
                choice=n,
                text="",
                tokens=[],
                finish_reason="length",
                prompt_tokens=size,
                timeline=timeline(now, now, now) if n == message.n - 1 else None,
            )
            for n in range(message.n)
        ]
        wire.send(ends)
        return running
    choices: list[Choice] = []
    choices += [Choice(message, number, tokenizer, choices) for number in range(message.n)]
    return running + choices


def explained(request: Request) -> Output:
    """Each token of the prompt has a share of 1; twice as many tokens were computed."""
    asked, size, now = request.explain, len(request.prompt), time.monotonic()
    assert asked is not None
    places = list(range(size)) if asked.places is None else asked.places
    found = Explanation(
        places=places,
        shares=[1.0] * len(places),
        rest=0.0,
        value=float(len(places)),
        base=0.0,
        residual=0.0,
        baseline="nothing",
        answer=asked.answer or [5],
        computed_tokens=2 * size,
    )
    return Output(
        id=request.id,
        choice=0,
        text="",
        tokens=[],
        explanation=found,
        finish_reason="stop",
        prompt_tokens=2 * size,
        timeline=timeline(now, now, now),
    )


def scored(request: Request, place: int, tokenizer: Tokenizer) -> PromptLogprob:
    token, likeliest = request.prompt[place], request.sampling.prompt_logprobs or 0
    top = [(token + n, tokenizer.token_text(token + n), -0.5 - n) for n in range(1, likeliest + 1)]
    return PromptLogprob(token, tokenizer.token_text(token), -float(place), top, likeliest + 1)


if __name__ == "__main__":
    main()
