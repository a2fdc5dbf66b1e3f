"""Quality, size and speed of every way of compressing SmolLM2-135M, in one table and one plot.

    python benchmarks/compression.py --json compression.json
    python benchmarks/compression.py --only int4 --peers llama-q4_0,openvino-int4

Bits per byte of held-out Brown as in peers/quality.py, by the plan that an engine runs; rows to judge by are cut from
the other half of Brown. Speed: tokens a second of that plan, one row with 192 tokens of context, 16 rows, and a prompt
of 256 tokens, the best of some runs; all forms in turns, the median of some rounds. MiniLM beside it (see
`compressed_minilm.py`), and with `--own FOLDER` the decoder that `tasks.py --only scratch --folder FOLDER` trains from
nothing (`compressed_own.py`). What is made is kept under `bench/compression`, and served once; peers
(`peers/setup.py`) give quality and bytes alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import compressed_minilm as minilm
import compressed_own as own
import workload
from peers import quality
from peers.contenders import FOLDER as PEERS
from roofline import CONTEXT, best, decode_batch
from steelyard.checkpoint.sources import pull
from steelyard.checkpoint.sources.cache import default_cache
from steelyard.compress.prune import decoders as pruning
from steelyard.compress.prune.decoders import PruneConfig
from steelyard.compress.quantize import layout
from steelyard.compress.quantize.decoders import QuantizeConfig
from steelyard.data.packing import Pack
from steelyard.data.rows import TokenRow
from steelyard.demo.lifecycle import MODEL
from steelyard.evaluate.certificate import weight_bytes
from steelyard.evaluate.likelihood import packs
from steelyard.infer import fidelity
from steelyard.infer.engine import Engine
from steelyard.infer.plan import Plan
from steelyard.infer.request import Request, Sampling
from steelyard.kernels import library
from steelyard.kernels.reference import BLOCK
from steelyard.kernels.steps import Batch
from steelyard.models import weights
from steelyard.models.decoder import Decoder
from steelyard.report import Report
from steelyard.text.tokenizer import Tokenizer

FOLDER = Path("bench/compression").absolute()
CALIBRATION, ROW = 1 << 14, 512
"""Tokens to judge by, and of a row of them."""
PROMPT = 256
ROUNDS = 5
SOME = ("*.[qkv]_proj", "*.down_proj")
METHODS: dict[str, QuantizeConfig | PruneConfig | None] = {
    "bfloat16": None,
    "int8": QuantizeConfig(),
    "int8 smoothquant": QuantizeConfig(method="smoothquant"),
    "int8 some g64 smoothquant": QuantizeConfig(group=64, method="smoothquant", group_layers=SOME),
    "int8 g64": QuantizeConfig(group=64),
    "int8 g64 smoothquant": QuantizeConfig(group=64, method="smoothquant"),
    "int4 g64": QuantizeConfig(bits=4, group=64),
    "int4 g64 awq": QuantizeConfig(bits=4, group=64, method="awq"),
    "int4 g64 gptq": QuantizeConfig(bits=4, group=64, method="gptq"),
    "int4 g32 gptq": QuantizeConfig(bits=4, group=32, method="gptq"),
    "50% magnitude": PruneConfig(method="magnitude"),
    "50% wanda": PruneConfig(method="wanda"),
    "50% sparsegpt": PruneConfig(method="sparsegpt"),
    "2:4 magnitude": PruneConfig(method="magnitude", pattern="2:4"),
    "2:4 wanda": PruneConfig(method="wanda", pattern="2:4"),
    "2:4 sparsegpt": PruneConfig(method="sparsegpt", pattern="2:4"),
}
MOST_OF_INT8 = 1.003
"""Times the bits per byte of bfloat16."""
Found = dict[str, dict[str, float]]


def make(name: str, base: Path, batches: Sequence[Pack]) -> Path:
    """The folder of a compressed model; made unless it is there."""
    config, folder = METHODS[name], FOLDER / name.replace(" ", "-").replace(":", "to")
    if config is None or (folder / weights.WEIGHTS).is_file():
        return base if config is None else folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started, decoder = time.perf_counter(), weights.load(base)
    if isinstance(config, QuantizeConfig):
        layout.write(decoder, folder, base, config, () if config.method == "nearest" else batches)
    else:
        pruned = copy.deepcopy(decoder)
        pruning.prune(pruned, config, () if config.method == "magnitude" else batches)
        weights.save(pruned, folder, base, zeros=False)
    print(f"{name}: made in {time.perf_counter() - started:.0f} s", flush=True)
    return folder


def calibration(base: Path) -> list[Pack]:
    """Rows of the half of Brown that nothing is measured on."""
    text = workload.brown(PEERS)
    ids = Tokenizer.load(base).encode_plain(text[: len(text) // 2])
    places = torch.linspace(0, len(ids) - ROW, CALIBRATION // ROW).long().tolist()
    rows = [TokenRow(tokens=ids[place : place + ROW], trained=[True] * ROW) for place in places]
    return list(packs(rows))


def speeds(decoder: Decoder, repeats: int) -> dict[str, float]:
    """Tokens a second: of one row, of 16, and of a prompt."""
    most = 16
    plan = Plan(
        decoder,
        blocks=most * (CONTEXT // BLOCK + 1) + PROMPT // BLOCK,
        tokens=PROMPT,
        draws=most,
        context=max(PROMPT, CONTEXT + BLOCK),
        native=library.load(),
    )
    plan.cache.keys.normal_()
    plan.cache.values.normal_()
    found = {}
    for rows in (1, most):
        batch = decode_batch(rows, decoder.config.vocabulary)
        found[f"tokens_per_second_{rows}"] = rows / best(lambda batch=batch: plan.run(batch), repeats)  # type: ignore[misc]
    places = torch.arange(PROMPT, dtype=torch.int32)
    ids = torch.randint(decoder.config.vocabulary, (PROMPT,), dtype=torch.int32)
    spans, tables = torch.tensor([[0, 0, PROMPT, 0]], dtype=torch.int32), places[: PROMPT // BLOCK]
    prompt = Batch(ids, places, places // BLOCK, spans, tables, places[-1:])
    found["tokens_per_second_prompt"] = PROMPT / best(lambda: plan.run(prompt), max(3, repeats // 4))
    return found


def in_turns(folders: dict[str, Path], quick: bool) -> Found:
    """Of each form the median of its `speeds`: what the machine does meanwhile meets all of them."""
    decoders = {name: weights.load(folder) for name, folder in folders.items()}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in decoders}
    for _ in range(1 if quick else ROUNDS):
        for name, decoder in decoders.items():
            rounds[name].append(speeds(decoder, 4 if quick else 20))
    return {
        name: {figure: statistics.median(one[figure] for one in each) for figure in each[0]}
        for name, each in rounds.items()
    }


def served(folder: Path) -> float:
    """1 if an engine opens it, finds what was certified, and draws a token."""
    engine = Engine.load(folder)
    fidelity.recheck(engine, folder)
    request = Request(id="one", prompt=[1, 2, 3], sampling=Sampling(max_tokens=1, temperature=0))
    return float(sum(len(output.tokens) for output in engine.run([request])))


def shortfalls(found: Found) -> list[dict[str, Any]]:
    """What is not as it has to be, of what was measured."""
    bits = {name: values["bits_per_byte"] for name, values in found.items()}
    speed = {name: values.get("tokens_per_second_1", math.nan) for name, values in found.items()}
    best_int4 = min((name for name in bits if name.startswith("int4")), key=bits.__getitem__, default="")
    wanted: list[tuple[str, bool, float, float]] = []
    best_int8 = min((name for name in bits if name.startswith("int8 g64")), key=bits.__getitem__, default="")
    if "bfloat16" in bits and best_int8:
        limit = MOST_OF_INT8 * bits["bfloat16"]
        wanted.append((f"{best_int8}: bits per byte", bits[best_int8] <= limit, bits[best_int8], limit))
    if best_int4 and "int8" in speed:
        wanted.append(
            (f"{best_int4}: tokens/s of one row", speed[best_int4] > speed["int8"], speed[best_int4], speed["int8"])
        )
    for peer in ("llama-q4_0", "openvino-int4"):
        if best_int4 and peer in bits:
            wanted.append((f"{best_int4} against {peer}", bits[best_int4] < bits[peer], bits[best_int4], bits[peer]))
            ours, theirs = found[best_int4]["bytes"], found[peer]["bytes"]
            wanted.append((f"{best_int4}: bytes against {peer}", ours <= theirs, ours, theirs))
    for kind in ("50%", "2:4", "own 50%", "own 2:4"):
        for better, worse in (("sparsegpt", "wanda"), ("wanda", "magnitude")):
            pair = bits.get(f"{kind} {better}"), bits.get(f"{kind} {worse}")
            if pair[0] is not None and pair[1] is not None:
                wanted.append((f"{kind}: {better} better than {worse}", pair[0] < pair[1], pair[0], pair[1]))
    return [
        {"name": name, "measured": measured, "target": target} for name, good, measured, target in wanted if not good
    ]


def show(found: Found, path: Path) -> None:
    """Table and plot."""
    report = Report("Compression of SmolLM2-135M")
    whole = found.get("bfloat16", {}).get("bits_per_byte", math.nan)
    rows: list[list[str | float]] = []
    points: dict[str, tuple[list[float], list[float]]] = {}
    for name, values in found.items():
        lost = 100 * (values["bits_per_byte"] / whole - 1)
        speed = [values.get(f"tokens_per_second_{kind}", math.nan) for kind in ("1", "16", "prompt")]
        rows.append([name, values["bytes"] / 1e6, values["bits_per_byte"], lost, *speed])
        if lost:
            points[name] = [values["bytes"] / 1e6], [lost]
        told = "  ".join(f"{number:7.0f}" for number in speed)
        print(f"{name:22} {values['bytes'] / 1e6:7.1f} MB  {values['bits_per_byte']:.4f}  {lost:+7.2f}%  {told}")
    headers = ["", "MB", "bits per byte", "lost, %", "tokens/s, 1 row", "16 rows", "prompt"]
    report.table(headers, rows)
    report.lines("what is lost by what is left", points, "MB", "rise of bits per byte, %", log_y=True)
    report.write(path)
    print(f"report: {path}")


def main() -> None:
    """Make, measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names that begin so, between commas")
    parser.add_argument("--peers", default="", help="llama-q4_0, llama-q8_0, openvino-int8, openvino-int4")
    parser.add_argument("--own", type=Path, metavar="FOLDER", help="of tasks.py, with its folder `scratch`")
    parser.add_argument("--quick", action="store_true", help="three methods, fewer repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    base = pull(MODEL, cache=default_cache())
    begins = tuple(options.only.split(",")) if options.only else ("",)
    names = [name for name in METHODS if name == "bfloat16" or name.startswith(begins)]
    if options.quick:
        names = ["bfloat16", "int8 g64", "int4 g64"]
    batches, text = calibration(base), quality.held_out(base)
    found: Found = {}
    for name in names:
        folder = make(name, base, batches)
        sizes = {"bits_per_byte": text.bits(quality.ours(folder, text.windows)), "bytes": float(weight_bytes(folder))}
        found[name] = {**sizes, "served": served(folder)}
        print(name, found[name], flush=True)
    for name, speed in in_turns({name: make(name, base, batches) for name in names}, options.quick).items():
        found[name] |= speed
        print(name, speed, flush=True)
    for name in filter(None, options.peers.split(",")):
        size = sum(file.stat().st_size for file in quality.model_files(name))
        found[name] = {"bits_per_byte": text.bits(quality.peer(name, text.windows)), "bytes": float(size)}
    show(found, FOLDER / "report.html")
    trained: Found = {}
    for name in own.METHODS if options.own else ():
        if name == "own bfloat16" or name.startswith(begins) or name.removeprefix("own ").startswith(begins):
            trained[name] = own.measure(name, FOLDER, options.own / "scratch", 20 if options.quick else 400)
            print(f"{name:32} {trained[name]['bytes'] / 1e6:7.1f} MB  {trained[name]['bits_per_byte']:.4f}", flush=True)
    short = shortfalls({**trained, **found})
    for fault in short:
        print("SHORT", fault)
    encoders = {} if options.only and not any(name.startswith(begins) for name in minilm.METHODS) else minilm.METHODS
    chosen = [name for name in encoders if name.startswith((*begins, "minilm float32"))]
    if options.quick:
        chosen = ["minilm float32", "minilm int8 g64"]
    judged: Found = {}
    for name in chosen:
        judged[name] = values = minilm.measure(name, FOLDER, repeats=1 if options.quick else 5)
        print(
            f"{name:22} {values['bytes'] / 1e6:7.1f} MB  WordSim {values['wordsim']:.4f}  "
            f"SimLex {values['simlex']:.4f}  {values['passages_per_second']:.0f} passages/s",
            flush=True,
        )
    if options.json:
        options.json.write_text(
            json.dumps({"found": found, "own": trained, "minilm": judged, "short": short}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
