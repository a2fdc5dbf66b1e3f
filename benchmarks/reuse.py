"""What shared prefixes are worth: workload w3 (512 tokens that all requests begin with), blocks reused and not.

    python benchmarks/reuse.py --json reuse.json

In process, SmolLM2-135M in int8, eight requests under way at a time, in turns. Target: at least twice the output
tokens a second.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import workload
from peers import contenders
from steelyard.checkpoint.sources import pull
from steelyard.checkpoint.sources.cache import default_cache
from steelyard.compress.quantize import layout
from steelyard.demo.lifecycle import MODEL
from steelyard.infer.engine import Engine, EngineConfig
from steelyard.infer.request import Output, Request, Sampling
from steelyard.models import weights
from steelyard.text.tokenizer import Tokenizer

CONCURRENCY, TARGET = 8, 2.0


def speed(engine: Engine, prompts: list[list[int]], name: str) -> float:
    """Output tokens a second, `CONCURRENCY` requests at a time."""
    sampling = Sampling(max_tokens=64, temperature=0, ignore_eos=True)
    waiting = [Request(id=f"{name}-{place}", prompt=prompt, sampling=sampling) for place, prompt in enumerate(prompts)]
    live, tokens, started = 0, 0, time.perf_counter()
    while waiting or live:
        while waiting and live < CONCURRENCY:
            engine.add(waiting.pop())
            live += 1
        for output in engine.step():
            assert isinstance(output, Output)
            tokens += len(output.tokens)
            live -= output.finish_reason is not None
    return tokens / (time.perf_counter() - started)


def main() -> None:
    """Measure in turns, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one turn, fewer requests")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    turns, count = (1, 8) if options.quick else (3, 32)
    base = pull(MODEL, cache=default_cache())
    tokenizer = Tokenizer.load(base)
    rows: list[dict[str, Any]] = workload.make(workload.brown(contenders.FOLDER), tokenizer, turns * count)["w3"]
    prompts = [tokenizer.encode_plain("\n".join(turn["content"] for turn in row["messages"])) for row in rows]
    with tempfile.TemporaryDirectory() as name:
        layout.write(weights.load(base), Path(name), base)
        decoder = weights.load(Path(name))
        engines = {reuse: Engine(decoder, tokenizer, config=EngineConfig(reuse=reuse)) for reuse in (True, False)}
    found: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(turns):
        part = prompts[turn * count : (turn + 1) * count]
        for reuse, engine in engines.items():
            found[reuse].append(speed(engine, part, f"{turn}"))
    with_reuse, without = (sorted(found[reuse])[turns // 2] for reuse in (True, False))
    times = with_reuse / without
    print(f"w3 c{CONCURRENCY}: {with_reuse:.0f} tokens/s with reuse, {without:.0f} without: {times:.2f} times")
    short = [] if times >= TARGET else [{"name": "reuse w3", "measured": times, "target": f">= {TARGET}"}]
    if options.json is not None:
        figures = {"tokens_per_second": {"reuse": found[True], "no_reuse": found[False]}, "times": times}
        options.json.write_text(json.dumps({"quick": options.quick, **figures, "short": short}, indent=2) + "\n")


if __name__ == "__main__":
    main()
