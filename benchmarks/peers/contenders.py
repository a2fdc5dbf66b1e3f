"""Each contender of the serving benchmark: how it starts, answers a plan, and ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import load

FOLDER = Path("bench/peers").absolute()
KEY = "benchmark"
START_SECONDS = 240


class Server:
    """A process that speaks OpenAI's API on a port of 127.0.0.1.

    Args:
        name: in the tables.
        command: its command line; `{port}` is filled in.
        model: what requests name.
        environment: added to this process's.
        extra: fields that are added to every request.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[object],
        model: str,
        environment: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.command, self.model = name, [str(part) for part in command], model
        self.environment, self.extra = dict(environment or {}), dict(extra or {"ignore_eos": True})
        self.ready_seconds = 0.0
        self.process: subprocess.Popen[bytes]

    @property
    def missing(self) -> str | None:
        """What is not set up, or None."""
        absent = [part for part in self.command if part.startswith(str(FOLDER)) and not Path(part).exists()]
        return absent[0] if absent else None

    def start(self) -> None:
        """Start it, and wait until it has answered a request."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        command = [part.replace("{port}", str(port)) for part in self.command]
        FOLDER.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with (FOLDER / f"{self.name}.log").open("w") as log:
            environment = {**os.environ, **self.environment}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        question = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        while time.perf_counter() - started < START_SECONDS:
            if self.process.poll() is not None:
                break
            body = json.dumps({"model": self.model, **question}).encode()
            headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
            try:
                asked = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
                urllib.request.urlopen(asked, timeout=30).read()
            except (OSError, urllib.error.HTTPError):
                time.sleep(0.05)
                continue
            self.ready_seconds = time.perf_counter() - started
            return
        self.stop()
        raise SystemExit(f"{self.name} did not start: see {FOLDER / self.name}.log")

    def answer(self, rows: list[dict[str, Any]], concurrency: int) -> dict[str, Any]:
        """Run a closed loop; see `load.closed_loop`."""
        return asyncio.run(load.closed_loop(self.url, KEY, self.model, rows, concurrency, self.extra))

    def memory(self) -> int:
        """Bytes resident in it and its children, shared pages by halves."""
        return _resident(self.process.pid)

    def pause(self) -> None:
        """Let it do nothing while others are measured."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        os.killpg(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


class OpenVino:
    """OpenVINO GenAI in process, without the cost of HTTP."""

    name = "openvino-int8"

    def __init__(self) -> None:
        self.python, self.model = FOLDER / "openvino/bin/python", FOLDER / "openvino-int8"
        self.ready_seconds = 0.0

    @property
    def missing(self) -> str | None:
        """What is not set up, or None."""
        return next((str(path) for path in (self.python, self.model) if not path.exists()), None)

    def start(self) -> None:
        """Load the model."""
        started = time.perf_counter()
        script = Path(__file__).parent / "openvino_run.py"
        self.process = subprocess.Popen(
            [str(self.python), str(script), str(self.model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._out.readline() == "ready\n", "OpenVINO did not start"
        self.ready_seconds = time.perf_counter() - started

    @property
    def _out(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def answer(self, rows: list[dict[str, Any]], concurrency: int) -> dict[str, Any]:
        """Run a closed loop."""
        plan = FOLDER / "openvino-rows.json"
        plan.write_text(json.dumps(rows))
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"rows": str(plan), "concurrency": concurrency}) + "\n")
        self.process.stdin.flush()
        found = json.loads(self._out.readline())
        return load.summary([load.Answer(**answer) for answer in found["answers"]], found["seconds"])

    def memory(self) -> int:
        """Bytes resident."""
        return _resident(self.process.pid)

    def pause(self) -> None:
        """Let it do nothing while others are measured."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def steelyard(checkpoint: Path) -> Server:
    """Ours."""
    command = [sys.executable, "-m", "steelyard", "serve", checkpoint, "--port", "{port}"]
    state = tempfile.mkdtemp(prefix="steelyard-")
    return Server("steelyard", command, checkpoint.name, {"STEELYARD_API_KEY": KEY, "STEELYARD_HOME": state})


def llama(kind: str) -> Server:
    """llama-server; 64 slots of 1,280 tokens, both cores."""
    folder = FOLDER / "llama"
    command = [
        folder / "build/bin/llama-server",
        "-m",
        folder / f"{kind}.gguf",
        "--host",
        "127.0.0.1",
        "--port",
        "{port}",
    ]
    return Server(f"llama-{kind.lower()}", [*command, *["-np", "64", "-cb", "-t", "2", "-tb", "2", "-c", "81920"]], "m")


def vllm(model: Path) -> Server:
    """vLLM with its best settings here: both cores, tcmalloc and Intel's OpenMP preloaded."""
    folder = FOLDER / "vllm"
    command = [folder / "bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    options = [
        "--served-model-name",
        "m",
        "--dtype",
        "bfloat16",
        "--max-model-len",
        "2048",
        "--max-num-seqs",
        "64",
        "--host",
        "127.0.0.1",
    ]
    preloaded = f"/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4:{folder}/lib/libiomp5.so"
    environment = {
        "LD_PRELOAD": preloaded,
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return Server("vllm-bf16", [*command, *options, "--host", "127.0.0.1", "--port", "{port}"], "m", environment)


def _resident(process: int) -> int:
    total, waiting = 0, [process]
    while waiting:
        number = waiting.pop()
        try:
            for line in Path(f"/proc/{number}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) << 10
            for task in Path(f"/proc/{number}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return total
