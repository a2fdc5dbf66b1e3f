"""Serving SmolLM2-135M on this machine: ours over HTTP against what a user would otherwise run, in one run.

    python -m benchmarks.peers.setup openvino llama      # once
    python benchmarks/serving.py --peers openvino-int8,llama-q4_0 --json serving.json
    python benchmarks/serving.py --peers none --workloads w1:8 --requests 16

All contenders are up together; those whose turn it is not are stopped by signal. They take turns at every workload, and
no prompt is sent twice to one of them. `w1` is 128 tokens in and 128 out, `w2` 1024 and 64, `w3` 512 shared + 64 and
64. Targets: output tokens a second on w1 at 8, 32 and 64 at least 1.5 times the best peer's, at 1 at least 1.2 times;
w2 at 8 at least 1.3, w3 at 8 at least 1.5; the first token on w1 at 8 and 32 no later (p99); the time between tokens on
w2 (p99) at most a third; bits per byte on held-out text at most 1.5% over bfloat16, and better than llama.cpp's 4 bits.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import workload
from peers import contenders, quality
from steelyard.checkpoint.sources import pull
from steelyard.checkpoint.sources.cache import default_cache
from steelyard.compress.quantize import layout
from steelyard.demo.lifecycle import MODEL
from steelyard.models import weights
from steelyard.text.tokenizer import Tokenizer

WORKLOADS = "w1:1,w1:8,w1:32,w1:64,w2:8,w3:8"
SPEED = {"w1:1": 1.2, "w1:8": 1.5, "w1:32": 1.5, "w1:64": 1.5, "w2:8": 1.3, "w3:8": 1.5}
"""Output tokens a second: at least this many times the best peer's."""
FIRST = ("w1:8", "w1:32")
"""The first token's p99: no later than the best peer's."""
BETWEEN = {"w2:8": 1 / 3}
"""The time between tokens, p99: at most this share of the best peer's."""


def requests_for(concurrency: int, quick: bool) -> int:
    """How many requests measure a concurrency."""
    return 2 * concurrency if quick else max(6, 2 * concurrency if concurrency >= 32 else 4 * concurrency)


def shortfalls(found: dict[str, dict[str, dict[str, Any]]], ours: str) -> list[dict[str, Any]]:
    """Each figure under its target, by name, with both numbers."""
    short = []
    for item, by_name in found.items():
        peers = [figures for name, figures in by_name.items() if name != ours]
        if not peers or ours not in by_name:
            continue
        mine = by_name[ours]
        fastest = max(peer["tokens_per_second"] for peer in peers)
        wanted = SPEED.get(item, 0.0) * fastest
        if mine["tokens_per_second"] < wanted:
            short.append({"name": f"speed {item}", "measured": mine["tokens_per_second"], "target": f">= {wanted:.0f}"})
        limits = []
        if item in FIRST:
            limits.append(("first_ms", 1.0))
        if item in BETWEEN:
            limits.append(("between_ms", BETWEEN[item]))
        for name, share in limits:
            limit = share * min(peer[name]["p99"] for peer in peers)
            if mine[name]["p99"] > limit:
                short.append({"name": f"{name} {item}", "measured": mine[name]["p99"], "target": f"<= {limit:.0f}"})
    return short


