"""GGUF metadata become a Hugging Face `config.json`.

Knows names and bounds of hyperparameters; of the tensors only their names, and the shape of the embedding.
What the model classes here could not honour (experts, partial rotary, softcapping) is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from steelyard.checkpoint.gguf import GGUF
from steelyard.errors import ArtifactError

# general.architecture -> (class, model_type)
ARCHITECTURES: dict[str, tuple[str, str]] = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
GEMMA_PATTERN = 6
"""Of Gemma 3's layers every sixth sees everything: where a file does not say, so llama.cpp has it."""
GEMMA_LOCAL_THETA = 10_000.0
"""The base of the others' rotary positions, likewise."""
GEMMA_27B_LAYERS = 62
"""The one size whose scores are divided by the root of its width over its heads is known by its layers, likewise."""
MAX_SIZE = 1 << 24
"""Most of any one size: layers, widths, heads, positions."""


def read_config(gguf: GGUF) -> dict[str, Any]:
    """The `config.json` of the model in a GGUF file.

    Raises:
        ArtifactError: an architecture that is not read, or a setting that is missing, out of range or not supported.
    """
    architecture = gguf.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ArtifactError(f"'{gguf.path}' has the architecture {str(architecture)[:60]!a}; read are {known}")
    return _Reader(gguf, architecture).config()


