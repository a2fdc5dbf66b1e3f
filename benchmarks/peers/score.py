"""Runs inside a peer's environment: how surprised its model is by given tokens, in given windows.

python score.py openvino|llama MODEL WINDOWS.json     -> one JSON line, nats

WINDOWS.json is a list of [token ids, first scored place]. For llama, LLAMA_CPP_LIB_PATH names the folder of libllama.so
and LLAMA_CPP_BINDING that of its Python binding.
"""

# Peers' environments have no type stubs, and nothing of Steelyard.
import importlib
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Logits = Callable[[list[int]], Any]
"""Token ids -> logits `[T, V]`."""


def openvino(model: str) -> Logits:
    """The exported model in OpenVINO's runtime, as GenAI compiles it."""
    import openvino as ov  # type: ignore[import-not-found]

    compiled = ov.Core().compile_model(str(Path(model) / "openvino_model.xml"), "CPU")
    request = compiled.create_infer_request()
    names = {name for port in compiled.inputs for name in port.get_names()}

    def run(ids: list[int]) -> Any:
        request.reset_state()
        count = len(ids)
        whole = {
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, count), dtype=np.int64),
            "position_ids": np.arange(count, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        found = request.infer({name: value for name, value in whole.items() if name in names})
        return found["logits"][0]

    return run


def llama(model: str) -> Logits:
    """A GGUF file in the libllama.so that llama-server runs, through the binding's declarations alone."""
    package = types.ModuleType("llama_cpp")
    package.__path__ = [os.environ["LLAMA_CPP_BINDING"]]
    sys.modules["llama_cpp"] = package  # not its __init__, which wants packages that we need not have
    lib: Any = importlib.import_module("llama_cpp.llama_cpp")
    lib.llama_backend_init()
    loaded = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(loaded))
    sizes = lib.llama_context_default_params()
    sizes.n_ctx = sizes.n_batch = sizes.n_ubatch = 1024
    sizes.n_threads = sizes.n_threads_batch = os.cpu_count() or 2
    context = lib.llama_init_from_model(loaded, sizes)
    batch = lib.llama_batch_init(1024, 0, 1)

    def run(ids: list[int]) -> Any:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, True
        batch.n_tokens = len(ids)
        if lib.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
        rows = [lib.llama_get_logits_ith(context, place) for place in range(len(ids))]
        return np.stack([np.ctypeslib.as_array(row, shape=(vocabulary,)) for row in rows])

    return run


def nats(logits: Logits, windows: list[tuple[list[int], int]]) -> float:
    """The sum of -log p over the scored tokens."""
    total = 0.0
    for ids, first in windows:
        rows = np.asarray(logits(ids)[first - 1 : -1], dtype=np.float32).astype(np.float64)
        top = rows.max(-1, keepdims=True)
        said = rows[np.arange(len(rows)), ids[first:]]
        total += float((top[:, 0] + np.log(np.exp(rows - top).sum(-1)) - said).sum())
    return total


def main(backend: str, model: str, file: str) -> None:
    """Score, print."""
    windows = json.loads(Path(file).read_text())
    print(json.dumps(nats({"openvino": openvino, "llama": llama}[backend](model), windows)))


if __name__ == "__main__":
    main(*sys.argv[1:])
