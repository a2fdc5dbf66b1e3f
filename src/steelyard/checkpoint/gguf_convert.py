"""A GGUF file becomes a checkpoint folder: Hugging Face config, weight names and layout, bfloat16, tokenizer.

Knows the decoder architectures that llama.cpp writes as `llama` (Llama, Mistral, SmolLM), `qwen2`, `qwen3` and
`gemma3`; every tensor of the file must have a place in the model and every place a tensor, of the expected shape. The
container is `gguf.py`'s, the names `gguf_places.py`'s, the tokenizer `gguf_tokenizer.py`'s.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steelyard.checkpoint import bfloat16, safetensors
from steelyard.checkpoint.gguf import GGUF, GGUFTensor
from steelyard.checkpoint.gguf_config import read_config
from steelyard.checkpoint.gguf_places import Place, places, unpermute
from steelyard.checkpoint.gguf_tokenizer import write_tokenizer
from steelyard.errors import ArtifactError

PIECE_VALUES = 1 << 22
"""Values decoded at a time, about: what the conversion holds in memory, whatever the model's size."""


def convert(path: Path, folder: Path, report: Callable[[str, int, int | None], None] = lambda *_: None) -> None:
    """Write the checkpoint files of the GGUF at `path` into an existing folder.

    Args:
        path: the GGUF file.
        folder: gets config.json, generation_config.json, model.safetensors (bfloat16, rounded to nearest even),
            tokenizer.json, tokenizer_config.json and, if the file has one, chat_template.jinja.
        report: called with what is done, and the bytes of weights written so far and in all.

    Raises:
        ArtifactError: not a GGUF file, or one of an architecture, type or tokenizer that is not read.
    """
    gguf = GGUF(path)
    config = read_config(gguf)
    found = places(config)
    _check(gguf, found)
    total = 2 * sum(int(np.prod(place.shape)) for place in found.values())
    done = 0

    def content(tensor: GGUFTensor, place: Place) -> Iterator[NDArray[np.uint16]]:
        nonlocal done
        for piece in _pieces(tensor, place.heads):
            bits = bfloat16.to_bits(piece - np.float32(place.added) if place.added else piece)
            yield bits
            done += bits.nbytes
            report("convert", done, total)

    safetensors.write(
        folder / "model.safetensors",
        (
            (place.name, "BF16", place.shape, functools.partial(content, gguf.tensors[name], place))
            for name, place in found.items()
        ),
        {"format": "pt"},
    )
    write_tokenizer(gguf, folder, config["vocab_size"], config["max_position_embeddings"])
    _write_json(folder / "config.json", config)
    special: dict[str, Any] = {
        key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config
    }
    _write_json(folder / "generation_config.json", special)


def _pieces(tensor: GGUFTensor, heads: int) -> Iterator[NDArray[np.float32]]:
    if len(tensor.shape) == 1:
        yield unpermute(tensor.read(), heads) if heads else tensor.read()
        return
    unit = tensor.shape[0] // heads if heads else 1
    step = max(PIECE_VALUES // tensor.shape[-1] // unit, 1) * unit
    for start in range(0, tensor.rows, step):
        rows = tensor.read_rows(start, start + step)
        yield unpermute(rows, rows.shape[0] // unit) if heads else rows


def _check(gguf: GGUF, places: dict[str, Place]) -> None:
    for name, place in places.items():
        tensor = gguf.tensors.get(name)
        if tensor is None:
            raise ArtifactError(f"'{gguf.path}' has no tensor '{name}': it is incomplete or only a part of a model")
        if tensor.shape != place.shape:
            shapes = f"{list(tensor.shape)} where its metadata say {list(place.shape)}"
            raise ArtifactError(f"'{gguf.path}' has tensor '{name}' of shape {shapes}")
    # rope_freqs is a function of the config (checked there), not a weight.
    for name in gguf.tensors.keys() - places.keys() - {"rope_freqs.weight"}:
        kind = gguf.metadata["general.architecture"]
        raise ArtifactError(f"'{gguf.path}' has a tensor '{name[:100]!a}' that a {kind} model has no place for")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
