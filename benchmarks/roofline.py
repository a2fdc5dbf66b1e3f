"""Where a decode step's time goes, against what the machine allows.

    python benchmarks/roofline.py --json roofline.json

Measured first: how fast memory is read, and how many integer operations a second the best product does. The floor of a
step is, part by part, the larger of bytes / bandwidth and operations / rate. Then the plan of SmolLM2-135M in int8 at
several batch sizes with a context of 192 tokens, random weights of text in the cache: its time, its parts, its floor.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from steelyard.checkpoint.sources import pull
from steelyard.checkpoint.sources.cache import default_cache
from steelyard.compress.quantize import layout
from steelyard.demo.lifecycle import MODEL
from steelyard.infer.plan import Plan
from steelyard.kernels import library
from steelyard.kernels.packing import PackedWeight
from steelyard.kernels.reference import BLOCK
from steelyard.kernels.steps import Batch, Product
from steelyard.models import weights

CONTEXT = 192
TARGETS = {1: 2.0, 64: 1.8}  # batch: most times the floor


def best(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of some runs, after two that do not count."""
    found = []
    for place in range(repeats + 2):
        started = time.perf_counter()
        run()
        if place >= 2:
            found.append(time.perf_counter() - started)
    return min(found)


def bandwidth(repeats: int) -> float:
    """Bytes a second of reading 512 MB by all threads."""
    content = torch.ones(1 << 27)  # written: memory never written reads from one zero page
    return content.nbytes / best(content.sum, repeats)


def weights_rate(plan: Plan, repeats: int) -> float:
    """Bytes a second of the weights in a step of one row, which does little else than read them."""
    batch = decode_batch(1, plan.decoder.config.vocabulary)
    size = sum(step.weight.data.numel() for step in plan.steps if isinstance(step, Product))
    found: list[float] = []
    for _ in range(repeats + 2):
        seconds = torch.zeros(len(plan.steps), dtype=torch.float64)
        plan.run(batch, seconds)
        found.append(sum(s for step, s in zip(plan.steps, seconds.tolist(), strict=True) if isinstance(step, Product)))
    return size / min(found)


def integer_rate(repeats: int) -> float:
    """Operations a second of oneDNN's int8 product at 256 x 1536 x 3072, the best of the machine that is not ours."""
    x = torch.randint(0, 255, (256, 1536), dtype=torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(torch.randint(-127, 128, (3072, 1536), dtype=torch.int8), None)
    scale, zeros = torch.ones(3072), torch.zeros(3072, dtype=torch.int64)

    def run() -> None:
        torch.ops.onednn.qlinear_pointwise(
            x, 1.0, 128, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )

    return 2 * 256 * 1536 * 3072 / best(run, 4 * repeats)


def decode_batch(rows: int, vocabulary: int) -> Batch:
    """One token of each of `rows` sequences with `CONTEXT` tokens before it."""
    per_row = CONTEXT // BLOCK + 1

    def numbers(values: list[Any]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    return Batch(
        token_ids=torch.randint(vocabulary, (rows,), dtype=torch.int32),
        positions=numbers([CONTEXT] * rows),
        slots=numbers([row * per_row + per_row - 1 for row in range(rows)]),
        spans=numbers([[row, CONTEXT, 1, row * per_row] for row in range(rows)]),
        tables=numbers(list(range(rows * per_row))),
        draws=numbers(list(range(rows))),
    )


def measure(plan: Plan, rows: int, repeats: int, memory: float, rate: float) -> dict[str, Any]:
    """Milliseconds of a step, by part, and its floor."""
    batch = decode_batch(rows, plan.decoder.config.vocabulary)
    seconds = torch.zeros(len(plan.steps), dtype=torch.float64)
    step = best(lambda: plan.run(batch), repeats)
    runs = max(3, repeats // 2)
    for _ in range(runs):
        plan.run(batch, seconds)
    parts: dict[str, float] = {}
    floor = 0.0
    for work, spent in zip(plan.steps, seconds.tolist(), strict=True):
        name = type(work).__name__
        parts[name] = parts.get(name, 0.0) + spent / runs * 1e3
        if isinstance(work, Product):
            packed: PackedWeight = work.weight
            size = packed.data.nbytes + (0 if packed.scale is None else packed.scale.nbytes)
            floor += max(size / memory, 2 * rows * packed.form.outputs * packed.form.inputs / rate)
    cache = plan.cache
    per_token = (cache.keys.nbytes + cache.values.nbytes) / (cache.keys.shape[1] * BLOCK)
    floor += rows * (CONTEXT + 1) * per_token / memory
    return {
        "rows": rows,
        "step_ms": step * 1e3,
        "floor_ms": floor * 1e3,
        "times_floor": step / floor,
        "tokens_per_second": rows / step,
        "parts_ms": dict(sorted(parts.items(), key=lambda part: -part[1])),
    }


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,4,8,16,32,64", help="batch sizes")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, two batch sizes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    repeats = 3 if options.quick else 20
    sizes = [1, 8] if options.quick else [int(size) for size in options.rows.split(",")]
    native = library.load()
    base = pull(MODEL, cache=default_cache())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        layout.write(weights.load(base), folder, base)
        decoder = weights.load(folder)
        plan = Plan(
            decoder,
            blocks=max(sizes) * (CONTEXT // BLOCK + 1),
            tokens=max(sizes),
            draws=max(sizes),
            context=CONTEXT + BLOCK,
            native=native,
        )
    plan.cache.keys.normal_()
    plan.cache.values.normal_()
    # What anything has read is what the machine can: a plain sum is not always the fastest reader.
    memory, rate = max(bandwidth(repeats), weights_rate(plan, repeats)), integer_rate(repeats)
    print(f"memory read {memory / 1e9:.1f} GB/s, int8 product {rate / 1e9:.0f} GOP/s, kernels {native and native.form}")
    found = [measure(plan, rows, repeats, memory, rate) for rows in sizes]
    for row in found:
        parts = "  ".join(f"{part} {spent:.2f}" for part, spent in row["parts_ms"].items() if spent >= 0.05)
        print(
            f"{row['rows']:4} rows {row['step_ms']:8.2f} ms  floor {row['floor_ms']:7.2f}  x{row['times_floor']:.2f}"
            f"  {row['tokens_per_second']:6.0f} tokens/s   {parts}"
        )
    short = [
        {"name": f"times_floor_{row['rows']}", "measured": row["times_floor"], "target": f"<= {TARGETS[row['rows']]}"}
        for row in found
        if row["rows"] in TARGETS and row["times_floor"] > TARGETS[row["rows"]]
    ]
    print(f"short of target: {[entry['name'] for entry in short] or 'nothing'}")
    if options.json is not None:
        ceilings = {"memory_bytes_per_second": memory, "int8_operations_per_second": rate}
        result = {"quick": options.quick, "ceilings": ceilings, "steps": found, "short": short}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
