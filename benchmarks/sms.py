"""The demo's experiment over several seeds: does tuning on few labels beat the linear baseline, and does int8 keep it?

    python benchmarks/sms.py --seeds 0,1,2 --labels 400 --json sms.json
    python benchmarks/sms.py --seeds 0 --labels 4000

A seed varies the split, the labels and the adapter's start. `--quick` learns from 60 labels in one pass, to see that
the script runs; its figures are not held against the targets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from steelyard.checkpoint.sources.cache import default_cache
from steelyard.demo import lifecycle
from steelyard.demo.lifecycle import Learnt, Progressing

# labels: what the mean over the seeds must reach
TARGETS: dict[int, dict[str, float]] = {
    400: {"tuned_mcc": 0.90},
    4000: {"tuned_accuracy": 0.985, "tuned_mcc": 0.94},
}
INT8_ACCURACY_LOSS = 0.01
INT8_BYTES = 0.55


def epochs_for(labels: int) -> int:
    """Passes over the data: fewer where there is more of it."""
    return 3 if labels <= 1000 else 2


def one(base: Path, collection: Path, labels: int, seed: int, epochs: int) -> dict[str, Any]:
    """Run one experiment and return its figures."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tell = Progressing(note=lambda text: print(f"  seed {seed}: {text}", flush=True))
        learnt: Learnt = lifecycle.learn(
            base, collection, Path(folder), labels=labels, seed=seed, epochs=epochs, tell=tell, curve=False
        )
    figures: dict[str, Any] = {"seed": seed, "minutes": (time.perf_counter() - started) / 60}
    for name, stage in learnt.stages.items():
        figures |= {f"{name}_accuracy": stage.accuracy, f"{name}_mcc": stage.mcc, f"{name}_minutes": stage.minutes}
    found = learnt.certificate
    figures["bytes_ratio"] = found.bytes_after / found.bytes_before
    figures["int8_accuracy_loss"] = figures["tuned_accuracy"] - figures["int8_accuracy"]
    figures["bits_per_byte_change"] = found.bits_per_byte_change
    figures["training_tokens_per_second"] = [p for p in learnt.curve if "loss" in p][-1]["tokens_per_second"]
    return figures


def shortfalls(mean: dict[str, float], labels: int) -> list[dict[str, Any]]:
    """Every figure under its target, with both numbers."""
    short = [
        {"name": name, "measured": mean[name], "target": f">= {target}"}
        for name, target in TARGETS.get(labels, {}).items()
        if mean[name] < target
    ]
    if labels <= 400 and mean["tuned_mcc"] <= mean["linear_mcc"]:
        short.append({"name": "tuned_mcc", "measured": mean["tuned_mcc"], "target": f"> linear {mean['linear_mcc']}"})
    for name, limit in (("int8_accuracy_loss", INT8_ACCURACY_LOSS), ("bytes_ratio", INT8_BYTES)):
        if mean[name] > limit:
            short.append({"name": name, "measured": mean[name], "target": f"<= {limit}"})
    return short


def main() -> None:
    """Run the seeds, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--labels", type=int, default=400)
    parser.add_argument("--epochs", type=int, help="default: 3, or 2 for over 1,000 labels")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    labels = 60 if options.quick else options.labels
    seeds = [0] if options.quick else [int(seed) for seed in options.seeds.split(",")]
    epochs = 1 if options.quick else options.epochs or epochs_for(labels)
    base, collection = lifecycle.fetch(default_cache(), lambda what, done, total: None)
    runs = []
    for seed in seeds:
        runs.append(one(base, collection, labels, seed, epochs))
        print(json.dumps(runs[-1]), flush=True)
    mean = {key: statistics.fmean(run[key] for run in runs) for key in runs[0] if key != "seed"}
    short = [] if options.quick else shortfalls(mean, labels)
    for key, value in mean.items():
        print(f"{key:32} {value:10.4f}")
    print(f"short of target: {short or 'nothing'}")
    if options.json is not None:
        result = {
            "labels": labels,
            "epochs": epochs,
            "quick": options.quick,
            "runs": runs,
            "mean": mean,
            "short": short,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
