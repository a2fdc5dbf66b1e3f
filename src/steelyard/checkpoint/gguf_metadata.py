"""A Hugging Face `config.json` becomes GGUF metadata: the other way of `gguf_config.py`, with its names and bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steelyard.checkpoint.gguf import Value
from steelyard.checkpoint.gguf_config import ARCHITECTURES, llama3_factors
from steelyard.errors import CheckpointError

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
"""llama.cpp's `llama_ftype`, by the type of most tensors."""
QUANTIZATION_VERSION = 2
YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
"""What llama.cpp takes them for: GGUF does not say."""


def hyperparameters(config: Mapping[str, Any], name: str, kind: str) -> dict[str, Value]:
    """The metadata of a model, without its tokenizer's.

    Args:
        config: as `gguf_config.read_config` makes it.
        name: what the model is called.
        kind: the type of most of its tensors.

    Raises:
        CheckpointError: a setting that GGUF has no key for.
    """
    architecture = config["model_type"]
    assert architecture in ARCHITECTURES, "the caller maps what is like another"
    head = config["head_dim"]
    own: dict[str, Value] = {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": head,
        "rope.freq_base": float(config["rope_theta"]),
        **_scaling(config["rope_scaling"] or {}),
    }
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": QUANTIZATION_VERSION,
        **{f"{architecture}.{key}": value for key, value in own.items()},
    }


def rope_factors(config: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """The tensor `rope_freqs.weight`, `[head_dim / 2]`, if the model has Llama 3's scaling."""
    scaling = config["rope_scaling"] or {}
    if scaling.get("rope_type") != "llama3":
        return None
    return llama3_factors(config["head_dim"], config["rope_theta"], scaling).astype(np.float32)


def _scaling(scaling: Mapping[str, Any]) -> dict[str, Value]:
    kind = scaling.get("rope_type")
    if kind not in ("linear", "yarn"):
        return {}
    found: dict[str, Value] = {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        original = scaling["original_max_position_embeddings"]
        found["rope.scaling.original_context_length"] = original
        known = {"rope_type", "factor", "original_max_position_embeddings"}
        for key, value in scaling.items():
            if key not in known and value not in (None, YARN.get(key)):
                raise CheckpointError(f"config.json: rope scaling has {key} = {value!r}, which GGUF cannot say")
    return found
