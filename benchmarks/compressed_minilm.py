"""MiniLM, whose published weights are floating point, compressed in every way that there is for an encoder.

Judged by Spearman's correlation with people's judgements (WordSim-353, SimLex-999); rows to judge by are passages of
Brown; speed is that of 256 other passages. See `compression.py`, which runs this.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from pathlib import Path

import torch

import corpora
import task_data
from roofline import best
from steelyard.checkpoint.sources import pull
from steelyard.checkpoint.sources.cache import default_cache
from steelyard.compress.prune.decoders import PruneConfig
from steelyard.compress.quantize.decoders import QuantizeConfig
from steelyard.evaluate.certificate import weight_bytes
from steelyard.models import classifiers, inputs
from steelyard.stages import compress
from steelyard.text.tokenizer import Tokenizer
from tasks import MINILM, likeness

METHODS: dict[str, QuantizeConfig | PruneConfig | None] = {
    "minilm float32": None,
    "minilm int8": QuantizeConfig(),
    "minilm int8 g64": QuantizeConfig(group=64),
    "minilm int4 g64": QuantizeConfig(bits=4, group=64),
    "minilm int4 g64 gptq": QuantizeConfig(bits=4, group=64, method="gptq"),
    "minilm int4 g32 gptq": QuantizeConfig(bits=4, group=32, method="gptq"),
    "minilm 50% magnitude": PruneConfig(method="magnitude"),
    "minilm 50% wanda": PruneConfig(method="wanda"),
    "minilm 50% sparsegpt": PruneConfig(method="sparsegpt"),
    "minilm 2:4 magnitude": PruneConfig(method="magnitude", pattern="2:4"),
    "minilm 2:4 wanda": PruneConfig(method="wanda", pattern="2:4"),
    "minilm 2:4 sparsegpt": PruneConfig(method="sparsegpt", pattern="2:4"),
}
JUDGED = 200
"""Passages to judge by."""


def make(name: str, folder: Path, rows: Path) -> Path:
    """The folder of a compressed encoder; made unless it is there."""
    config, base, place = METHODS[name], pull(MINILM, cache=default_cache()), folder / name.replace(" ", "-")
    if config is None or (place / "config.json").is_file():
        return base if config is None else place
    shutil.rmtree(place, ignore_errors=True)
    if isinstance(config, QuantizeConfig):
        data = None if config.method == "nearest" else rows
        compress.quantize(base, place, config, data=data, accept=True)
    else:
        compress.prune(base, place, config, data=None if config.method == "magnitude" else rows, accept=True)
    return place


def measure(name: str, folder: Path, *, repeats: int) -> dict[str, float]:
    """Both correlations, bytes, and passages a second."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, passages = folder / "rows.jsonl", [text[:400] for text in itertools.islice(corpora.brown(), 0, 4000, 8)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in passages[1 : 2 * JUDGED : 2]))
    started = time.perf_counter()
    place = make(name, folder, rows)
    print(f"{name}: made in {time.perf_counter() - started:.0f} s", flush=True)
    encoder, tokenizer = classifiers.load_encoder(place), Tokenizer.load(place)
    ids = [tokenizer.encode_plain(text, add_special_tokens=True)[:128] for text in passages[::2]][:256]
    batches = [inputs.padded(ids[begin : begin + 32]) for begin in range(0, len(ids), 32)]

    @torch.inference_mode()
    def run() -> None:
        for batch in batches:
            encoder.embed(*batch)

    return {
        "wordsim": likeness(place, task_data.word_pairs(folder, "wordsim353.tsv"))[0],
        "simlex": likeness(place, task_data.word_pairs(folder, "simlex999.txt"))[0],
        "bytes": float(weight_bytes(place)),
        "passages_per_second": len(ids) / best(run, repeats),
    }