def main() -> None:
    """Start the contenders, let them take turns, print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="openvino-int8,llama-q4_0,vllm-bf16", help="comma-separated, or none")
    parser.add_argument("--workloads", default=WORKLOADS, help="workload:concurrency, comma-separated")
    parser.add_argument("--requests", type=int, help="per workload; default: 2 to 4 times the concurrency")
    parser.add_argument("--checkpoint", type=Path, help="an int8 checkpoint; default: SmolLM2, made here")
    parser.add_argument("--quick", action="store_true", help="few requests, w1 at 1 and 8")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    items = ["w1:1", "w1:8"] if options.quick else options.workloads.split(",")
    base = pull(MODEL, cache=default_cache())
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint
        if checkpoint is None:
            checkpoint = Path(folder) / "smollm2-int8"
            checkpoint.mkdir()
            layout.write(weights.load(base), checkpoint, base)
        every: list[Any] = [
            contenders.OpenVino(),
            contenders.llama("Q4_0"),
            contenders.llama("Q8_0"),
            contenders.vllm(base),
        ]
        known = {peer.name: peer for peer in every}
        wanted = [] if options.peers == "none" else options.peers.split(",")
        for name in wanted:
            if name not in known:
                parser.error(f"no peer '{name}'; known: {', '.join(known)}")
            if known[name].missing:
                parser.error(f"{name} is not set up ({known[name].missing}): see python -m benchmarks.peers.setup")
        bits = quality.bits_per_byte(wanted, checkpoint, base)  # cached beside the peers
        quality.show(bits)
        ours = contenders.steelyard(checkpoint)
        found = compete([ours, *(known[name] for name in wanted)], items, options, Tokenizer.load(base))
    report(found, ours.name, bits, options)


def compete(
    every: list[Any], items: list[str], options: argparse.Namespace, tokenizer: Tokenizer
) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures by workload and contender."""
    rows = workload.make(workload.brown(contenders.FOLDER), tokenizer, 400)
    used = dict.fromkeys(rows, 0)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    try:
        for contender in every:
            contender.start()
            contender.pause()
        for item in items:
            name, _, concurrency = item.partition(":")
            count = options.requests or requests_for(int(concurrency), options.quick)
            part = rows[name][used[name] : used[name] + count]
            used[name] += count
            if len(part) < count:
                raise SystemExit(f"{name} has too few prompts for {items}: no prompt is sent twice")
            for contender in every:
                contender.resume()
                figures = contender.answer(part, int(concurrency))
                figures |= {"ready_seconds": contender.ready_seconds, "resident_bytes": contender.memory()}
                contender.pause()
                found.setdefault(item, {})[contender.name] = figures
                show(item, contender.name, figures)
    finally:
        for contender in every:
            contender.resume()
            contender.stop()
    return found


def show(item: str, name: str, figures: dict[str, Any]) -> None:
    """One line for people."""
    first, between = figures["first_ms"], figures["between_ms"]
    said = (
        f"{item:6} {name:14} {figures['tokens_per_second']:7.1f} tokens/s",
        f"first {first['p50']:6.0f} / {first['p99']:6.0f} ms",
        f"between {between['p50']:5.1f} / {between['p99']:6.1f} ms",
        f"{figures['resident_bytes'] >> 20:5} MB",
        f"{figures['errors']} ERRORS: {figures['error']}" if figures["errors"] else "",
    )
    print("  ".join(said), flush=True)


def report(
    found: dict[str, dict[str, dict[str, Any]]], ours: str, bits: dict[str, float], options: argparse.Namespace
) -> None:
    """Ratios to each peer, what is short of its target, the JSON."""
    ratio: dict[str, dict[str, dict[str, float]]] = {}
    for item, by_name in found.items():
        name, _, concurrency = item.partition(":")
        for peer, figures in by_name.items():
            if peer != ours:
                times = by_name[ours]["tokens_per_second"] / figures["tokens_per_second"]
                ratio.setdefault(peer, {}).setdefault(name, {})[f"c{concurrency}"] = times
    for peer, by_workload in ratio.items():
        line = "  ".join(f"{name} {c} {times:.2f}x" for name, by in by_workload.items() for c, times in by.items())
        print(f"against {peer}: {line}")
    short = [] if options.quick else shortfalls(found, ours) + quality.shortfalls(bits)
    print(f"short of target: {short or 'nothing'}")
    if options.json is not None:
        result = {"quick": options.quick, "ratio": ratio, "figures": found, "bits_per_byte": bits, "short": short}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
