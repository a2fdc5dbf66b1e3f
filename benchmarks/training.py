"""Training SmolLM2-135M: ours against Hugging Face's Trainer, PEFT and TRL, on the same rows, in turns in one run.

    python benchmarks/training.py --json training.json
    python -m benchmarks.peers.setup trl            # once, for TRL, which has an environment of its own

Rows of 512 tokens of the Brown corpus, 8 a step, bfloat16 weights, every token learnt; others in every round, so that
the losses of rounds are those of seeds. The first step, which warms up, does not count. Also measured: what two cores
do in a large bfloat16 product, for the share of it that a full fine-tuning uses (6 operations a parameter and token).

Targets: at least 1.5 times the tokens/s of the best peer at no more than 0.7 of its memory, for LoRA and for all
weights; a mean loss no worse than the best peer's by more than 1%; 45% of the machine's bfloat16 product.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import workload
from steelyard.checkpoint.sources import pull
from steelyard.checkpoint.sources.cache import default_cache
from steelyard.demo.lifecycle import MODEL
from steelyard.text.tokenizer import Tokenizer

LENGTH, BATCH = 512, 8
SPEED, MEMORY, LOSS, UTILISATION = 1.5, 0.7, 1.01, 0.45
RUNNER = Path(__file__).parent / "peers" / "train_run.py"
TRL = Path("bench/peers/trl/bin/python").absolute()
PEERS = {"lora": ("peft", "trl"), "full": ("trainer", "trl")}

Found = dict[str, Any]


def ceiling() -> float:
    """Operations a second of a large bfloat16 product, the best of five."""
    a, b = (torch.randn(4096, 4096).bfloat16() for _ in range(2))
    best = 0.0
    for _ in range(6):
        started = time.perf_counter()
        a @ b
        best = max(best, 2 * 4096**3 / (time.perf_counter() - started))
    return best


def prepare(model: Path, folder: Path, steps: int, rounds: int) -> list[Path]:
    """Rows of text for so many steps and one more, others for each round."""
    count = (steps + 1) * BATCH
    text = workload.brown(default_cache())
    ids = Tokenizer.load(model).encode_plain(text[: rounds * count * LENGTH * 8])
    paths = []
    for number in range(rounds):
        paths.append(folder / f"rows-{number}.safetensors")
        rows = ids[number * count * LENGTH : (number + 1) * count * LENGTH]
        save_file({"rows": torch.tensor(rows).view(count, LENGTH)}, paths[-1])
    return paths


def run(kind: str, method: str, model: Path, rows: Path) -> Found:
    """One process; its tokens a second, peak and mean loss."""
    python = str(TRL) if kind == "trl" else sys.executable
    command = [python, str(RUNNER), kind, "--model", str(model), "--rows", str(rows), "--method", method]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{kind} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    speed = BATCH * LENGTH * len(found["seconds"]) / sum(found["seconds"])
    row = {"kind": kind, "tokens_per_second": speed, "peak_bytes": found["peak_bytes"], "losses": found["losses"]}
    print(
        f"{method:5} {kind:10} {speed:6.0f} tokens/s  {found['peak_bytes'] / 1e6:6.0f} MB"
        f"  loss {statistics.mean(found['losses']):.4f}",
        flush=True,
    )
    return row


def compare(method: str, model: Path, rows: list[Path]) -> Found:
    """All contenders in turns, as often as there are rows."""
    kinds = ["steelyard", *(kind for kind in PEERS[method] if kind != "trl" or TRL.is_file())]
    runs: dict[str, list[Found]] = {kind: [] for kind in kinds}
    for own in rows:
        for kind in kinds:
            runs[kind].append(run(kind, method, model, own))
    return {
        kind: {
            "tokens_per_second": statistics.median(one["tokens_per_second"] for one in found),
            "peak_bytes": min(one["peak_bytes"] for one in found),
            "loss": statistics.mean(statistics.mean(one["losses"]) for one in found),
            "runs": found,
        }
        for kind, found in runs.items()
    }


def shortfalls(found: dict[str, Found], most: float, parameters: int) -> list[Found]:
    """Each figure under its target."""
    short = []
    for method, contenders in found.items():
        ours, peers = contenders["steelyard"], [one for kind, one in contenders.items() if kind != "steelyard"]
        best = max(one["tokens_per_second"] for one in peers)
        figures = [
            ("speed", ours["tokens_per_second"] / best, SPEED, True),
            ("memory", ours["peak_bytes"] / min(one["peak_bytes"] for one in peers), MEMORY, False),
            ("loss", ours["loss"] / min(one["loss"] for one in peers), LOSS, False),
        ]
        if method == "full":
            figures.append(("utilisation", ours["tokens_per_second"] * 6 * parameters / most, UTILISATION, True))
        for name, value, target, at_least in figures:
            print(f"{method:5} {name:12} {value:.3f}  (wanted {'at least' if at_least else 'at most'} {target})")
            if (value < target) if at_least else (value > target):
                short.append({"figure": f"{method} {name}", "value": value, "target": target})
    return short


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=list(PEERS))
    parser.add_argument("--quick", action="store_true", help="two steps, one round")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    steps, rounds = (2, 1) if asked.quick else (asked.steps, asked.rounds)
    model, most = pull(MODEL, cache=default_cache()), ceiling()
    parameters = sum(file.stat().st_size for file in model.glob("*.safetensors")) // 2
    with tempfile.TemporaryDirectory() as name:
        rows = prepare(model, Path(name), steps, rounds)
        found = {one: compare(one, model, rows) for one in PEERS if asked.only in (None, one)}
    print(f"bfloat16 product: {most / 1e9:.0f} GFLOP/s")
    short = shortfalls(found, most, parameters)
    result = {"quick": asked.quick, "product": most, "found": found, "short": short}
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