class _Reader:
    """Checked access to the keys of one architecture."""

    def __init__(self, gguf: GGUF, architecture: str) -> None:
        self.gguf, self.architecture = gguf, architecture

    def refuse(self, what: str) -> NoReturn:
        raise ArtifactError(f"'{self.gguf.path}' {what}")

    def size(self, key: str, default: int | None = None) -> int:
        value = self.gguf.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
            self.refuse(f"has no usable '{self.architecture}.{key}': it must be an integer from 1 to {MAX_SIZE}")
        return value

    def real(self, key: str, default: float) -> float:
        value = self.gguf.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            self.refuse(f"has no usable '{self.architecture}.{key}': it must be a positive number")
        # A float32 in the file: its shortest decimal form is what its writer meant (1e-05, not 9.99999974e-06).
        return float(str(np.float32(value)))

    def token(self, key: str, vocabulary: int) -> int | None:
        value = self.gguf.metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocabulary:
            self.refuse(f"has a 'tokenizer.ggml.{key}' outside its vocabulary of {vocabulary}")
        return value

    def config(self) -> dict[str, Any]:
        gguf = self.gguf
        gemma = self.architecture == "gemma3"
        windows = () if gemma else ("attention.sliding_window",)
        for key in ("expert_count", "attn_logit_softcapping", "final_logit_softcapping", *windows):
            if gguf.metadata.get(f"{self.architecture}.{key}"):
                self.refuse(f"uses '{self.architecture}.{key}', which is not supported: take a model without it")
        if gguf.metadata.get("split.count", 0) not in (0, 1):
            self.refuse("is one part of a split model: merge the parts first (llama-gguf-split --merge)")
        layers = self.size("block_count")
        if layers > len(gguf.tensors):
            self.refuse(f"claims {layers} layers but has {len(gguf.tensors)} tensors")
        width, heads = self.size("embedding_length"), self.size("attention.head_count")
        key_heads = self.size("attention.head_count_kv", heads)
        head = self.size("attention.key_length", max(width // heads, 1))
        if self.size("attention.value_length", head) != head or self.size("rope.dimension_count", head) != head:
            self.refuse(f"does not use the head dimension {head} throughout, which is not supported")
        if heads % key_heads or head % 2:
            self.refuse(f"has {heads} query and {key_heads} key heads of {head}: these do not fit together")
        embedding = gguf.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            self.refuse("has no tensor 'token_embd.weight': it is no complete language model")
        vocabulary = embedding.shape[0]
        model_class, model_type = ARCHITECTURES[self.architecture]
        theta = self.real("rope.freq_base", 1_000_000.0 if gemma else 10_000.0)
        positions = self.size("context_length")
        config: dict[str, Any] = {
            "architectures": [model_class],
            "model_type": model_type,
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": self.size("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "head_dim": head,
            **({"hidden_activation": "gelu_pytorch_tanh"} if gemma else {"hidden_act": "silu"}),
            "max_position_embeddings": positions,
            "rms_norm_eps": self.real("attention.layer_norm_rms_epsilon", 1e-6),
            "rope_theta": theta,
            "rope_scaling": self.rope_scaling(head, theta, positions),
            "tie_word_embeddings": "output.weight" not in gguf.tensors,
            "initializer_range": 0.02,
            "attention_dropout": 0.0,
            "use_cache": True,
            "torch_dtype": "bfloat16",
        }
        if model_type != "qwen2":
            config["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
        if model_type == "llama":
            config["mlp_bias"] = False
        if gemma:
            config |= self.gemma(width, heads, head, layers)
        tokens = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}
        for name, key in tokens.items():
            value = self.token(key, vocabulary)
            if value is not None:
                config[f"{name}_token_id"] = value
        end_of_turn = self.token("eot_token_id", vocabulary)
        if end_of_turn is not None and end_of_turn != config.get("eos_token_id", end_of_turn):
            config["eos_token_id"] = [config["eos_token_id"], end_of_turn]
        return config

    def gemma(self, width: int, heads: int, head: int, layers: int) -> dict[str, Any]:
        """What only Gemma 3's `config.json` has."""
        every = self.size("attention.sliding_window_pattern", GEMMA_PATTERN)
        kinds = ["sliding_attention" if layer % every else "full_attention" for layer in range(1, layers + 1)]
        return {
            "query_pre_attn_scalar": width // heads if layers == GEMMA_27B_LAYERS else head,
            "sliding_window": self.size("attention.sliding_window"),
            "layer_types": kinds,
            "rope_local_base_freq": self.real("rope.freq_base_swa", GEMMA_LOCAL_THETA),
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        }

    def rope_scaling(self, head: int, theta: float, positions: int) -> dict[str, Any] | None:
        factors = self.gguf.tensors.get("rope_freqs.weight")
        if factors is not None:
            if factors.shape != (head // 2,):
                self.refuse(f"has 'rope_freqs.weight' of shape {list(factors.shape)} for heads of {head}")
            return self.llama3_scaling(factors.read(), head, theta)
        kind = self.gguf.metadata.get(f"{self.architecture}.rope.scaling.type", "none")
        if kind == "none":
            return None
        if kind not in ("linear", "yarn"):
            self.refuse(f"scales its rotary embedding by {str(kind)[:40]!a}; none, linear, yarn and Llama 3's are read")
        scaling = {"rope_type": kind, "factor": self.real("rope.scaling.factor", 1.0)}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = self.size("rope.scaling.original_context_length", positions)
        return scaling

    def llama3_scaling(self, factors: NDArray[np.float32], head: int, theta: float) -> dict[str, Any]:
        """The parameters behind Llama 3's frequency factors, which GGUF stores instead of them."""
        factor = round(float(factors.max()), 4)
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if factor <= 0 or not np.allclose(factors, llama3_factors(head, theta, scaling), rtol=1e-4):
            self.refuse("has rotary factors in 'rope_freqs.weight' that are not Llama 3's, which is not supported")
        return scaling


def llama3_factors(head: int, theta: float, scaling: Mapping[str, Any]) -> NDArray[np.float64]:
    """What each frequency of the rotary embedding is divided by: `[head / 2]`, of 1 to `factor`.

    Args:
        head: width of a head.
        theta: the base.
        scaling: Llama 3's parameters under their Hugging Face names.
    """
    factor, low, high = (float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(scaling["original_max_position_embeddings"])
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head, 2) / head)
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelengths < original / high, 1, np.where(wavelengths > original / low, factor, between))
