"""Small random models of every family that the decoder knows, made and saved by transformers."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA_LINEAR = {
    "head_dim": 8,
    "query_pre_attn_scalar": 64,
    "sliding_window": 5,
    "sliding_window_pattern": 2,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    },
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"tie_word_embeddings": False}),
    "smollm": ("llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-width": ("llama", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": 7, "head_dim": 8}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 7, "sliding_window_pattern": 3}),
    "gemma3-linear": ("gemma3_text", GEMMA_LINEAR),
}


def make(folder: Path, family: str, **sizes: int) -> Any:
    """A small random model of a family, saved by transformers; `sizes` replace its own. Returns the reference."""
    kind, fields = FAMILIES[family]
    torch.manual_seed(zlib.crc32(family.encode()))
    reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **fields, **sizes}))
    for parameter in reference.parameters():  # biases and norms start at 0 and 1: make them matter
        torch.nn.init.normal_(parameter, std=0.08) if parameter.ndim > 1 else parameter.data.normal_(0.5, 0.3)
    reference = reference.float().eval()
    reference.save_pretrained(folder)
    return reference
