"""Bits per byte of every contender on the same held-out text: the same token ids in the same windows.

    python benchmarks/peers/quality.py openvino-int8 llama-q4_0 llama-q8_0

40 KB of the Brown corpus in windows of 1024 tokens, each half new: but for the first window's, a token is scored with
at least 512 before it. Ours by the plan that the engine runs, `bfloat16` by the reference forward, the peers in their
own environments (score.py). What was found is kept beside the peers, by the text and the model's files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import checkpoints
import workload
from peers.contenders import FOLDER
from steelyard.checkpoint.sources import pull
from steelyard.checkpoint.sources.cache import default_cache
from steelyard.demo.lifecycle import MODEL
from steelyard.infer.plan import Plan
from steelyard.kernels import library
from steelyard.kernels.reference import BLOCK
from steelyard.kernels.steps import Batch
from steelyard.models import weights
from steelyard.models.attention import PackedAttention
from steelyard.text.tokenizer import Tokenizer

BYTES, WINDOW = 40_000, 1024
REFERENCE = "bfloat16"
MOST_OVER_REFERENCE = 1.015
Windows = list[tuple[list[int], int]]


def windows(ids: list[int]) -> Windows:
    """Token ids of each window, and the place of the first that is scored in it; every id but the first is, once."""
    made, done = [], 1
    for begin in range(0, len(ids), WINDOW // 2):
        end = min(begin + WINDOW, len(ids))
        made.append((ids[begin:end], done - begin))
        done = end
        if end == len(ids):
            break
    return made


class HeldOut(NamedTuple):
    """What everybody is scored on."""

    windows: Windows
    size: int
    """Bytes."""

    def bits(self, nats: float) -> float:
        """Bits per byte."""
        return nats / math.log(2) / self.size


def held_out(base: Path) -> HeldOut:
    """Some of the second half of Brown, by the tokens of a model."""
    corpus = workload.brown(FOLDER)
    part = corpus[len(corpus) // 2 :][:BYTES]
    return HeldOut(windows(Tokenizer.load(base).encode_plain(part)), len(part.encode()))


def ours(checkpoint: Path, text: Windows) -> float:
    """Nats by the plan."""
    decoder = weights.load(checkpoint)
    blocks = WINDOW // BLOCK
    plan = Plan(decoder, blocks=blocks, tokens=WINDOW, draws=WINDOW, context=WINDOW, native=library.load())

    def run(ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(len(ids), dtype=torch.int32)
        spans = torch.tensor([[0, 0, len(ids), 0]], dtype=torch.int32)
        tables = torch.arange(blocks, dtype=torch.int32)
        return plan.run(Batch(ids.int(), places, places // BLOCK, spans, tables, places))

    return _nats(run, text)


def reference(checkpoint: Path, text: Windows) -> float:
    """Nats by the forward pass that training and evaluation run."""
    decoder = weights.load(checkpoint)

    @torch.inference_mode()
    def run(ids: torch.Tensor) -> torch.Tensor:
        return decoder.logits(decoder(ids, torch.arange(len(ids)), PackedAttention([len(ids)])))

    return _nats(run, text)


def _nats(run: Callable[[torch.Tensor], torch.Tensor], text: Windows) -> float:
    total = 0.0
    for window, first in text:
        ids = torch.tensor(window)
        logits = run(ids)[first - 1 : -1].double()
        total += float(torch.nn.functional.cross_entropy(logits, ids[first:], reduction="sum"))
    return total


def peer(name: str, text: Windows) -> float:
    """Nats by a peer, in its own environment."""
    environment = dict(os.environ)
    if name.startswith("openvino"):
        command = [FOLDER / "openvino/bin/python", "openvino", FOLDER / name]
        environment.pop("PYTHONPATH", None)
    else:
        folder = FOLDER / "llama"
        command = [sys.executable, "llama", model_files(name)[0]]
        binding = next(folder.glob("llama_cpp_python-*/llama_cpp"))
        environment |= {"LLAMA_CPP_LIB_PATH": str(folder / "build/bin"), "LLAMA_CPP_BINDING": str(binding)}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(text, file)
        file.flush()
        python, backend, model = map(str, command)
        script = Path(__file__).with_name("score.py")
        asked = [python, str(script), backend, model, file.name]
        done = subprocess.run(asked, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} cannot be scored:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def model_files(name: str) -> list[Path]:
    """The files of a peer's model."""
    if name.startswith("openvino"):
        return sorted((FOLDER / name).glob("openvino_model.*"))
    return [FOLDER / "llama" / f"{name.removeprefix('llama-').upper()}.gguf"]


def bits_per_byte(names: Iterable[str], checkpoint: Path, base: Path) -> dict[str, float]:
    """Bits per byte by contender: `steelyard`, `bfloat16`, and those of `names` that have a form of their own.

    Args:
        names: of peers; vLLM runs the bfloat16 weights as they are.
        checkpoint: ours, int8.
        base: the bfloat16 model.
    """
    held = held_out(base)
    text = held.windows
    scored: dict[str, tuple[list[Path], Callable[[], float]]] = {
        "steelyard": (sorted(checkpoint.glob("*.safetensors")), lambda: ours(checkpoint, text)),
        REFERENCE: (sorted(base.glob("*.safetensors")), lambda: reference(base, text)),
    }
    for name in names:
        if name.startswith(("openvino", "llama")):
            scored[name] = model_files(name), lambda name=name: peer(name, text)  # type: ignore[misc]
    kept = FOLDER / "quality.json"
    known: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    found = {}
    for name, (files, score) in scored.items():
        key = hashlib.sha256(json.dumps([text, [_digest(file) for file in files]]).encode()).hexdigest()
        if known.get(name, {}).get("key") != key:
            known[name] = {"key": key, "bits_per_byte": held.bits(score())}
            kept.write_text(json.dumps(known, indent=2) + "\n")
        found[name] = float(known[name]["bits_per_byte"])
    return found


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def shortfalls(found: dict[str, float], own: str = "steelyard") -> list[dict[str, Any]]:
    """Ours against bfloat16, and against llama.cpp's four bits."""
    limits = [(f"<= {MOST_OVER_REFERENCE} x {REFERENCE}", MOST_OVER_REFERENCE * found[REFERENCE])]
    limits += [(f"< {name}", found[name]) for name in found if name.startswith("llama-q4")]
    return [
        {"name": f"bits_per_byte {target}", "measured": found[own], "target": f"{target} = {limit:.4f}"}
        for target, limit in limits
        if found[own] > limit
    ]


def show(found: dict[str, float]) -> None:
    """A line for each contender."""
    for name, bits in found.items():
        print(f"{name:14} {bits:.4f} bits per byte  {100 * (bits / found[REFERENCE] - 1):+.2f}%")


def main() -> None:
    """Score the named peers and ours, print."""
    base = pull(MODEL, cache=default_cache())
    with tempfile.TemporaryDirectory() as folder:
        show(bits_per_byte(sys.argv[1:], checkpoints.smollm2(Path(folder)), base))


if __name__ == "__main__":
    main()
