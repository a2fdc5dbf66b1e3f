"""The decoder that `tasks.py --only scratch` trains from nothing, compressed: float weights that nobody rounded before.

Bits per byte of the texts that it was not trained on, by the layers that evaluation runs; rows to judge by are of those
that it was trained on.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from steelyard.checkpoint import manifest
from steelyard.compress.prune.decoders import PruneConfig
from steelyard.compress.quantize.decoders import QuantizeConfig
from steelyard.data.chat import FormatConfig
from steelyard.evaluate.certificate import weight_bytes
from steelyard.stages import compress
from steelyard.stages.evaluate import Likelihood, evaluate

LEARNT, HELD = "train-all.jsonl", "test-all.jsonl"
JUDGED = 1 << 14
"""Tokens to judge by."""
METHODS: dict[str, QuantizeConfig | PruneConfig | None] = {
    "own bfloat16": None,
    "own int8": QuantizeConfig(),
    "own int8 groups smoothquant": QuantizeConfig(group="auto", method="smoothquant"),
    "own int4 groups": QuantizeConfig(bits=4, group="auto"),
    "own int4 groups gptq": QuantizeConfig(bits=4, group="auto", method="gptq"),
    "own 50% magnitude": PruneConfig(method="magnitude"),
    "own 50% wanda": PruneConfig(method="wanda"),
    "own 50% sparsegpt": PruneConfig(method="sparsegpt"),
    "own 2:4 magnitude": PruneConfig(method="magnitude", pattern="2:4"),
    "own 2:4 wanda": PruneConfig(method="wanda", pattern="2:4"),
    "own 2:4 sparsegpt": PruneConfig(method="sparsegpt", pattern="2:4"),
}


def measure(name: str, folder: Path, task: Path, limit: int) -> dict[str, float]:
    """Bits per byte, and bytes.

    Args:
        name: of the method.
        folder: where compressed ones are kept.
        task: of `tasks.py`: the run, and its two files of texts.
        limit: only the first so many held-out texts.
    """
    config, base, place = METHODS[name], task / "run" / "best", folder / name.replace(" ", "-").replace(":", "to")
    if config is None:
        place = base
    elif not (place / manifest.MANIFEST).is_file():
        shutil.rmtree(place, ignore_errors=True)
        started = time.perf_counter()
        data = None if config.method in ("nearest", "magnitude") else task / LEARNT
        tokens = None if data is None else JUDGED
        if isinstance(config, QuantizeConfig):
            compress.quantize(base, place, config, data=data, tokens=tokens, accept=True)
        else:
            compress.prune(base, place, config, data=data, tokens=tokens, accept=True)
        print(f"{name}: made in {time.perf_counter() - started:.0f} s", flush=True)
    found = evaluate(place, task / HELD, FormatConfig(), limit=limit)
    assert isinstance(found, Likelihood)
    assert found.bits_per_byte is not None
    return {"bits_per_byte": found.bits_per_byte, "bytes": float(weight_bytes(place))}
