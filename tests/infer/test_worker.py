"""The engine process by itself: ready after a canary, answers, refusals, aborts, and its end with the other side."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from steelyard.infer import wire
from steelyard.infer.request import (
    Abort,
    Aborted,
    EngineStats,
    Failure,
    Fatal,
    FromEngine,
    Output,
    Ready,
    Request,
    Sampling,
)

GREEDY = Sampling(max_tokens=8, temperature=0, ignore_eos=True)
decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


class Worker:
    """An engine process and the other end of its socket."""

    def __init__(self, checkpoint: Path, *arguments: str) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(60)
        self.stats: list[EngineStats] = []
        self.began = time.monotonic()
        number = theirs.fileno()
        command = [sys.executable, "-m", "steelyard.explain.worker", str(checkpoint), "--model", "tiny"]
        self.process = subprocess.Popen(
            [*command, "--socket", str(number), *arguments], pass_fds=[number], stderr=subprocess.PIPE
        )
        theirs.close()

    def send(self, message: Request | Abort) -> None:
        self.socket.sendall(wire.frame(message))

    def receive(self) -> FromEngine | None:
        """The next message that is no statistics; those are collected."""
        while header := self._read(4):
            message = decoder.decode(self._read(int.from_bytes(header, "little")))
            if not isinstance(message, EngineStats):
                return message
            self.stats.append(message)
        return None

    def _read(self, count: int) -> bytes:
        content = b""
        while len(content) < count and (piece := self.socket.recv(count - len(content))):
            content += piece
        return content

    def tokens(self, *ids: str) -> dict[str, list[int]]:
        """What comes until each of `ids` has ended."""
        found: dict[str, list[int]] = {id: [] for id in ids}
        open_ = set(ids)
        while open_:
            message = self.receive()
            assert isinstance(message, Output)
            found[message.id] += message.tokens
            if message.finish_reason is not None:
                open_.remove(message.id)
        return found

    def end(self) -> int:
        self.socket.close()
        return self.process.wait(timeout=30)


@pytest.fixture
def worker(tiny_model: Path) -> Iterator[Worker]:
    worker = Worker(tiny_model)
    yield worker
    worker.process.kill()
    worker.process.wait()


def test_it_is_ready_answers_and_ends_with_the_other_side(worker: Worker, tiny_model: Path) -> None:
    ready = worker.receive()
    assert isinstance(ready, Ready)
    assert (ready.model, ready.adapters, ready.context) == ("tiny", [], 512)
    assert ready.checkpoint_id
    worker.send(Request(id="a", prompt=[5, 6], sampling=GREEDY))
    alone = worker.tokens("a")["a"]
    assert len(alone) == 8
    for id in ("a", "b"):
        worker.send(Request(id=id, prompt=[5, 6], sampling=GREEDY))
    assert worker.tokens("a", "b") == {"a": alone, "b": alone}
    worker.process.send_signal(signal.SIGINT)  # a terminal's Ctrl-C is not for it
    worker.send(Request(id="a", prompt=[5, 6], sampling=GREEDY))
    assert worker.tokens("a")["a"] == alone
    assert worker.end() == 0


def test_a_refusal_names_the_field_and_hurts_nobody(worker: Worker) -> None:
    assert isinstance(worker.receive(), Ready)
    worker.send(Request(id="long", prompt=[5] * 600))
    failure = worker.receive()
    assert isinstance(failure, Failure)
    assert (failure.id, failure.param, failure.code) == ("long", "prompt", "context_length_exceeded")
    worker.send(Request(id="a", prompt=[5], sampling=GREEDY))
    assert len(worker.tokens("a")["a"]) == 8


def test_the_moments_of_a_request_are_on_the_clock_of_whoever_asks(worker: Worker) -> None:
    assert isinstance(worker.receive(), Ready)
    began = time.monotonic()
    worker.send(Request(id="a", prompt=[5, 6], sampling=GREEDY))
    while (output := worker.receive()) is not None and output.finish_reason is None:
        assert isinstance(output, Output)
        assert output.timeline is None
    assert isinstance(output, Output)
    told = output.timeline
    assert told is not None
    assert began <= told.arrived <= told.scheduled < told.first_token < told.last_token <= time.monotonic()


def test_an_abort_ends_the_answer(worker: Worker) -> None:
    assert isinstance(worker.receive(), Ready)
    worker.send(Request(id="a", prompt=[5], sampling=Sampling(max_tokens=500, temperature=0, ignore_eos=True)))
    assert isinstance(worker.receive(), Output)
    worker.send(Abort("a"))
    worker.send(Request(id="b", prompt=[5], sampling=GREEDY))
    deadline, late = time.monotonic() + 60, 0
    while time.monotonic() < deadline:
        message = worker.receive()
        if isinstance(message, Aborted):
            assert (message.id, message.prompt_tokens, message.cached_tokens) == ("a", 1, 0)
            assert message.completion_tokens[0] > 0
            continue
        assert isinstance(message, Output)
        assert message.finish_reason is None or message.id == "b"
        late += message.id == "a"
        if message.finish_reason is not None:
            break
    assert late < 400, "the aborted answer goes on"


def test_killed_in_the_middle_the_other_side_sees_the_end(worker: Worker) -> None:
    assert isinstance(worker.receive(), Ready)
    worker.send(Request(id="a", prompt=[5], sampling=Sampling(max_tokens=500, temperature=0, ignore_eos=True)))
    assert isinstance(worker.receive(), Output)
    worker.process.kill()
    while worker.receive() is not None:
        pass


def test_bytes_that_are_no_frame_end_it_with_one_line(worker: Worker) -> None:
    assert isinstance(worker.receive(), Ready)
    worker.socket.sendall((1 << 30).to_bytes(4, "little"))
    assert worker.process.wait(timeout=30) == 0
    assert worker.process.stderr is not None
    lines = worker.process.stderr.read().decode().splitlines()
    assert len(lines) == 1
    assert "a frame of 1073741824 bytes" in lines[0]


def test_what_cannot_start_says_why(tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    for checkpoint, arguments, complaint in (
        (broken, [], "model.safetensors' cannot be read"),
        (tmp_path / "none", [], "no checkpoint at"),
        (tiny_model, ["--adapter", f"x={tiny_model}"], "is a model, not an adapter"),
    ):
        worker = Worker(checkpoint, *arguments)
        message = worker.receive()
        assert isinstance(message, Fatal)
        assert complaint in message.message
        assert worker.process.wait(timeout=30) == 1


def test_a_model_that_computes_nothing_finite_is_not_ready(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    worker = Worker(broken)
    message = worker.receive()
    assert isinstance(message, Fatal)
    assert "not finite" in message.message


def test_it_says_what_it_has_done_when_it_falls_idle(worker: Worker) -> None:
    assert isinstance(worker.receive(), Ready)
    for number in (1, 2):
        worker.send(Request(id="a", prompt=[5, 6, 7], sampling=GREEDY))
        worker.tokens("a")
        worker.send(Request(id="refused", prompt=[]))
        assert isinstance(worker.receive(), Failure)
        done = worker.stats[-1]
        assert (done.running, done.waiting, done.used_blocks) == (0, 0, 0)
        canary = 1
        assert done.generated_tokens == canary + 8 * number
        assert done.prompt_tokens == canary + 3 * number
    assert len(worker.stats) <= 2 + 2 + time.monotonic() - worker.began, "once a second at most while it works"


def test_a_draft_guesses_and_one_that_does_not_fit_says_why(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from steelyard.compress.quantize import layout
    from steelyard.models import weights

    layout.write(weights.load(tiny_model, torch.float32), tmp_path, tiny_model)
    worker = Worker(tmp_path, "--draft", str(tiny_model))
    assert isinstance(worker.receive(), Ready)
    worker.send(Request(id="a", prompt=[5, 6, 7], sampling=Sampling(max_tokens=40, temperature=0, ignore_eos=True)))
    assert len(worker.tokens("a")["a"]) == 40
    worker.send(Request(id="refused", prompt=[]))
    worker.receive()
    assert worker.stats[-1].drafted_tokens > 0
    assert worker.end() == 0
    monkeypatch.setenv("STEELYARD_KERNELS", "torch")  # without kernels a bfloat16 model has no plan
    worker = Worker(tiny_model, "--draft", str(tmp_path))
    message = worker.receive()
    assert isinstance(message, Fatal)
    assert "a draft needs a model in int8 or bfloat16" in message.message
    assert worker.process.wait(timeout=30) == 1


def test_an_int8_cache_is_chosen_at_the_start(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(tiny_model, "--kv-cache", "int8")
    assert isinstance(worker.receive(), Ready)
    worker.send(Request(id="a", prompt=[5, 6, 7], sampling=Sampling(max_tokens=9, temperature=0, ignore_eos=True)))
    assert len(worker.tokens("a")["a"]) == 9
    assert worker.end() == 0
    monkeypatch.setenv("STEELYARD_KERNELS", "torch")  # without kernels a bfloat16 model has no plan
    message = Worker(tiny_model, "--kv-cache", "int8").receive()
    assert isinstance(message, Fatal)
    assert "an int8 cache needs" in message.message
